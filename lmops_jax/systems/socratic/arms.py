"""Stages `solve/<arm>/seed<k>`: ways to spend tokens on a problem, all through the real engine.

`checked` is the engine with verification, `unchecked` the engine without; `vote` and `steps` ask
for the whole at once, the latter with its steps written out; `greedy` is `vote` once, by its most
probable tokens. All others may cost what `checked` costs on the same problem: they are repeated
with other random numbers as long as one more like the dearest so far would fit, and the most
frequent answer counts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Le

from lmops_jax.config.setting_types import Count, Positive, PositiveInt, Seed, component
from lmops_jax.host.whole_files import write_json
from lmops_jax.stages import pipeline
from lmops_jax.systems.socratic import expressions, skills
from lmops_jax.systems.socratic.backends import Backend
from lmops_jax.systems.socratic.calls import Calls
from lmops_jax.systems.socratic.engine import Engine
from lmops_jax.systems.socratic.in_process import InProcess
from lmops_jax.systems.socratic.journal import Journal
from lmops_jax.systems.socratic.problems import Problem, Tree
from lmops_jax.systems.socratic.settings import Limits
from lmops_jax.systems.socratic.skills import Arithmetic
from lmops_jax.systems.socratic.together import run_together

GREEDY, VOTE, STEPS, UNCHECKED, CHECKED = "greedy", "vote", "steps", "unchecked", "checked"
ARMS = (CHECKED, UNCHECKED, STEPS, VOTE, GREEDY)  # the others cost what the first does
PROBLEMS, ROWS = "problems.json", "rows.json"
_DEDUCTION = {GREEDY: skills.ANSWER, VOTE: skills.ANSWER, STEPS: skills.STEPS}
NAME = "solver"  # in the keys of calls, so that random numbers depend on no folder
_PLENTY = 2**31 - 1


@component(module="socratic")
@dataclasses.dataclass(frozen=True)
class Solving:
  """What is asked, and how.

  Attributes:
    num_problems: of each depth.
    rounds: of verification.
    temperature: of all arms but `greedy`.
    reply_tokens: most new tokens of a reply of the engine.
    steps_tokens: the same of a reply with steps.
    most_repeats: of an arm, whatever its tokens would allow.
    at_once: problems that are worked on side by side.
    seed: of the problems.
  """

  num_problems: PositiveInt = 24
  rounds: Annotated[int, Ge(1), Le(20)] = 2
  temperature: Positive = 0.7
  reply_tokens: PositiveInt = 48
  steps_tokens: PositiveInt = 88
  most_repeats: PositiveInt = 64
  at_once: PositiveInt = 64
  seed: Seed = 0

  def limits(self, arm: str, arithmetic: Arithmetic, repeat: Count = 0) -> Limits:
    """Those of one run of an arm."""
    is_whole = arm in _DEDUCTION
    return Limits(
      max_turns=_PLENTY, max_tokens=_PLENTY, max_parts=2, rephrases=0, margin=0, seed=repeat,
      max_new_tokens=self.steps_tokens if arm == STEPS else self.reply_tokens,
      max_depth=0 if is_whole else arithmetic.levels,
      rounds=self.rounds if arm == CHECKED else 0,
      temperature=0.0 if arm == GREEDY else self.temperature)


class Asked(NamedTuple):
  """A problem: its number, depth, statement and answer."""

  number: int
  levels: int
  statement: str
  answer: int


def asked_problems(config: Solving, arithmetic: Arithmetic) -> Iterator[Asked]:
  """The problems, those of each depth together."""
  import random

  generator, number = random.Random(config.seed), 0
  for levels in range(1, arithmetic.levels + 1):
    for _ in range(config.num_problems):
      text = arithmetic.expression(generator, levels)
      yield Asked(number, levels, text, arithmetic.value(text))
      number += 1


def write_problems(
  context: pipeline.StageContext, config: Solving, arithmetic: Arithmetic
) -> None:
  """Stage `problems`."""
  found = list(asked_problems(config, arithmetic))
  write_json(context.directory / PROBLEMS, [one._asdict() for one in found])
  context.extra |= {"problems": len(found)}


def read_problems(folder: Path) -> list[Asked]:
  """The problems of a finished stage."""
  return [Asked(**one) for one in json.loads((folder / PROBLEMS).read_text())]


class Solvers:
  """The solvers of a run, which share their compiled programs."""

  def __init__(self, partitioner):
    self._partitioner, self._opened = partitioner, {}

  def of(self, folder: Path) -> InProcess:
    """The solver in a folder."""
    if folder not in self._opened:
      first = next(iter(self._opened.values()), None)
      self._opened[folder] = InProcess(
        str(folder), name=NAME, partitioner=self._partitioner, programs_of=first)
    return self._opened[folder]


def run(
  context: pipeline.StageContext, config: Solving, arithmetic: Arithmetic, arm: str,
  problems: Sequence[Asked], model: InProcess, budgets: Sequence[int] | None,
) -> None:
  """Solves all problems by one arm.

  Args:
    model: the solver.
    budgets: tokens that the arm may spend on each problem; None runs it once.
  """
  with context.progress(len(problems), "problems") as bar:
    def solve(asked: Asked, backend: Backend) -> dict[str, Any]:
      with Journal(context.directory / "journals" / f"{asked.number:04d}") as journal:
        row = _solved(config, arithmetic, arm, asked, backend, journal,
                      None if budgets is None else budgets[asked.number])
      bar.update()
      return row

    rows = run_together(
      model, [functools.partial(solve, asked) for asked in problems], config.at_once)
  write_json(context.directory / ROWS, rows)
  right = sum(row["right"] for row in rows)
  context.log(f"{right} of {len(rows)} problems right, {sum(r['tokens'] for r in rows):,} tokens")


def read_rows(folder: Path) -> list[dict[str, Any]]:
  """The rows of a finished stage, in the order of problems."""
  return json.loads((folder / ROWS).read_text())


def _solved(config, arithmetic, arm, asked: Asked, backend, journal, budget) -> dict[str, Any]:
  """One problem: answers and costs of all repeats, and the nodes of the first one's tree."""
  patterns, nodes = skills.patterns(_DEDUCTION.get(arm, skills.WORDS["DED"])), []

  def once(repeat: int) -> Run:
    recorder, limits = Recorder(), config.limits(arm, arithmetic, repeat)
    engine = Engine(asked.statement, Calls(backend, journal, limits, patterns, watch=recorder))
    found, spent = engine.run().conclusion, engine.calls.spent
    if not nodes:
      nodes.extend(recorder.nodes(engine.tree, arithmetic))
    return Run(found.answer if found is not None else None, spent.tokens, spent.turns)

  return row_of(asked, repeated(once, budget, config.most_repeats), nodes)


