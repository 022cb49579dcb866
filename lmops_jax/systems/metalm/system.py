"""MetaLM as stages: texts, tasks, encoder, train, finetune and evaluate by arm, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from lmops_jax.config.setting_types import Distinct, NonEmpty, Seeds, component
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.sizing.vocabulary import vocabulary_size
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import (
  evaluate,
  plan,
  prompts,
  reader,
  report,
  starts,
  tasks,
  texts,
  training,
)
from lmops_jax.systems.metalm.arms import ARMS, SEMI, Arm, Models, sized_encoder
from lmops_jax.systems.metalm.texts import Prepared
from lmops_jax.training import language_models

REPORT = "report"


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class MetaLM(plan.Planned):
  """Trains small models by several objectives, finetunes them, and asks them.

  Attributes:
    texts, tasks: what is read and what is asked.
    models: what the arms are made of.
    reader: where the encoder comes from before it is docked: training of its own or a published
      one.
    training, finetune, evaluation: settings of the stages.
    arms: see `metalm.arms`.
    seeds: of initialisation and order; the encoder has the first.

  Raises:
    ValueError: for rows that do not fit the models.
  """

  texts: texts.Texts
  tasks: tasks.Tasks
  models: Models
  reader: starts.ReaderStart
  training: training.Training
  finetune: training.Finetune
  evaluation: evaluate.Evaluate
  arms: Annotated[Sequence[Literal[ARMS]], NonEmpty, Distinct] = ARMS
  seeds: Seeds = (0, 1)

  name = "metalm"

  def __post_init__(self):
    self.reader.check(self.models.docked.reader.encoder)
    for length in (self.texts.length, self.finetune.length):
      for config in (self.models.docked.text, self.models.large, self._trunk):
        language_models.check_length(config, length)

  @property
  def _trunk(self):
    return self.models.docked.reader.encoder.trunk

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    for config in (self.models.docked.text, self.models.large, self._trunk):
      attention.check_platform(config.attention, partitioner.platform)
    stages = [
      skeleton.Stage(texts.STAGE, self._texts, reads=("texts",), together=False),
      skeleton.Stage(
        tasks.STAGE, self._tasks, inputs=(texts.STAGE,), reads=("tasks",), together=False),
      skeleton.Stage(
        reader.STAGE,
        functools.partial(self._reader, seed=self.seeds[0], partitioner=partitioner),
        inputs=(texts.STAGE,), reads=("reader", "models.docked.reader"), seed=self.seeds[0]),
    ]
    runs: dict[tuple[str, int], report.Run] = {}
    for seed in self.seeds:
      for name in self.arms:
        own, runs[name, seed] = self._of_arm(name, seed, partitioner)
        stages += own
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      REPORT,
      functools.partial(self._report, runs=runs, stages=names), inputs=names, together=False,
      reads=("models.docked", "models.prefix", "models.spans", "models.large")))
    return stages

  def _of_arm(self, name: str, seed: int, partitioner) -> tuple[list[skeleton.Stage], report.Run]:
    """The stages of an arm and a seed."""
    run = report.Run(
      f"train/{name}/seed{seed}", f"evaluate/{name}/seed{seed}",
      {mode: f"finetune/{name}/{mode}/seed{seed}"
       for mode in self.finetune.modes(self._arm(name))})
    bound = {"arm": name, "partitioner": partitioner}
    stages = [skeleton.Stage(
      run.train, functools.partial(self._train, seed=seed, **bound),
      inputs=(texts.STAGE, reader.STAGE), reads=("training", "models"), seed=seed)]
    stages += [
      skeleton.Stage(
        stage, functools.partial(self._finetune, mode=mode, run=run, seed=seed, **bound),
        inputs=(texts.STAGE, tasks.STAGE, run.train), reads=("finetune",), seed=seed)
      for mode, stage in run.finetune.items()]
    stages.append(skeleton.Stage(
      run.evaluate, functools.partial(self._evaluate, run=run, **bound),
      inputs=(texts.STAGE, tasks.STAGE, run.train, *run.finetune.values()),
      reads=("evaluation",)))
    return stages, run

  def _arm(self, name: str, vocab_size: int | None = None) -> Arm:
    return self.models.arm(name, vocab_size)

  def _texts(self, context: pipeline.StageContext) -> None:
    texts.run(context, self.texts)

  def _tasks(self, context: pipeline.StageContext) -> None:
    tasks.run(context, Prepared(context.input(texts.STAGE)).unseen, self.tasks)

  def _reader(self, context: pipeline.StageContext, seed, partitioner) -> None:
    prepared = Prepared(context.input(texts.STAGE))
    encoder = sized_encoder(self.models.docked.reader.encoder, prepared.vocabulary.vocab_size)
    self.reader.run(context, encoder, prepared, seed=seed, partitioner=partitioner)

  def _train(self, context: pipeline.StageContext, arm, seed, partitioner) -> None:
    prepared = Prepared(context.input(texts.STAGE))
    made = self._arm(arm, prepared.vocabulary.vocab_size)
    training.train(
      context, self.training, made, prepared.train, prepared.validation, seed=seed,
      reader=functools.partial(
        self.reader.load, context.input(reader.STAGE), made.config.reader.encoder,
        prepared.vocabulary, partitioner) if made.reads_spans else None,
      partitioner=partitioner)

  def _finetune(self, context: pipeline.StageContext, arm, mode, run, seed, partitioner) -> None:
    prepared = Prepared(context.input(texts.STAGE))
    made = self._arm(arm, prepared.vocabulary.vocab_size)
    rows = prompts.tuning_rows(
      [row for name in tasks.TUNED for row in tasks.read(context.input(tasks.STAGE), name).train],
      prepared.vocabulary, self.finetune.length, self._trunk.max_length)
    training.finetune(
      context, self.finetune, made,
      lambda: self._params(context, run.train, self.training, made, partitioner), rows, mode,
      seed=seed, partitioner=partitioner)

  def _evaluate(self, context: pipeline.StageContext, arm, run, partitioner) -> None:
    prepared = Prepared(context.input(texts.STAGE))
    made = self._arm(arm, prepared.vocabulary.vocab_size)
    load = functools.partial(self._params, context, made=made, partitioner=partitioner)
    evaluate.run(
      context, config=self.evaluation, models=self.models, arm=made,
      params=load(run.train, self.training),
      tuned={mode: load(stage, self.finetune) for mode, stage in run.finetune.items()},
      prepared=prepared, tasks={
        task: tasks.read(context.input(tasks.STAGE), task) for task in tasks.NAMES},
      partitioner=partitioner)

  def _params(self, context, stage: str, config, made: Arm, partitioner):
    """The parameters that a stage left."""
    return language_models.load_params(
      context.input(stage), config.num_steps, made.model, partitioner)

  def _report(self, context: pipeline.StageContext, runs, stages) -> None:
    report.run(context, runs=runs, stages=stages, models=self.models)

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)

  def planned(self) -> plan.Step:
    """The step of the arm semi_causal; see `plan.Planned`."""
    size = vocabulary_size(
      self.models.docked.vocab_size, self.texts.vocabulary,
      "text/models.TransformerConfig.vocab_size=64000")
    return plan.of_arm(self.training, self._arm(SEMI, size), self.texts.length)
