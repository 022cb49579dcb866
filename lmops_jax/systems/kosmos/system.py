"""Kosmos-1 as stages: scenes, vision, train/<arm>/seed<k>, evaluate/<arm>/seed<k>, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from lmops_jax.config.setting_types import Distinct, NonEmpty, Seeds, component
from lmops_jax.data.image_tokens import KOSMOS_WORDS
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos import evaluate, prepare, report, study, training
from lmops_jax.systems.kosmos.world import weights


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Kosmos(study.Study):
  """Teaches a small model to see, and asks it and its baselines.

  Attributes:
    world: pictures and texts.
    vocabulary: a vocabulary of module `data`, to which special tokens are added.
    model: of the docked language model; its vocabulary size comes from the vocabulary.
    tower, training, evaluation: settings of the stages.
    arms: see `kosmos.training`; "full" is among them.
    seeds: of initialisation and order; the tower has the first.

  Raises:
    ValueError: see `training.check_sizes`; or arms without "full".
  """

  arms: Annotated[Sequence[Literal[tuple(training.ARMS)]], NonEmpty, Distinct] = tuple(
    training.ARMS)
  seeds: Seeds = (0, 1)

  name = "kosmos"

  def __post_init__(self):
    training.check_sizes(self.model, self.training.shapes, {
      name: getattr(self.world, name).side for name in ("scenes", "rendered", "matrices")})
    if training.FULL not in self.arms:
      raise ValueError(
        f"kosmos.Kosmos.arms={tuple(self.arms)} must hold {training.FULL!r}, which the others are "
        "compared with."
      )

  @property
  def words(self) -> tuple[str, ...]:
    """The special tokens, which follow those of the vocabulary."""
    return KOSMOS_WORDS

  def given(self, arm: str) -> study.Given:
    """What an arm is given."""
    return study.Given(training.ARMS[arm], weights(self.world))

  def prepare(self, context: pipeline.StageContext) -> None:
    """Stage `scenes`."""
    prepare.run(
      context, self.world, self.vocabulary, self.training.shapes, self.model.vectors_per_image)

  def evaluate(self, context, model, params, prepared, arm, partitioner) -> None:
    """Stages `evaluate/<arm>/seed<k>`."""
    evaluate.run(
      context, config=self.evaluation, model=model, params=params, prepared=prepared, arm=arm,
      partitioner=partitioner)

  def report(self, context, runs, stages) -> None:
    """Stage `report`."""
    report.run(context, runs=runs, stages=stages)

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
