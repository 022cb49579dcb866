"""A simulated solver with known error rates: the closed form against the engine.

Nested arithmetic on fresh random integers, a problem an operator. Each operator is answered wrongly
with probability `error`; a critique accepts right results with probability `accept` and catches
wrong ones with probability `catch`. Assessing and splitting are right. With R = rounds + 1 tries, g
= 1 - error, and a = g*accept + (1-g)*(1-catch) the chance that a try is accepted,

  P(node right) = sum_{i<R} (1-a)^i g accept + (1-a)^(R-1) g (1-accept),
  tries a node = sum_{i<R} (1-a)^i,

and all of s operators are right with probability P(node)^s. Lost parts, a wrong order or a skipped
check of the engine would show as a deviation.
"""

from __future__ import annotations

import math
import random
import re
from typing import Annotated, NamedTuple

from annotated_types import Ge, Le

from lmops_jax.config.setting_types import PositiveInt, Probability, check_arguments
from lmops_jax.systems.socratic import expressions
from lmops_jax.systems.socratic.backends import Place, Rules
from lmops_jax.systems.socratic.calls import Calls
from lmops_jax.systems.socratic.context import Messages
from lmops_jax.systems.socratic.engine import Engine
from lmops_jax.systems.socratic.journal import NoLog
from lmops_jax.systems.socratic.patterns import default_patterns
from lmops_jax.systems.socratic.settings import Limits

_ONE = re.compile(r"\((-?\d+) ([+*-]) (-?\d+)\)")


class Expected(NamedTuple):
  """What the closed form says of one node: the chance that it is right, and its mean tries."""

  node: float
  tries: float


class Simulated(NamedTuple):
  """What the engine did.

  Attributes:
    problems, operators: how many, and operators of each.
    all_right: share of problems whose nodes are all right.
    nodes_right: share of nodes whose result is that of their operator on what their parts came to.
    tries: mean tries a node.
    calls: of the model, all problems together.
  """

  problems: int
  operators: int
  all_right: float
  nodes_right: float
  tries: float
  calls: int


def expected(error: float, rounds: int, accept: float = 0.95, catch: float = 0.8) -> Expected:
  """The closed form."""
  right = 1 - error
  accepted = right * accept + error * (1 - catch)
  again = [(1 - accepted) ** i for i in range(rounds + 1)]
  return Expected(sum(again) * right * accept + again[-1] * right * (1 - accept), sum(again))


def helps(accept: float, catch: float) -> bool:
  """Whether verification helps: if and only if accept + catch > 1."""
  return accept + catch > 1


def standard_error(share: float, count: int) -> float:
  """Of a share of independent trials."""
  return math.sqrt(share * (1 - share) / count)


def simulate(
  error: Probability, rounds: Annotated[int, Ge(0), Le(20)] = 2, *,
  accept: Probability = 0.95, catch: Probability = 0.8,
  levels: Annotated[int, Ge(1), Le(7)] = 4, problems: PositiveInt = 400, seed: int = 0,
) -> Simulated:
  """Runs the engine on random problems with a simulated solver.

  Args:
    error: chance that an operator is answered wrongly.
    rounds: of verification.
    accept, catch: see the module.
    levels: of the expressions, which have 2**levels - 1 operators.
    problems: how many.

  Raises:
    ValueError: naming the argument.
  """
  check_arguments(simulate, "simulate", {
    "error": error, "rounds": rounds, "accept": accept, "catch": catch, "levels": levels,
    "problems": problems})
  limits = Limits(max_turns=2**30, max_tokens=2**31 - 1, max_depth=levels, rounds=rounds,
                  max_parts=2)
  generator, patterns = random.Random(seed), default_patterns()
  whole = right = tries = calls = 0
  for number in range(problems):
    solver = _Solver(random.Random(generator.getrandbits(64)), error, accept, catch)
    backend = Rules(solver)
    engine = Engine(f"Compute {_expression(generator, levels)}.",
                    Calls(backend, NoLog(), limits, patterns))
    engine.run()
    nodes = list(engine.tree.problems.values())
    good = [_value(engine.tree, p) == int(p.conclusion.answer) for p in nodes]
    if len(nodes) != 2**levels - 1:
      raise AssertionError(f"problem {number} has {len(nodes)} nodes.")
    whole += all(good)
    right += sum(good)
    tries += sum(p.attempts.get("REFINE", 0) + 1 for p in nodes)
    calls += backend.num_calls
  count = problems * (2**levels - 1)
  return Simulated(problems, 2**levels - 1, whole / problems, right / count, tries / count, calls)


def _expression(generator: random.Random, levels: int) -> str:
  """A balanced expression of random integers, which is distinct from its parts."""
  return expressions.balanced(generator, levels, lambda: str(generator.randrange(1, 10**6)))


def _asked(statement: str) -> str:
  return statement.removeprefix("Compute ").removesuffix(".")


def _value(tree, problem) -> int:
  """What a node should be, given what its parts came to."""
  left, sign, right = expressions.sides(_asked(problem.statement))
  children = tree.children(problem)
  if children:
    left, right = (child.conclusion.answer for child in children)
  return expressions.applied(sign, int(left), int(right))


class _Solver:
  """Replies from the request's text alone, with errors at known rates."""

  def __init__(self, generator: random.Random, error: float, accept: float, catch: float):
    self._random, self._error, self._accept, self._catch = generator, error, accept, catch

  def __call__(self, messages: Messages, place: Place, unused: random.Random) -> str:
    text = messages[-1][1]
    if place.pattern == "CHECK":
      return "VERDICT: OK"
    expression = _asked(re.search(r"Compute .*\.", text)[0])
    if place.pattern == "ASSESS":
      return f"DECISION: {'SOLVE' if _ONE.fullmatch(expression) else 'SPLIT'}"
    left, sign, right = expressions.sides(expression)
    if place.pattern == "DEC":
      return f"PART 1: Compute {left}.\nPART 2: Compute {right}."
    if not _ONE.fullmatch(expression):  # the parts' conclusions stand in the request
      left, right = self._parts(text, place)
    true = expressions.applied(sign, int(left), int(right))
    if place.pattern == "VER":
      claimed = int(re.search(r"The conclusion that was reached:\n\n.*?= (-?\d+)", text, re.S)[1])
      chance = self._accept if claimed == true else 1 - self._catch
      return "VERDICT: OK" if self._random.random() < chance else "VERDICT: ISSUE\nISSUE: redo it"
    wrong = self._random.random() < self._error
    value = true + (self._random.choice((-1, 1)) * self._random.randrange(1, 9) if wrong else 0)
    cited = "" if _ONE.fullmatch(expression) else " by [S1] and [S2]"
    return f"CONCLUSION: ({left} {sign} {right}) = {value}{cited}\nANSWER: {value}"

  def _parts(self, text: str, place: Place) -> tuple[str, str]:
    if place.pattern == "REFINE":  # which shows the conclusion so far, with what it was made of
      found = re.search(r"The conclusion so far:\n\n\((-?\d+) . (-?\d+)\) =", text)
      return found[1], found[2]
    return tuple(re.search(rf"\[S{i}\] .*\nStatus: .*\nConclusion: .*= (-?\d+)", text)[1]
                 for i in (1, 2))
