"""Training a language model from scratch on packed instances, as a stage of any system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import optax

from lmops_jax.config.setting_types import PositiveInt
from lmops_jax.data.instances import Instances
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.config import TransformerConfig
from lmops_jax.sizing import budget, flops, recomputation
from lmops_jax.sizing.training import language_training_phase
from lmops_jax.stages import pipeline
from lmops_jax.training import loop, losses
from lmops_jax.training.language_models import batch_source, selection_source
from lmops_jax.training.learner import Learner, supervised


@dataclasses.dataclass(frozen=True)
class LanguageTraining:
  """The settings of every such training. Settings of systems extend it, under a name of their own.

  Attributes:
    model: `models.TransformerConfig`; its vocabulary size comes from the vocabulary.
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: instances of a global batch.
    accumulate: micro-batches of a step; fewer if the mesh has more shards than a micro-batch rows.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    loss_chunk: sequence positions whose logits exist at a time; None leaves the default.
    remat: "auto": the backward pass keeps as much as fits into a device's memory ("none", "dots" or
      "full", see `sizing.recomputation`), whatever `model.remat` says; None leaves it to that. A
      larger `accumulate` makes more fit. Results are the same up to rounding.

  Raises:
    ValueError: for a batch that does not split.
  """

  setting: ClassVar[str] = "training.LanguageTraining"  # its name in gin files, for messages

  model: TransformerConfig
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 16
  accumulate: PositiveInt = 1
  checkpoint_every: PositiveInt | None = 100
  loss_chunk: PositiveInt | None = None
  remat: Literal[recomputation.AUTO] | None = None

  def __post_init__(self):
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"{self.setting}.batch_size={self.batch_size} is not a multiple of "
        f"{self.setting}.accumulate={self.accumulate}; choose one that divides it."
      )

  def kept_steps(self) -> list[int]:
    """The steps whose parameters a run leaves behind, ascending."""
    return [self.num_steps]


def learner(model, example_losses, config: LanguageTraining, partitioner: Partitioner) -> Learner:
  """The learner of a model under `config`, which `fit` trains and plans compile."""
  return supervised(
    loop.initializer(model), example_losses, config.optimizer, accumulate=config.accumulate,
    check_batch=example_losses.check_batch, partitioner=partitioner)


def fit(
  model, example_losses, config: LanguageTraining, source, partitioner: Partitioner, *,
  directory: Path, seed: int, description: str, initial_params=None,
  progress: Callable | None = None,
):
  """Trains `model`, as it is, by `config` in `directory` and returns the last parameters."""
  result = loop.train(
    learner(model, example_losses, config, partitioner), source, config.num_steps, seed, directory,
    partitioner, initial_params=initial_params,
    records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=config.kept_steps(),
      description=description, progress=progress),
  )
  return result.state.params


def train(
  context: pipeline.StageContext, config: LanguageTraining, instances: Instances,
  partitioner: Partitioner, *, seed: int, indices: np.ndarray | None = None, shuffle: bool = True,
  initial_params: Callable[[], Any] | None = None,
) -> TransformerConfig:
  """Trains in the stage's folder, keeps `params/<step>`, and counts FLOPs, tokens and epochs.

  Args:
    instances: the instances to train on; with `indices`, only those rows of them.
    seed: seed of initialisation and order.
    shuffle: order the instances by seed; False keeps their order.
    initial_params: makes the parameters to start from; None draws them.

  Returns:
    The model's configuration, with its vocabulary.

  Raises:
    ValueError: for fewer instances than a batch has, or if `config.remat` is "auto" and nothing
      tells how much memory a device has.
  """
  num = len(instances) if indices is None else len(indices)
  if num < config.batch_size:
    raise ValueError(
      f"{context.name} has {num} instances, fewer than one batch of "
      f"{config.setting}.batch_size={config.batch_size}; give more text or make the batch smaller."
    )
  model = _model(context, config, instances, partitioner)
  if indices is None or not shuffle:
    source = batch_source(instances, indices, config.batch_size, seed, shuffle)
  else:
    source = selection_source(instances, indices, config.batch_size, seed)
  fit(
    model, losses.lm_example_losses(model, chunk=config.loss_chunk), config, source, partitioner,
    directory=context.directory, seed=seed, description=context.name,
    initial_params=initial_params, progress=context.progress,
  )
  num_examples = config.num_steps * config.batch_size
  num_tokens = num_examples * instances.length
  context.flops += 3 * num_tokens * flops.forward_flops_per_token(model.config, instances.length)
  context.extra.update(
    num_steps=config.num_steps, num_tokens=num_tokens, epochs=num_examples / num)
  return model.config


def _model(context, config: LanguageTraining, instances, partitioner: Partitioner):
  """The model to train; if its `remat` is chosen by the devices' memory, a line tells of it."""
  is_chosen, platform = config.remat == recomputation.AUTO, partitioner.platform
  memory = budget.memory_of_mesh(partitioner) if is_chosen else budget.Memory()
  model = recomputation.training_model(
    config, instances.vocab_size, instances.length, partitioner, memory, platform)
  if is_chosen:
    phase = language_training_phase(
      context.name, config, model, instances.length, partitioner, platform)
    context.log(
      f"{phase.name}: {phase.note}, about {phase.total_bytes / 2**20:,.1f} of "
      f"{memory.device_bytes / 2**20:,.1f} MiB a device")
  return model
