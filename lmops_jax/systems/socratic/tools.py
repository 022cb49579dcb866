"""Exact tools that check claims for verification: arithmetic and algebra, and satisfiability.

A model writes a claim on a line of its own; `formulas` reads it, and what is checked is built from
that tree alone. No tool runs, evaluates or opens anything that a model wrote, and each ends after
counted work. Off unless a run names them. The libraries are sympy (BSD) and python-sat (MIT), of
the extra `socratic`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lmops_jax.host.words import shortened
from lmops_jax.systems.socratic import formulas
from lmops_jax.systems.socratic.formulas import Grammar, Node, Refused

MAX_CLAIMS = 8  # of one reply that are checked
_MAX_VARIABLES = {"arithmetic": 4, "satisfiability": 60}
_MAX_BITS, _MAX_EXPONENT, _MAX_TERMS, _MAX_WORK = 8_000, 1_000, 400, 4_000_000
_MAX_FACTORIAL, _MAX_CONFLICTS = 500, 20_000
_SHOWN = 80  # characters of a number
_LINE = re.compile(r"^[ \t>*_#`-]{0,8}CLAIM[ \t]{1,4}([A-Za-z]{1,20})[*_` \t]{0,4}:[*_` \t]{0,4}"
                   r"([^\n]*)$", re.I | re.M)


class Claim(NamedTuple):
  """What a tool is to check."""

  tool: str
  text: str


class Tool(Protocol):
  """Checks claims.

  Attributes:
    name: as on the command line and in claims.
    form: lines that show a model how to write a claim.
  """

  name: str
  form: str

  def check(self, claim: str) -> str:
    """What is true of a claim, in a sentence without its full stop.

    Raises:
      Refused: if it is not in the grammar, or too much work.
    """


def claims_of(text: str, names: Sequence[str]) -> tuple[tuple[Claim, ...], str]:
  """The claims of a reply for tools of these names, and the reply without their lines."""
  found = []

  def taken(match: re.Match) -> str:
    name, claim = match[1].lower(), match[2].strip().strip("`").strip()
    if name not in names:
      return match[0]
    found.append(Claim(name, claim))
    return ""

  rest = _LINE.sub(taken, text)
  return tuple(found), rest


def form_of(name: str) -> str:
  """The lines that show a model how to write claims for a tool."""
  return _TOOLS[name].form


def named_tools(names: Sequence[str]) -> dict[str, Tool]:
  """The tools by name.

  Raises:
    ValueError: for a name that there is not, or a library that is not installed.
  """
  found = {}
  for name in names:
    if name not in _TOOLS:
      raise ValueError(f"there is no tool {name!r}; there are {', '.join(_TOOLS)}.")
    if name in found:
      raise ValueError(f"the tool {name} is named twice; name it once.")
    found[name] = _TOOLS[name]()
  return found


def checked(tools: Mapping[str, Tool], claims: Sequence[Claim]) -> list[str]:
  """What tools say of claims, a line each; of more than `MAX_CLAIMS` the first ones."""
  found = []
  for claim in claims[:MAX_CLAIMS]:
    try:
      said = tools[claim.tool].check(claim.text)
    except Refused as error:
      said = f"not checked: {error}"
    found.append(f"{claim.tool}: {shortened(claim.text, 200)}: {said}")
  if len(claims) > MAX_CLAIMS:
    found.append(f"{len(claims) - MAX_CLAIMS} further claims were not checked: at most "
                 f"{MAX_CLAIMS} are")
  return found


def _variables(tool: str, node: Node) -> list[str]:
  names = formulas.names_of(node)
  if len(names) > _MAX_VARIABLES[tool]:
    raise Refused(f"it has {len(names)} variables, and at most {_MAX_VARIABLES[tool]} are taken")
  return names


# ------------------------------------------------------------------------ arithmetic and algebra

_COMPARISONS = {"=": "=", "==": "=", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_ARITHMETIC = Grammar(
  levels=(_COMPARISONS, {"+": "+", "-": "-"}, {"*": "*", "/": "/", "%": "%"},
          {"^": "^", "**": "^"}),
  prefixes={"-": "minus", "+": "plus"}, prefix_above=3, right=frozenset("^"),
  alone=frozenset(_COMPARISONS.values()), has_numbers=True,
  functions={"abs": 1, "floor": 1, "factorial": 1, "binomial": 2, "gcd": 2, "lcm": 2})


class Arithmetic:
  """Exact numbers and rational functions; an equation with variables must hold for all of them."""

  name = "arithmetic"
  form = ("CLAIM arithmetic: 3*(4+5)^2 = 243\n"
          "with + - * / % ^ < <= > >= != and abs, floor, factorial, binomial, gcd, lcm; an "
          "equation with variables is claimed for all of their values")

  def __init__(self):
    try:
      import sympy  # noqa: F401
    except ImportError:
      raise ValueError("the tool arithmetic needs the package sympy, which is not installed; "
                       "install lmops_jax[socratic].") from None

  def check(self, claim: str) -> str:
    """See `Tool`."""
    node = formulas.parse(claim, _ARITHMETIC)
    names = _variables(self.name, node)
    algebra = _Algebra(names)
    if node.kind not in _COMPARISONS.values():
      found = algebra.of(node)
      return f"it is {algebra.shown(found)}"
    left, right = map(algebra.of, node.parts)
    if algebra.is_number(left) and algebra.is_number(right):
      left, right = algebra.number(left), algebra.number(right)
      holds = {"=": left == right, "!=": left != right, "<": left < right, "<=": left <= right,
               ">": left > right, ">=": left >= right}[node.kind]
      return f"{'true' if holds else 'false'}: {_number(left)} on the left, {_number(right)} on " \
             "the right"
    if node.kind != "=":
      raise Refused("of formulas with variables only equations are decided")
    if left == right:
      return f"true for all {', '.join(names)} for which both sides are defined"
    return f"false: {algebra.counterexample(left, right)}"


class _Algebra:
  """Rational functions over the rationals, with the size of each result known before it is made."""

  def __init__(self, names: Sequence[str]):
    import sympy
    from sympy.polys.fields import field

    self._names = list(names)
    symbols = [sympy.Symbol(f"v{i}") for i in range(max(1, len(names)))]  # no text goes to sympy
    self._field, *self._variables = field(symbols, sympy.QQ)
    self._work = 0

  def of(self, node: Node):
    """The value of a formula.

    Raises:
      Refused: if it divides by zero, is not defined, or is too much work.
    """
    return formulas.folded(node, self._combined)

  def is_number(self, value) -> bool:
    """Whether there is no variable left in it."""
    return value.numer.is_ground and value.denom.is_ground

  def number(self, value):
    """The rational number that a value without variables is."""
    from fractions import Fraction

    top, bottom = (part.LC if part else 0 for part in (value.numer, value.denom))
    return Fraction(int(top.numerator), int(top.denominator)) / Fraction(
      int(bottom.numerator), int(bottom.denominator)) if top else Fraction(0)

  def shown(self, value) -> str:
    """As text."""
    if self.is_number(value):
      return _number(self.number(value))
    text = str(value.as_expr())
    for i in reversed(range(len(self._names))):
      text = re.sub(rf"\bv{i}\b", self._names[i], text)
    return shortened(text, _SHOWN)

  def counterexample(self, left, right) -> str:
    """Numbers for which two different values differ."""
    for point in itertools.islice(
        itertools.product((0, 1, 2, -1, 3, 5, 7), repeat=len(self._names)), 300):
      found = []
      for value in (left, right):
        bottom = value.denom.evaluate(list(zip(value.denom.ring.gens, point)))
        if not bottom:
          break
        found.append(value.numer.evaluate(list(zip(value.numer.ring.gens, point))) / bottom)
      if len(found) == 2 and found[0] != found[1]:
        where = ", ".join(f"{name} = {n}" for name, n in zip(self._names, point))
        return f"at {where} it is {_number(found[0])} on the left, {_number(found[1])} on the right"
    return "the sides are different rational functions"

  def _combined(self, node: Node, parts: list):
    if node.kind == "number":
      if "." in node.text:
        whole, _, digits = node.text.partition(".")
        return self._made(int(whole + digits)) / self._made(10 ** len(digits))
      return self._made(int(node.text))
    if node.kind == "name":
      return self._variables[self._names.index(node.text)]
    if node.kind == "call":
      return self._called(node.text, [self._integer(part, node.text) if node.text != "floor"
                                      and node.text != "abs" else part for part in parts])
    if node.kind in ("minus", "plus"):
      return -parts[0] if node.kind == "minus" else parts[0]
    if node.kind == "^":
      return self._power(*parts)
    if node.kind == "%":
      left, right = (self._integer(part, "%") for part in parts)
      if right == 0:
        raise Refused("it takes a remainder by zero")
      return self._made(left % right)
    left, right = parts
    self._spend(left, right)
    if node.kind == "/":
      if not right:
        raise Refused("it divides by zero")
      return left / right
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__}[node.kind](right)

  def _made(self, number: int):
    return self._field.from_expr(_sympy_integer(number))

  def _spend(self, left, right) -> None:
    """Refuses operations whose result or work would be too large."""
    terms = [max(len(value.numer), 1) * max(len(value.denom), 1) for value in (left, right)]
    bits = sum(map(_bits, (left, right)))
    if terms[0] * terms[1] > _MAX_TERMS**2 or max(terms) > _MAX_TERMS or bits > _MAX_BITS:
      raise Refused("its numbers or polynomials become too large")
    self._work += terms[0] * terms[1] * (1 + bits // 64)
    if self._work > _MAX_WORK:
      raise Refused("it is too much work")

  def _power(self, base, exponent):
    number = self._integer(exponent, "^")
    if abs(number) > _MAX_EXPONENT:
      raise Refused(f"the exponent {_number(number)} is beyond {_MAX_EXPONENT}")
    if number < 0 and not base:
      raise Refused("it divides by zero")
    size = abs(number)
    degree = max([sum(term) for part in (base.numer, base.denom) for term in part.itermonoms()],
                 default=0) * size
    used = sum(any(term[i] for part in (base.numer, base.denom) for term in part.itermonoms())
               for i in range(len(self._variables)))
    length = max(len(base.numer), len(base.denom), 1)
    # Coefficients of a power have at most these bits: |sum of c|^n, and its terms are monomials.
    bits = (_bits(base) + length.bit_length()) * size
    terms = 1 if length == 1 else math.comb(degree + used, used)
    if bits > _MAX_BITS or terms > _MAX_TERMS:
      raise Refused("its numbers or polynomials become too large")
    self._work += terms * terms * (1 + bits // 64)
    if self._work > _MAX_WORK:
      raise Refused("it is too much work")
    return base**number

  def _integer(self, value, where: str) -> int:
    if not self.is_number(value) or self.number(value).denominator != 1:
      raise Refused(f"{where} takes whole numbers")
    return self.number(value).numerator

  def _called(self, name: str, parts: list):
    if name in ("abs", "floor"):
      if not self.is_number(parts[0]):
        raise Refused(f"{name} takes a number")
      found = self.number(parts[0])
      if name == "floor":
        return self._made(math.floor(found))
      return parts[0] if found >= 0 else -parts[0]
    if name in ("gcd", "lcm"):
      return self._made({"gcd": math.gcd, "lcm": math.lcm}[name](*parts))
    if any(not 0 <= part <= _MAX_FACTORIAL for part in parts):
      raise Refused(f"{name} takes numbers from 0 to {_MAX_FACTORIAL}")
    return self._made({"factorial": math.factorial, "binomial": math.comb}[name](*parts))


def _sympy_integer(number: int):
  import sympy

  return sympy.Integer(number)


def _bits(value) -> int:
  """Bits of the longest coefficient."""
  return max((max(int(c.numerator).bit_length(), int(c.denominator).bit_length())
              for part in (value.numer, value.denom) for c in part.itercoeffs()), default=1)


def _number(value: Any) -> str:
  """A rational number as text; of a long one its ends."""
  top, bottom = int(value.numerator), int(value.denominator)
  digits = str(top)
  text = digits if bottom == 1 else f"{digits}/{bottom}"
  if len(text) <= _SHOWN:
    return text
  return f"{text[:30]}...{text[-30:]} ({len(digits.lstrip('-')):,} digits)"


# ------------------------------------------------------------------------------- satisfiability

_BOOLEAN = Grammar(
  levels=({"<->": "iff"}, {"->": "implies"}, {"|": "or", "or": "or"}, {"xor": "xor"},
          {"&": "and", "and": "and"}),
  prefixes={"~": "not", "!": "not", "not": "not"}, prefix_above=5, right=frozenset({"implies"}),
  constants=frozenset({"true", "false"}))


class Satisfiability:
  """Formulas of yes and no: whether some, all or no values make one true."""

  name = "satisfiability"
  form = ("CLAIM satisfiability: satisfiable: (a | b) & ~a\n"
          "with & | ~ xor -> <-> and brackets; or unsatisfiable, or valid")

  def __init__(self):
    try:
      from pysat.solvers import Solver  # noqa: F401
    except ImportError:
      raise ValueError("the tool satisfiability needs the package python-sat, which is not "
                       "installed; install lmops_jax[socratic].") from None

  def check(self, claim: str) -> str:
    """See `Tool`."""
    word, _, formula = claim.partition(":")
    word = word.strip().lower()
    if word not in ("satisfiable", "unsatisfiable", "valid"):
      raise Refused("it does not begin with satisfiable:, unsatisfiable: or valid:")
    node = formulas.parse(formula, _BOOLEAN)
    names = _variables(self.name, node)
    if word == "valid":
      node = Node("not", parts=(node,))
    values = _solution(node, names)
    if values is None:
      return "true: it is valid" if word == "valid" else (
        f"{'true' if word == 'unsatisfiable' else 'false'}: no values make it true")
    shown = ", ".join(f"{name}={int(value)}" for name, value in zip(names, values))
    example = f", as with {shown}" if shown else ""
    if word == "valid":
      return f"false: it can be false{example}"
    return f"{'true' if word == 'satisfiable' else 'false'}: it can be true{example}"


def _solution(node: Node, names: Sequence[str]) -> list[bool] | None:
  """Values of the variables that make a formula true, None if there are none.

  Clauses are Tseitin's: a variable for each part (Tseitin 1968).

  Raises:
    Refused: if the solver meets more conflicts than are granted.
  """
  from pysat.solvers import Solver

  clauses: list[list[int]] = []
  fresh = itertools.count(len(names) + 1)

  def combined(one: Node, parts: list[int]) -> int:
    if one.kind == "name":
      return names.index(one.text) + 1
    made = next(fresh)
    clauses.extend(_meaning(one, made, parts))
    return made

  root = formulas.folded(node, combined)
  # Of its solvers minisat asks at every conflict whether the granted ones are spent.
  with Solver(name="minisat22", bootstrap_with=[*clauses, [root]]) as solver:
    solver.conf_budget(_MAX_CONFLICTS)
    found = solver.solve_limited(expect_interrupt=False)
    if found is None:
      raise Refused(f"it was not decided within {_MAX_CONFLICTS:,} conflicts")
    if not found:
      return None
    model = set(solver.get_model())
  return [i + 1 in model for i in range(len(names))]


def _meaning(node: Node, made: int, parts: list[int]) -> list[list[int]]:
  """Clauses that say that a variable is what a part of a formula says."""
  if node.kind == "constant":
    return [[made if node.text == "true" else -made]]
  if node.kind == "not":
    return [[-made, -parts[0]], [made, parts[0]]]
  a, b = parts
  if node.kind == "implies":
    a = -a
  if node.kind == "and":
    return [[-made, a], [-made, b], [made, -a, -b]]
  if node.kind in ("or", "implies"):
    return [[made, -a], [made, -b], [-made, a, b]]
  if node.kind == "xor":
    made = -made
  return [[-made, -a, b], [-made, a, -b], [made, a, b], [made, -a, -b]]


_TOOLS: Mapping[str, type[Tool]] = {
  tool.name: tool for tool in (Arithmetic, Satisfiability)}
