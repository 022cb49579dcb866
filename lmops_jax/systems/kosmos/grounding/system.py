"""Kosmos-2 as stages: scenes, vision, train/<arm>/seed<k>, evaluate/<arm>/seed<k>, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types as at

from lmops_jax.config.setting_types import Distinct, NonEmpty, Seeds, component
from lmops_jax.data.boxes import LARGEST_GRID
from lmops_jax.data.image_tokens import special_words
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos import prepare, study, training
from lmops_jax.systems.kosmos.grounding import evaluate, report
from lmops_jax.systems.kosmos.grounding.world import sources, weights


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
class Grounding(study.Study):
  """Teaches a small model to say where things are, and asks it and its baselines.

  Attributes:
    world: pictures and texts.
    vocabulary: a vocabulary of module `data`, to which special tokens and cells are added.
    model: of the docked language model; its vocabulary size comes from the vocabulary.
    tower, training, evaluation: settings of the stages.
    grid: cells in a row and in a column (Kosmos-2: 32).
    arms: "grounded", half of whose pairs have boxes; "plain", the same pairs without; "blind", with
      boxes and black pictures; in any order, "grounded" among them.
    seeds: of initialisation and order; the tower has the first.

  Raises:
    ValueError: see `training.check_sizes`; or arms without "grounded".
  """

  grid: Annotated[int, at.Ge(2), at.Le(LARGEST_GRID)] = 12
  arms: Annotated[Sequence[Literal[tuple(ARMS)]], NonEmpty, Distinct] = tuple(ARMS)
  seeds: Seeds = (0, 1)

  name = "kosmos_grounding"
  READS = study.Reads(
    scenes=("grid",), train=("grid",), evaluate=("world", "grid"), report=("world", "grid"))

  def __post_init__(self):
    training.check_sizes(self.model, self.training.shapes, {
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

  def given(self, arm: str) -> study.Given:
    """What an arm is given."""
    return study.Given(ARMS[arm].arm, weights(ARMS[arm].located))

  def prepare(self, context: pipeline.StageContext) -> None:
    """Stage `scenes`."""
    prepare.write_sources(
      context, sources(self.world), self.vocabulary, self.training.shapes,
      self.model.vectors_per_image, grid=self.grid)

  def evaluate(self, context, model, params, prepared, arm, partitioner) -> None:
    """Stages `evaluate/<arm>/seed<k>`."""
    evaluate.run(
      context, config=self.evaluation, model=model, params=params, prepared=prepared,
      world=self.world, grid=self.grid, arm=arm, partitioner=partitioner)

  def report(self, context, runs, stages) -> None:
    """Stage `report`."""
    arms = dict.fromkeys(arm for arm, _ in runs)
    seeing, = (arm for arm in arms if ARMS[arm].located and ARMS[arm].arm.sees)
    report.run(
      context, runs=runs, stages=stages, world=self.world, grid=self.grid, seeing=seeing)

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
