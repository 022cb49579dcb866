"""The meta-optimizer study as stages: a study for each task and seed, and the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax

from lmops_jax.config.setting_types import NonEmpty, Seeds, component
from lmops_jax.data.tasks import Task, TaskSource, checked, read_task
from lmops_jax.mesh import meshes
from lmops_jax.shared_stages.small_model import ModelSource
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.meta_optimizer import report
from lmops_jax.systems.meta_optimizer.settings import Study
from lmops_jax.systems.meta_optimizer.study import check_rows, num_rows, run_study


@component(module="meta_optimizer")
@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Compares learning in context with finetuning on the demonstrations.

  Attributes:
    model: `@pretrained.choose()`.
    tasks: `[@tasks.choose()]`, each with a name of its own; of label words.
    study: settings of the studies.
    report: settings of the report.
    seeds: of the demonstrations.

  Raises:
    ValueError: no task or seed, a name or seed twice, or an encoder.
  """

  model: ModelSource
  tasks: Annotated[Sequence[TaskSource], NonEmpty]
  study: Study
  report: report.Report
  seeds: Seeds = (0, 1, 2)

  name = "meta_optimizer"

  def __post_init__(self):
    names = [task.name for task in self.tasks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
      raise ValueError(
        f"meta_optimizer.Pipeline.tasks has the name {twice[0]!r} twice; give each a name of its "
        "own."
      )
    if not getattr(self.model.config, "causal", False):
      raise ValueError(
        "meta_optimizer.Pipeline.model does not predict the next token; take a decoder."
      )

  def _check(self, task: Task) -> None:
    task.require_text()
    check_rows(task, self.study)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    if jax.process_count() > 1:
      raise ValueError(
        f"this job has {jax.process_count()} processes, and a study runs in one; start it once."
      )
    one = meshes.single_device()  # a study runs on one device
    readings = [
      checked(task.stage(f"tasks[{i}]"), self._check, "study") for i, task in enumerate(self.tasks)]
    of_model = self.model.stages("model", partitioner or one)
    before = tuple(stage.name for stage in of_model)
    stages = [*readings, *of_model]  # what the tasks are too small for is told first
    runs = {}
    for task, reading in zip(self.tasks, readings, strict=True):
      for seed in self.seeds:
        name = f"study/{task.name}/seed{seed}"
        runs[task.name, seed] = name
        stages.append(skeleton.Stage(
          name, functools.partial(self._study, task=reading.name, before=before, seed=seed),
          inputs=(reading.name, *before), reads=(*self.model.reads("model"), "study"), seed=seed))
    stages.append(skeleton.Stage(
      "report", functools.partial(report.run, config=self.report, runs=runs),
      inputs=tuple(runs.values()), reads=("report",)))
    return stages

  def _study(self, context: pipeline.StageContext, task, before, seed: int) -> None:
    source = self.model.opened(*(context.input(name) for name in before))
    loaded = read_task(context.input(task))
    with context.progress(num_rows(loaded, self.study), "rows") as bar:
      results = run_study(
        source.model, source.params(), source.tokenizer(), loaded, self.study, seed, context.log,
        bar.update)
    results.save(context.directory)
    context.flops += results.summary["flops"]

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
