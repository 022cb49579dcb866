"""Kosmos-2 as stages: scenes, vision, train/<arm>/seed<k>, evaluate/<arm>/seed<k>, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types as at

from lmops_jax.config.setting_types import Distinct, NonEmpty, Seeds, component
from lmops_jax.data.image_tokens import special_words
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.docked import DockedConfig
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.kosmos import plan, prepare, tower, training
from lmops_jax.systems.kosmos.evaluate import Evaluate
from lmops_jax.systems.kosmos.grounding import evaluate, report
from lmops_jax.systems.kosmos.grounding.world import sources, weights
from lmops_jax.systems.kosmos.world import World
from lmops_jax.text.vocabulary_sources import VocabularySource


class GroundingArm(NamedTuple):
  """What a model is given.

  Attributes:
    arm: its pictures.
    located: whether half of its pairs have boxes; else they are the same texts without.
  """

  arm: training.Arm
  located: bool


GROUNDED = "grounded"
ARMS: Mapping[str, GroundingArm] = {
  GROUNDED: GroundingArm(training.ARMS["full"], True),
  "plain": GroundingArm(training.ARMS["full"], False),
  "blind": GroundingArm(training.ARMS["blind"], True),
}


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Grounding:
  """Teaches a small model to say where things are, and asks it and its baselines.

  Attributes:
    world: pictures and texts.
    vocabulary: a vocabulary of module `data`, to which special tokens and cells are added.
    model: of the docked language model; its vocabulary size comes from the vocabulary.
    tower, training, evaluation: settings of the stages.
    grid: cells in a row and in a column (Kosmos-2: 32).
    arms: "grounded", half of whose pairs have boxes; "plain", the same pairs without; "blind", with
      boxes and black pictures. The first is among them.
    seeds: of initialisation and order; the tower has the first.

  Raises:
    ValueError: pictures of another size than the tower's, or rows longer than the model's.
  """

  world: World
  vocabulary: VocabularySource
  model: DockedConfig
  tower: tower.TowerTraining
  training: training.Training
  evaluation: Evaluate
  grid: Annotated[int, at.Ge(2), at.Le(99)] = 12
  arms: Annotated[Sequence[Literal[tuple(ARMS)]], NonEmpty, Distinct] = tuple(ARMS)
  seeds: Seeds = (0, 1)

  name = "kosmos_grounding"

  def __post_init__(self):
    training.check_sizes(self.model, self.training, {
      name: getattr(self.world, name).side for name in ("scenes", "rendered")})
    if GROUNDED not in self.arms:
      raise ValueError(
        f"kosmos.Grounding.arms={tuple(self.arms)} must hold {GROUNDED!r}, which the others are "
        "compared with."
      )

  @property
  def words(self) -> tuple[str, ...]:
    """The special tokens, which follow those of the vocabulary."""
    return special_words(self.grid)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    stages = [
      skeleton.Stage(
        prepare.STAGE, self._prepare, together=False,
        reads=("world", "vocabulary", "model.connector", "grid", *(
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
    runs: dict[tuple[str, int], tuple[str, str]] = {}
    for seed in self.seeds:
      for arm in self.arms:
        train, asked = (f"{stage}/{arm}/seed{seed}" for stage in ("train", "evaluate"))
        runs[arm, seed] = train, asked
        stages += [
          skeleton.Stage(
            train, functools.partial(self._train, arm=arm, seed=seed, partitioner=partitioner),
            inputs=(prepare.STAGE, tower.STAGE), reads=("training", "model", "grid"), seed=seed,
          ),
          skeleton.Stage(
            asked,
            functools.partial(self._evaluate, arm=arm, stage=train, partitioner=partitioner),
            inputs=(prepare.STAGE, train), reads=("evaluation", "world", "grid"),
          ),
        ]
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report", functools.partial(self._report, runs=runs, stages=names), inputs=names,
      reads=("world", "grid"), together=False))
    return stages

  def _prepare(self, context: pipeline.StageContext) -> None:
    prepare.write_sources(
      context, sources(self.world), self.vocabulary, self.training.shapes,
      self.model.vectors_per_image, grid=self.grid)

  def _teach(self, context: pipeline.StageContext, init_seed, partitioner) -> None:
    tower.run(
      context, config=self.tower, vision=self.model.vision, scenes=self.world.scenes,
      rendered=self.world.rendered, seed=self.world.train_seed, init_seed=init_seed,
      num_tested=self.world.num_items, partitioner=partitioner)

  def _train(self, context: pipeline.StageContext, arm, seed, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    given, config = ARMS[arm], self.training
    docked = training.docked_model(self.model, prepared.ids.vocab_size)
    of_sources = weights(given.located)
    training.run(
      context, config=config, docked=docked, arm=given.arm, seed=seed, partitioner=partitioner,
      source=prepared.groups(
        config.shapes, of_sources, self.model.vision.image_size, config.num_groups, seed),
      vocabulary=prepared.vocabulary, words=self.words,
      tower=lambda: tower.load(
        context.input(tower.STAGE), self.tower.num_steps, self.model.vision, partitioner),
      hooks=[training.validation(
        docked, prepared, of_sources, given.arm, config.eval_every, partitioner)])

  def _evaluate(self, context: pipeline.StageContext, arm, stage, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    model = training.docked_model(self.model, prepared.ids.vocab_size)
    params = training.load(context.input(stage), self.training, model, partitioner)
    evaluate.run(
      context, config=self.evaluation, model=model, params=params, prepared=prepared,
      world=self.world, grid=self.grid, arm=ARMS[arm].arm, partitioner=partitioner)

  def _report(self, context: pipeline.StageContext, runs, stages) -> None:
    report.run(context, runs=runs, stages=stages, world=self.world, grid=self.grid)

  def phases(self, partitioner, memory, *, platform: str, **sizes):
    """What training an arm takes, from shapes alone; see `plan.phase`."""
    return [plan.phase(
      self.training, self.model, self.vocabulary, partitioner, platform, self.words)]

  def programs(self, partitioner, memory, **sizes):
    """The training step, to compile ahead of time."""
    return [plan.program(self.training, self.model, self.vocabulary, partitioner, self.words)]

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
