"""What reinforcement learning of a decoder takes, from shapes alone.

Every response counts to its end. A reward's own operations are given, or not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.transformer import Transformer, num_params
from lmops_jax.sizing import flops
from lmops_jax.sizing.budget import Phase, check_splits
from lmops_jax.sizing.training import training_phase, transformer_bytes
from lmops_jax.training import loop
from lmops_jax.training.reinforce import updates

_WORDS = ("tokens", "positions", "segment_ids")  # of a rollout
_NUMBERS = ("targets", "loss_mask", "log_probs", "reference")  # of its response


def writing_flops(model: TransformerConfig, options: GenerationOptions, prompt: int) -> float:
  """Operations of writing to one prompt of `prompt` tokens at most, every answer to its end."""
  length = prompt + options.max_new_tokens
  rows = max(options.num_return_sequences, options.num_beams)
  return rows * length * flops.forward_flops_per_token(model, length)


def rollout_flops(
  algorithm: updates.Updating, model: TransformerConfig, options: GenerationOptions, prompt: int
) -> float:
  """Operations for one response: writing, scoring and updates."""
  length = prompt + options.max_new_tokens
  learning = updates.num_passes(algorithm) * length * flops.forward_flops_per_token(model, length)
  return writing_flops(model, options, prompt) / algorithm.group_size + learning


def rollouts_phase(
  name: str, algorithm: updates.Updating, model: Transformer,
  optimizer: optax.GradientTransformation, options: GenerationOptions, *, num_steps: int,
  batch_size: int, prompt_length: int, partitioner: Partitioner, platform: str, setting: str,
  reward_flops: float = 0.0, held: Mapping[str, float] | None = None, note: str = "",
) -> Phase:
  """Training on rollouts. The policy as it was is held whole on every device.

  Args:
    num_steps: batches of rollouts.
    setting: the name of `batch_size` in gin files, for messages.
    reward_flops: operations of judging one response.
    held: further bytes on a device, by what they are.

  Raises:
    ConfigError: when the mesh does not divide the batch.
  """
  check_splits(batch_size, "rollouts", partitioner, setting)
  slots = options.max_new_tokens + 1
  width = prompt_length + slots - 1
  batch = [jax.ShapeDtypeStruct((batch_size, width), jnp.int32) for _ in _WORDS]
  batch += [jax.ShapeDtypeStruct((batch_size, slots), jnp.float32) for _ in _NUMBERS]
  rows = batch_size / algorithm.num_minibatches / algorithm.accumulate
  trunks = 2 if algorithm.values == "separate" else 1
  learner = updates.learner(algorithm, model, optimizer, partitioner)
  config = model.config
  return training_phase(
    name, partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole"),
    batch_size * (rollout_flops(algorithm, config, options, prompt_length) + reward_flops),
    num_steps, data=sum(math.prod(x.shape) * x.dtype.itemsize for x in batch)
    / partitioner.num_batch_shards,
    kept=trunks * transformer_bytes(config, rows, width, partitioner, platform),
    held={"reference": 4.0 * num_params(config), **(held or {})}, note=note,
    remedies=("more of reinforce's num_minibatches",))
