"""The embedded default as stages: problems, train by seed, solve by arm and seed, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from lmops_jax.config.setting_types import Seeds, component
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.socratic import arms, learning, study_report
from lmops_jax.systems.socratic.skills import Arithmetic

PROBLEMS = "problems"


@component(module="socratic")
@dataclasses.dataclass(frozen=True)
class Study:
  """A small solver learns the engine's skills, and every arm has the same tokens for a problem.

  Attributes:
    arithmetic: the expressions.
    learning: the solver, and how it is trained.
    solving: what it is asked, and how.
    seeds: of the solver's initial numbers and rows.

  Raises:
    ValueError: if the engine's longest request does not fit the model with its reply.
  """

  arithmetic: Arithmetic
  learning: learning.Learning
  solving: arms.Solving
  seeds: Seeds = (0, 1)

  name = "socratic"

  def __post_init__(self):
    longest, window = self.arithmetic.longest_request, self.learning.model.max_length
    if longest + self.solving.reply_tokens > window:
      raise ValueError(
        f"the engine's longest request has {longest} characters, and with socratic.Solving."
        f"reply_tokens={self.solving.reply_tokens} more it does not fit models.TransformerConfig."
        f"max_length={window}; raise that, or lower socratic.Arithmetic.levels.")

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.learning.model.attention, partitioner.platform)
    bound = {"partitioner": partitioner}
    asked, solvers = ("arithmetic", "solving"), arms.Solvers(partitioner)
    stages = [skeleton.Stage(PROBLEMS, self._problems, reads=asked, together=False)]
    for seed in self.seeds:
      train, checked = f"train/seed{seed}", study_report.stage_of(arms.CHECKED, seed)
      stages.append(skeleton.Stage(
        train, functools.partial(self._train, seed=seed, **bound), inputs=(PROBLEMS,), seed=seed,
        reads=("arithmetic", "learning"), result="solver" if seed == self.seeds[0] else ""))
      for arm in arms.ARMS:
        before = () if arm == arms.CHECKED else (checked,)
        stages.append(skeleton.Stage(
          study_report.stage_of(arm, seed),
          functools.partial(
            self._solve, arm=arm, train=train, before=before, solvers=solvers),
          inputs=(PROBLEMS, train, *before), reads=asked))
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report", functools.partial(self._report, seeds=self.seeds, stages=names), inputs=names,
      reads=asked, together=False))
    return stages

  def _problems(self, context: pipeline.StageContext) -> None:
    arms.write_problems(context, self.solving, self.arithmetic)

  def _train(self, context: pipeline.StageContext, seed, partitioner) -> None:
    held_out = {one.statement for one in arms.read_problems(context.input(PROBLEMS))
                if one.levels > 1}  # of single operators there are too few to hold any out
    learning.run(context, self.learning, self.arithmetic, held_out, seed, partitioner)

  def _solve(self, context: pipeline.StageContext, arm, train, before, solvers) -> None:
    budgets = None
    if arm not in (arms.CHECKED, arms.GREEDY):
      budgets = [row["tokens"] for row in arms.read_rows(context.input(before[0]))]
    arms.run(
      context, self.solving, self.arithmetic, arm, arms.read_problems(context.input(PROBLEMS)),
      solvers.of(context.input(train)), budgets)

  def _report(self, context: pipeline.StageContext, seeds, stages) -> None:
    study_report.run(
      context, seeds, stages, rounds=self.solving.rounds,
      modulus=self.arithmetic.modulus)

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return study_report.table(summary)
