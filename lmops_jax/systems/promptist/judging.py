"""The reward of the embedded default: pictures of the small generator, rated by its own towers.

The towers and the quality head that was fitted on their vectors take the places of CLIP and of the
aesthetic predictor; the rest is the reward of the published setting.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from lmops_jax.config.setting_types import (
  NonNegative,
  PositiveInt,
  Probability,
  Seed,
  component,
)
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist import generator, quality
from lmops_jax.systems.promptist.baselines import Baselines
from lmops_jax.systems.promptist.generator import Generator, Parts
from lmops_jax.systems.promptist.image_reward import ImageScorer
from lmops_jax.systems.promptist.pictures import DrawnImages
from lmops_jax.systems.promptist.rating import Rater
from lmops_jax.systems.promptist.rewards import Weights
from lmops_jax.systems.promptist.rewriting import completion_text
from lmops_jax.systems.promptist.world import STAGE as WORLD
from lmops_jax.systems.promptist.world import Prepared
from lmops_jax.training.reinforce.rewards import Rollout

STAGES = (WORLD, generator.TOWERS, quality.STAGE, generator.UNET)


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class Judging:
  """How rewritten prompts are scored; the fields are those of `promptist.ImageReward`.

  Attributes:
    num_images: pictures of a prompt.
    relevance_weight, aesthetic_weight: of the two terms.
    common_seeds: draw both prompts of a pair from the same noise.
    seed: of the pictures.
    max_bad_share: if more of a call's pictures are not finite, the run ends.
    num_rows: prompts that are drawn and rated together.
  """

  num_images: PositiveInt = 2
  relevance_weight: NonNegative = 1.0
  aesthetic_weight: NonNegative = 1.0
  common_seeds: bool = True
  seed: Seed = 0
  max_bad_share: Probability = 0.0
  num_rows: PositiveInt = 32

  @property
  def weights(self) -> Weights:
    """Of the two terms."""
    return Weights(self.relevance_weight, self.aesthetic_weight)


@functools.lru_cache(maxsize=1)
def _opened(
  folders: tuple[Path, ...], made_of: str, config: Generator, partitioner
) -> tuple[Parts, DrawnImages]:
  """The generator of finished stages; those that follow each other share its compiled program."""
  by_name = dict(zip(STAGES, folders))
  parts = Parts(by_name[generator.TOWERS], config, Prepared(by_name[WORLD]), partitioner)
  return parts, DrawnImages(
    generator.imaginer(parts, by_name[generator.UNET], partitioner), parts.rows, made_of,
    whole_batches=True)


class Judge:
  """Scores and draws with the finished stages of the generator.

  Attributes:
    scorer: see `image_reward.ImageScorer`.
    images: draws.

  Args:
    context: of a stage that reads all of `STAGES`.
    cache: a folder for the numbers of users' prompts.
  """

  def __init__(self, context: pipeline.StageContext, config: Generator, judging: Judging,
               partitioner, cache: Path | None = None):
    partitioner = partitioner.local()  # each process draws for its own rollouts
    made_of = " ".join(context.manifest(name)["fingerprint"] for name in STAGES)
    folders = tuple(context.input(name) for name in STAGES)
    parts, self.images = _opened(folders, made_of, config, partitioner)
    rater = Rater(
      parts.clip, parts.clip_params, quality.load(context.input(quality.STAGE)),
      parts.prepared.tokenizer, partitioner, num_rows=judging.num_rows)
    settings = {"models": made_of, "num_images": str(judging.num_images)}
    self.scorer = ImageScorer(
      judging, self.images, rater, Baselines(settings, cache, jax.process_index()))
    self._weights = judging.weights

  def __call__(self, rollouts: list[Rollout]) -> dict[str, np.ndarray]:
    """Both terms of the scores of rollouts; see `training.reinforce.rewards.Reward`."""
    found = self.scorer.measure(
      [rollout.prompt for rollout in rollouts],
      [completion_text(rollout.response) for rollout in rollouts])
    return {
      "relevance": self._weights.relevance * found.rewritten.relevance,
      "aesthetic": self._weights.aesthetic * (found.rewritten.aesthetic - found.raw.aesthetic)}
