"""Kosmos-1 as stages: scenes, vision, train/<arm>/seed<k>, evaluate/<arm>/seed<k>, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from lmops_jax.config.setting_types import Distinct, NonEmpty, Seeds, component
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.docked import DockedConfig
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.kosmos import evaluate, plan, prepare, report, tower, training
from lmops_jax.systems.kosmos.world import World
from lmops_jax.text.vocabulary_sources import VocabularySource


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Kosmos:
  """Teaches a small model to see, and asks it and its baselines.

  Attributes:
    world: pictures and texts.
    vocabulary: a vocabulary of module `data`, to which special tokens are added.
    model: of the docked language model; its vocabulary size comes from the vocabulary.
    tower, training, evaluation: settings of the stages.
    arms: see `kosmos.training`; "full" is among them.
    seeds: of initialisation and order; the tower has the first.

  Raises:
    ValueError: pictures of another size than the tower's, or rows longer than the model's.
  """

  world: World
  vocabulary: VocabularySource
  model: DockedConfig
  tower: tower.TowerTraining
  training: training.Training
  evaluation: evaluate.Evaluate
  arms: Annotated[Sequence[Literal[tuple(training.ARMS)]], NonEmpty, Distinct] = tuple(
    training.ARMS)
  seeds: Seeds = (0, 1)

  name = "kosmos"

  def __post_init__(self):
    size, text = self.model.vision.image_size, self.model.text
    for name in ("scenes", "rendered", "matrices"):
      side = getattr(self.world, name).side
      if side != size:
        raise ValueError(
          f"kosmos.World.{name} draws pictures of side={side} and models.VisionConfig.image_size "
          f"is {size}; give both one size."
        )
    if training.FULL not in self.arms:
      raise ValueError(
        f"kosmos.Kosmos.arms={tuple(self.arms)} must hold {training.FULL!r}, which the others are "
        "compared with."
      )
    longest = max(shape.length for shape in self.training.shapes.values())
    if longest > text.max_length:
      raise ValueError(
        f"a row of kosmos.Training has length={longest} and models.TransformerConfig.max_length is "
        f"{text.max_length}; raise the latter."
      )
    if not text.causal:
      raise ValueError("kosmos.Kosmos.model.text must have causal=True: it predicts next tokens.")

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    stages = [
      skeleton.Stage(
        prepare.STAGE, self._prepare, together=False,
        reads=("world", "vocabulary", "model.connector", *(
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
            inputs=(prepare.STAGE, tower.STAGE), reads=("training", "model"), seed=seed,
          ),
          skeleton.Stage(
            asked,
            functools.partial(self._evaluate, arm=arm, stage=train, partitioner=partitioner),
            inputs=(prepare.STAGE, train), reads=("evaluation",),
          ),
        ]
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report", functools.partial(report.run, runs=runs, stages=names), inputs=names,
      together=False))
    return stages

  def _prepare(self, context: pipeline.StageContext) -> None:
    prepare.run(
      context, self.world, self.vocabulary, self.training.shapes, self.model.vectors_per_image)

  def _teach(self, context: pipeline.StageContext, init_seed, partitioner) -> None:
    tower.run(
      context, config=self.tower, vision=self.model.vision, scenes=self.world.scenes,
      rendered=self.world.rendered, seed=self.world.train_seed, init_seed=init_seed,
      num_tested=self.world.num_items, partitioner=partitioner)

  def _train(self, context: pipeline.StageContext, arm, seed, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    given, config = training.ARMS[arm], self.training
    docked = training.docked_model(self.model, prepared.ids.vocab_size)
    training.run(
      context, config=config, docked=docked, arm=given, seed=seed, partitioner=partitioner,
      source=prepared.groups(
        {part: config.shapes[part] for part in given.parts}, self.model.vision.image_size,
        config.num_groups, seed),
      vocabulary=prepared.vocabulary,
      tower=lambda: tower.load(
        context.input(tower.STAGE), self.tower.num_steps, self.model.vision, partitioner),
      hooks=[training.validation(docked, prepared, given, config.eval_every, partitioner)])

  def _evaluate(self, context: pipeline.StageContext, arm, stage, partitioner) -> None:
    prepared = prepare.Prepared(context.input(prepare.STAGE))
    model = training.docked_model(self.model, prepared.ids.vocab_size)
    params = training.load(context.input(stage), self.training, model, partitioner)
    evaluate.run(
      context, config=self.evaluation, model=model, params=params, prepared=prepared,
      arm=training.ARMS[arm], partitioner=partitioner)

  def phases(self, partitioner, memory, *, platform: str, **sizes):
    """What training the full model takes, from shapes alone; see `plan.phase`."""
    return [plan.phase(self.training, self.model, self.vocabulary, partitioner, platform)]

  def programs(self, partitioner, memory, **sizes):
    """The step of the full model, to compile ahead of time."""
    return [plan.program(self.training, self.model, self.vocabulary, partitioner)]

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
