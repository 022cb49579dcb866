"""What the two small studies share: stages scenes, vision, features, train and evaluate, report.

Training reads the features of a frozen tower, which are computed once for all arms and seeds; an
optimizer that trains the tower, or a tower with dropout, goes without that stage.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.kosmos import features, plan, prepare, tower, training
from lmops_jax.systems.kosmos.evaluate import Evaluate
from lmops_jax.systems.kosmos.world import Weights, World
from lmops_jax.text.vocabulary_sources import VocabularySource


class Given(NamedTuple):
  """What an arm is given.

  Attributes:
    arm: the parts of a group, and pictures.
    weights: of the parts' sources.
  """

  arm: training.Arm
  weights: Weights


class Reads(NamedTuple):
  """Settings that stages of a study read beside those of every study."""

  scenes: tuple[str, ...] = ()
  train: tuple[str, ...] = ()
  evaluate: tuple[str, ...] = ()
  report: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
  """Teaches a small model to see, arm by arm, and asks it; a subclass says what and how.

  A subclass has the fields `arms` and `seeds`, and `READS`.

  Attributes:
    world: pictures and texts.
    vocabulary: a vocabulary of module `data`, to which special tokens are added.
    model: of the docked language model; its vocabulary size comes from the vocabulary.
    tower, training, evaluation: settings of the stages.
  """

  world: World
  vocabulary: VocabularySource
  model: DockedConfig
  tower: tower.TowerTraining
  training: training.Training
  evaluation: Evaluate

  READS = Reads()

  @property
  def words(self) -> tuple[str, ...]:
    """The special tokens, which follow those of the vocabulary."""
    raise NotImplementedError

  def given(self, arm: str) -> Given:
    """What an arm is given."""
    raise NotImplementedError

  def prepare(self, context: pipeline.StageContext) -> None:
    """Stage `scenes`."""
    raise NotImplementedError

  def evaluate(
    self, context: pipeline.StageContext, model: DockedLM, params: Any,
    prepared: prepare.Prepared, arm: training.Arm, partitioner,
  ) -> None:
    """Stages `evaluate/<arm>/seed<k>`."""
    raise NotImplementedError

  def report(
    self, context: pipeline.StageContext, runs: Mapping[tuple[str, int], tuple[str, str]],
    stages: Sequence[str],
  ) -> None:
    """Stage `report`.

    Args:
      runs: (arm, seed) to the names of its stages train and evaluate.
      stages: all stages before this one.
    """
    raise NotImplementedError

  @functools.cached_property
  def encodes_once(self) -> bool:
    """Whether pictures are encoded once and for all, in the stage `features`."""
    return features.are_fixed(self.model, self.training.optimizer)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    stages = [
      skeleton.Stage(
        prepare.STAGE, self.prepare, together=False,
        reads=("world", "vocabulary", "model.connector", *self.READS.scenes, *(
          f"training.{part}" for part in self.training.shapes)),
        checks=("model",),
      ),
      skeleton.Stage(
        tower.STAGE,
        functools.partial(self._teach, init_seed=self.seeds[0], partitioner=partitioner),
        reads=("world.scenes", "world.rendered", "world.seed", "world.num_items", "tower",
               "model.vision"),
        seed=self.seeds[0],
      ),
    ]
    read_by_train = [prepare.STAGE, tower.STAGE]
    if self.encodes_once:
      read_by_train.append(features.STAGE)
      stages.append(skeleton.Stage(
        features.STAGE, functools.partial(self._encode, partitioner=partitioner),
        inputs=(prepare.STAGE, tower.STAGE),
        reads=("model.vision", "model.unit_features", "model.text.dtype"),
        checks=("model",),  # a part of the whole is applied, which the rest does not enter
      ))
    runs: dict[tuple[str, int], tuple[str, str]] = {}
    for seed in self.seeds:
      for arm in self.arms:
        train, asked = (f"{stage}/{arm}/seed{seed}" for stage in ("train", "evaluate"))
        runs[arm, seed] = train, asked
        stages += [
          skeleton.Stage(
            train, functools.partial(self._train, arm=arm, seed=seed, partitioner=partitioner),
            inputs=tuple(read_by_train),
            reads=("training", "model", *self.READS.train), seed=seed,
          ),
          skeleton.Stage(
            asked,
            functools.partial(self._evaluate, arm=arm, stage=train, partitioner=partitioner),
            inputs=(prepare.STAGE, train), reads=("evaluation", *self.READS.evaluate),
          ),
        ]
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report", functools.partial(self.report, runs=runs, stages=names), inputs=names,
      reads=self.READS.report, together=False))
    return stages

  def _teach(self, context: pipeline.StageContext, init_seed, partitioner) -> None:
    tower.run(
      context, config=self.tower, vision=self.model.vision, scenes=self.world.scenes,
      rendered=self.world.rendered, seed=self.world.train_seed, init_seed=init_seed,
      num_tested=self.world.num_items, partitioner=partitioner)

  def _taught(self, context: pipeline.StageContext, partitioner):
    return tower.load(
      context.input(tower.STAGE), self.tower.num_steps, self.model.vision, partitioner)

  def _encode(self, context: pipeline.StageContext, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    features.run(
      context, model=training.docked_model(self.model, prepared.ids.vocab_size),
      tower=self._taught(context, partitioner),
      rows=prepared.rows(self.model.vision.image_size), partitioner=partitioner)

  def _train(self, context: pipeline.StageContext, arm, seed, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    given, config = self.given(arm), self.training
    encoded = None
    if self.encodes_once:
      encoded = features.Features(context.input(features.STAGE), self.model.text.dtype)
    docked = training.docked_model(self.model, prepared.ids.vocab_size)
    training.run(
      context, config=config, docked=docked, arm=given.arm, seed=seed, partitioner=partitioner,
      source=prepared.groups(
        {part: config.shapes[part] for part in given.arm.parts}, given.weights,
        self.model.vision.image_size, config.num_groups, seed, encoded),
      vocabulary=prepared.vocabulary, words=self.words,
      tower=lambda: self._taught(context, partitioner), features=encoded,
      hooks=[training.validation(
        docked, prepared, given.weights, given.arm, config.eval_every, partitioner, encoded)])

  def _evaluate(self, context: pipeline.StageContext, arm, stage, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    model = training.docked_model(self.model, prepared.ids.vocab_size)
    params = training.load(context.input(stage), self.training, model, partitioner)
    self.evaluate(context, model, params, prepared, self.given(arm).arm, partitioner)

  def phases(self, partitioner, memory, *, platform: str, **sizes):
    """What training an arm with pictures takes, from shapes alone; see `plan.phase`."""
    return [plan.phase(
      self.training, self.model, self.vocabulary, partitioner, platform, words=self.words,
      encoded=self.encodes_once)]

  def programs(self, partitioner, memory, **sizes):
    """The step of such an arm, to compile ahead of time."""
    return [plan.program(
      self.training, self.model, self.vocabulary, partitioner, words=self.words,
      encoded=self.encodes_once)]
