"""A trained MetaLM finetuned on one task or several: tasks, rows, train, evaluate, report.

The whole input is a span that the encoder reads, the answer is words (arXiv:2206.06336, sections
2.4 and 3.2 to 3.4). With the decoder frozen, only the encoder and its connector learn.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import optax

from lmops_jax.config.setting_types import NonEmpty, PositiveInt, Seed, component
from lmops_jax.data import task_sets
from lmops_jax.data.spans import NoSpans
from lmops_jax.data.task_records import TaskClusters, listing_options
from lmops_jax.data.tasks import Task
from lmops_jax.data.tasks.choice import TaskChoice, checked, read_task
from lmops_jax.evaluation.over_seeds import share, shares_of
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.universal import UniversalConfig, UniversalLM
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.sizing.universal import RowShape
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan, prompts, training
from lmops_jax.systems.metalm.arms import Arm, sized
from lmops_jax.systems.metalm.evaluate import RESULTS_FILE, Asking
from lmops_jax.systems.metalm.report import drawn
from lmops_jax.systems.metalm.starts import FinishedRun
from lmops_jax.training import language_models
from lmops_jax.training.metrics import read_records
from lmops_jax.training.sources import Endless

ROWS, TRAIN, EVALUATE, REPORT = "rows", "train", "evaluate", "report"
_MOMENTS = ("before", "after")


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class TaskTuning(plan.Planned):
  """Finetunes a trained model on tasks, and asks it before and after.

  Attributes:
    start: the run that has trained the model, such as `@metalm.FinishedRun()`.
    model: decoder and reader, with the settings that they were trained with.
    records: what is learned, `@data.TaskClusters()` of `@data.TaskRecords()`, or of
      `@data.ImageJsonl()` with prompts and completions; each example comes equally often.
    tasks: what is asked; those without options cannot be.
    optimizer: an optax transformation; with `{'text/.*': None, '.*': ...}` as the rules of
      `@optim.partition()` the decoder is frozen.
    num_steps: optimizer steps.
    batch_size: rows of a batch, each of one example or, packed, of several.
    accumulate: micro-batches of a step.
    length: predicted positions of a row; longer examples are cut at the front of their input.
    pack: put several examples into a row.
    list_options: ask with the options in the prompt, as `data.TaskRecords.list_options` learns.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    seed: of the order.

  Raises:
    ValueError: for a model without a reader, rows longer than the decoder's positions, two tasks of
      one name, or a batch that does not split.
  """

  start: FinishedRun
  model: UniversalConfig
  records: TaskClusters
  tasks: Annotated[Sequence[TaskChoice], NonEmpty]
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 32
  accumulate: PositiveInt = 1
  length: PositiveInt = 256
  pack: bool = False
  list_options: bool = False
  checkpoint_every: PositiveInt | None = 500
  seed: Seed = 0

  name = "metalm_task_tuning"

  def __post_init__(self):
    if self.model.reader is None:
      raise ValueError(
        "metalm.TaskTuning.model has no reader; dock one with models.UniversalConfig.reader.")
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"metalm.TaskTuning.batch_size={self.batch_size} is not a multiple of accumulate="
        f"{self.accumulate}; choose one that divides it."
      )
    language_models.check_length(self.model.text, self.length)
    names = [task.name for task in self.tasks]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(
          f"metalm.TaskTuning.tasks has {name!r} twice; give one of them another "
          "tasks.choose.label."
        )

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system.

    Raises:
      ValueError: for a start that is not finished, or another model.
    """
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    self.start.check(self.model)
    asked = [checked(task.stage(f"tasks[{i}]"), self._check, "start", "model", "list_options")
             for i, task in enumerate(self.tasks)]
    of_tasks = tuple(stage.name for stage in asked)
    inputs = (*of_tasks, ROWS, TRAIN, EVALUATE)
    return [
      *asked,
      skeleton.Stage(
        ROWS, self._rows, reads=("records", "start", "model.reader", "length", "pack"),
        together=False),
      skeleton.Stage(
        TRAIN, functools.partial(self._train, partitioner=partitioner), inputs=(ROWS,),
        reads=("start", "model", "optimizer", "num_steps", "batch_size", "accumulate",
               "checkpoint_every", "seed")),
      skeleton.Stage(
        EVALUATE, functools.partial(self._evaluate, partitioner=partitioner),
        inputs=(*of_tasks, TRAIN), reads=("start", "model", "num_steps", "list_options", "tasks")),
      skeleton.Stage(
        REPORT, functools.partial(self._report, stages=inputs), inputs=inputs,
        reads=("start", "num_steps"), together=False)]

  @property
  def _shape(self) -> RowShape:
    return RowShape(self.length, encoder_length=self.length)

  def planned(self) -> plan.Step:
    """See `plan.Planned`; the start is read if the model lacks the size of its vocabulary."""
    size = self.model.vocab_size
    config = sized(self.model, self.start.vocabulary.vocab_size if size is None else size)
    return plan.Step(
      config, self.optimizer, self.num_steps, self.batch_size, self.accumulate,
      {"": plan.Part(self._shape, packed=True)},
      lambda partitioner: training.learner(
        UniversalLM(config), self.optimizer, self.accumulate, partitioner),
      "metalm.TaskTuning")

  @property
  def _arm(self) -> Arm:
    return Arm(sized(self.model, self.start.vocabulary.vocab_size), NoSpans())

  def _asked(self, task: Task) -> Task:
    return listing_options(task) if self.list_options else task

  def _check(self, task: Task) -> None:
    """Raises ValueError for a task that the model cannot be asked."""
    task.require_text()
    if not all(row.options and not row.prompts for row in task.rows):
      raise ValueError(
        f"the task {task.name} has rows without options, or with a prompt for each of them, and "
        "metalm.TaskTuning asks for one of several answers to one prompt; take a task or flavour "
        "with options, or leave it out of metalm.TaskTuning.tasks."
      )
    rows, vocabulary = self._asked(task).rows, self.start.vocabulary
    positions = self.model.reader.encoder.trunk.max_length
    for row, example in zip(rows, prompts.asked(rows, vocabulary)):
      longest = max(map(len, vocabulary.encode_batch(row.options)))
      most = min(self.model.text.max_length + 1 - longest, positions)
      if len(example.tokens) > most:
        raise ValueError(
          f"{example.where} {task.name} has a prompt of {len(example.tokens)} tokens with its start"
          f", and the model takes {most} before an answer; leave such rows out, or start from a "
          "model of more positions (models.TransformerConfig.max_length)."
        )

  def _rows(self, context: pipeline.StageContext) -> None:
    vocabulary = self.start.vocabulary
    counts = task_sets.write_tasks(
      context.directory, self.records.learned(), vocabulary, vocabulary, self.length,
      encoder_positions=self.model.reader.encoder.trunk.max_length, pack=self.pack, too_long="cut")
    context.extra["counts"] = counts
    for name, of in counts.items():
      context.log(f"{name}: " + ", ".join(f"{num} {what}" for what, num in of.items()))

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    arm = self._arm
    sets = task_sets.open_tasks(context.input(ROWS), self.records.learned())
    result = training.run(
      context, arm.model, self.optimizer, self.num_steps, self.accumulate, self.checkpoint_every,
      self.seed, functools.partial(self.start.params, arm.model, partitioner), partitioner,
      Endless(task_sets.mixed(sets, self.seed).batch, self.batch_size))
    context.flops += result.step * training.step_flops(
      arm.model, self.optimizer, self.batch_size, self._shape)
    context.extra["num_params"] = sum(x.size for x in jax.tree.leaves(result.state.params))

  def _evaluate(self, context: pipeline.StageContext, partitioner) -> None:
    """Writes `results.json`: by task and moment what `Asking.counted` gives."""
    arm = self._arm
    tuned = functools.partial(
      language_models.load_params, context.input(TRAIN), self.num_steps, arm.model, partitioner)
    loads = (functools.partial(self.start.params, arm.model, partitioner), tuned)
    results: dict[str, dict[str, Any]] = {task.name: {} for task in self.tasks}
    with context.progress(len(loads) * len(results), "tasks") as bar:
      for moment, load in zip(_MOMENTS, loads):
        asking = Asking(arm, load(), self.start.vocabulary, partitioner)
        for name in results:
          task = self._asked(read_task(context.input(f"task/{name}")))
          results[name][moment] = asking.counted(task, 0, 0)
          bar.update()
    write_json(context.directory / RESULTS_FILE, results)

  def _report(self, context: pipeline.StageContext, stages) -> None:
    report = RunReport(context, stages)
    results = json.loads((context.input(EVALUATE) / RESULTS_FILE).read_text())
    accuracy = {
      name: {moment: shares_of([(of[moment]["right"], of[moment]["num"])]) for moment in _MOMENTS}
      for name, of in results.items()}
    records = [record for record in read_records(context.input(TRAIN) / "metrics.jsonl")
               if "loss" in record]
    curve = plots.curves(
      {"training": [plots.Run([r["step"] for r in records], [r["loss"] for r in records])]},
      x_label="optimizer steps", y_label="loss (nats a learned token)")
    counts = context.manifest(ROWS)["extra"]["counts"]
    means = {moment: float(np.mean([of[moment]["mean"] for of in accuracy.values()]))
             for moment in _MOMENTS}
    excerpts = [
      drawn(rows.batch([0]), self.start.vocabulary, name)
      for name, rows in task_sets.open_tasks(context.input(ROWS), list(counts)[:1]).items()]
    kinds = sorted({kind for of in counts.values() for kind in of})
    report.write(
      {"accuracy": accuracy, "mean_accuracy": means, "train_loss": records[-1]["loss"],
       "num_steps": records[-1]["step"], "num_params": context.manifest(TRAIN)["extra"][
         "num_params"], "rows": counts, "stages": report.costs},
      html.Report(
        title="MetaLM: a task finetuned",
        lead=f"Before finetuning {means['before']:.1%} of the answers are right, and after "
             f"{records[-1]['step']} steps {means['after']:.1%}, mean of {len(accuracy)} task(s).",
        key_figures=[
          html.KeyFigure(f"{100 * means['after']:.1f}", "percent right", "mean of tasks"),
          report.work_figure()],
        sections=[
          html.Section("Accuracy", tables=[html.Table(
            ["task", *_MOMENTS], [
              [name, *(share(of[moment]) for moment in _MOMENTS)]
              for name, of in accuracy.items()],
            note="Percent with Wilson's 95% interval.")]),
          html.Section("Loss", figures=[report.figure("loss", curve, "Loss by step.")]),
          html.Section(
            "What the encoder reads", "Marked spans reach the decoder as vectors.",
            tables=[html.Table(
              ["learned", *(html.Column(kind.replace("_", " "), ",d") for kind in kinds)],
              [[name, *(of.get(kind, 0) for kind in kinds)] for name, of in counts.items()])],
            excerpts=excerpts),
          report.cost_section()],
        facts={"work": report.work, "versions": report.versions}),
      required=["accuracy.*.before.mean", "accuracy.*.after.mean", "stages[].seconds"])

  def table(self, summary: Mapping[str, Any]) -> str:
    """A line for each task, before and after."""
    return text_table([["", *_MOMENTS], *(
      [name, *(share(of[moment]) for moment in _MOMENTS)]
      for name, of in summary["accuracy"].items())])
