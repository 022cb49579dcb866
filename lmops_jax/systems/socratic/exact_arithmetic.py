"""Exact arithmetic and algebra for claims: rational functions by sympy, after counted work.

Values are built from the tree of a formula, never from its text, and the size of each result is
known before it is made.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from lmops_jax.host.words import shortened
from lmops_jax.systems.socratic import formulas
from lmops_jax.systems.socratic.formulas import Grammar, Node, Refused

_MAX_VARIABLES, _MAX_FACTORIAL = 4, 500
_MAX_BITS, _MAX_EXPONENT, _MAX_TERMS, _MAX_WORK = 8_000, 1_000, 400, 4_000_000
_SHOWN = 80  # characters of a number
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
  form = ("CLAIM arithmetic: LEFT = RIGHT\n"
          "where LEFT and RIGHT are formulas from your own reasoning, with + - * / % ^ and abs, "
          "floor, factorial, binomial, gcd, lcm; also with < <= > >= !=; an equation with "
          "variables is claimed for all of their values")

  def __init__(self):
    try:
      import sympy  # noqa: F401
    except ImportError:
      raise ValueError("the tool arithmetic needs the package sympy, which is not installed; "
                       "install lmops_jax[socratic].") from None

  def check(self, claim: str) -> str:
    """See `Tool`."""
    node = formulas.parse(claim, _ARITHMETIC)
    names = formulas.variables(node, _MAX_VARIABLES)
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
      return self._called(node.text, parts)
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
    self._count(terms[0] * terms[1], bits)

  def _count(self, products: int, bits: int) -> None:
    """Counts products of numbers of that many bits, and refuses too many."""
    self._work += products * (1 + bits // 64)
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
    self._count(terms**2, bits)
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
    parts = [self._integer(part, name) for part in parts]
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
