"""Satisfiability for claims: formulas of yes and no, decided by minisat after counted conflicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lmops_jax.systems.socratic import formulas
from lmops_jax.systems.socratic.formulas import Grammar, Node, Refused

_MAX_VARIABLES, _MAX_CONFLICTS = 60, 20_000
_BOOLEAN = Grammar(
  levels=({"<->": "iff"}, {"->": "implies"}, {"|": "or", "or": "or"}, {"xor": "xor"},
          {"&": "and", "and": "and"}),
  prefixes={"~": "not", "!": "not", "not": "not"}, prefix_above=5, right=frozenset({"implies"}),
  constants=frozenset({"true", "false"}))


class Satisfiability:
  """Formulas of yes and no: whether some, all or no values make one true."""

  name = "satisfiability"
  form = ("CLAIM satisfiability: KIND: FORMULA\n"
          "where KIND is satisfiable, unsatisfiable or valid, and FORMULA is from your own "
          "reasoning: names with & | ~ xor -> <-> and brackets")

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
    names = formulas.variables(node, _MAX_VARIABLES)
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