class Run(NamedTuple):
  """What an arm came to once: its answer, None if there is none, and what that cost."""

  answer: str | None
  tokens: int
  calls: int


def repeated(once: Callable[[int], Run], budget: int | None, most: int) -> list[Run]:
  """Runs of an arm, as many as fit a budget if each costs what the dearest so far did.

  Args:
    once: is given the number of the run, from 0.
    budget: tokens of all together, of which the first run takes what it needs; None: one run.
    most: runs, whatever the budget allows.
  """
  runs = [once(0)]
  while budget is not None and len(runs) < most:
    costs = [run.tokens for run in runs]
    if sum(costs) + max(costs) > budget:
      break
    runs.append(once(len(runs)))
  return runs


def row_of(asked: Asked, runs: Sequence[Run], nodes: Sequence[Mapping[str, Any]]
           ) -> dict[str, Any]:
  """The row of a problem, which is right if the most frequent answer is."""
  answers, costs = [run.answer for run in runs], [run.tokens for run in runs]
  said = majority(answers)
  return {
    **asked._asdict(), "said": said, "right": said == str(asked.answer), "answers": answers,
    "costs": costs, "calls": sum(run.calls for run in runs), "tokens": sum(costs),
    "nodes": list(nodes)}


def majority(answers: Sequence[str | None]) -> str | None:
  """The most frequent answer, the earliest of several; None only if there is no other."""
  counts = collections.Counter(answer for answer in answers if answer is not None)
  return max(counts, key=counts.get) if counts else None


class Recorder:
  """Watches a run and keeps the conclusions that each problem had one after another."""

  def __init__(self):
    self._said: dict[str, list[str]] = {}

  def __call__(self, event: str, problem: Problem, turn=None) -> None:
    if event in ("concluded", "refined"):
      self._said.setdefault(problem.id, []).append(problem.conclusion.text)

  def nodes(self, tree: Tree, arithmetic: Arithmetic) -> list[dict[str, Any]]:
    """What became of each problem of a finished tree.

    Returns:
      `id`, `statement`, `state`, `answer`, `well_split` (whether it was split as it is built),
      `said` (its conclusions in turn), and `right` (of each, whether it is the operator's result
      on what its parts came to; all False if it was not well split).
    """
    return [self._node(tree, problem, arithmetic) for problem in tree.problems.values()]

  def _node(self, tree: Tree, problem: Problem, arithmetic: Arithmetic) -> dict[str, Any]:
    said = self._said.get(problem.id, [])
    children = tree.children(problem)
    want = _operator_of(problem.statement, children, arithmetic)
    return {
      "id": problem.id, "statement": problem.statement, "state": problem.state,
      "answer": problem.conclusion.answer if problem.conclusion else None, "said": said,
      "well_split": want is not None, "right": [text == want for text in said]}


def _operator_of(statement: str, children, arithmetic: Arithmetic) -> str | None:
  """What a problem's conclusion should be, given its parts'; None if the parts are not its own."""
  try:
    left, sign, right = expressions.sides(statement)
    if children:
      if [child.statement for child in children] != [left, right]:
        return None
      left, right = (child.conclusion.answer for child in children)
    return arithmetic.one(left, sign, right)
  except (ValueError, TypeError, AttributeError):  # a part without a number for an answer
    return None


def verdicts(node: Mapping[str, Any]) -> Iterator[tuple[bool, bool]]:
  """Of each verdict on a problem's conclusions whether that was right, and whether it passed."""
  for i, right in enumerate(node["right"]):
    if i < len(node["right"]) - 1:
      yield right, False
    elif node["state"] == "verified":
      yield right, True
