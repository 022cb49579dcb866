"""How each network of the embedded default is fitted, all through the one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.sizing.training import count_params
from lmops_jax.stages import pipeline
from lmops_jax.training import language_models, loop
from lmops_jax.training.learner import Learner
from lmops_jax.training.sources import Source


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class Fit:
  """How a network is fitted.

  Attributes:
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: examples of a step.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
  """

  optimizer: optax.GradientTransformation
  num_steps: PositiveInt = 500
  batch_size: PositiveInt = 64
  checkpoint_every: PositiveInt | None = 200


def fit(
  context: pipeline.StageContext, config: Fit, learner: Learner, source: Source, seed: int,
  partitioner, *, hooks=(), initial_params=None,
) -> Any:
  """Trains in the stage's folder, keeps the last parameters, and returns them."""
  result = loop.train(
    learner, source, config.num_steps, seed, context.directory, partitioner, hooks=hooks,
    initial_params=initial_params, records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=(config.num_steps,),
      description=context.name, progress=context.progress))
  context.extra["num_params"] = count_params(learner.params(result.state))
  return learner.params(result.state)


def fitted(
  folder: Path, config: Fit, init_params: Callable[[jax.Array], Any], partitioner
) -> Any:
  """The parameters that `fit` left in a finished stage, placed on the mesh."""
  return loop.load_kept_params(
    folder, config.num_steps, language_models.abstract_params(init_params, partitioner))
