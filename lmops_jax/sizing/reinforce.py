"""What reinforcement learning of a decoder takes, from shapes alone.

Every response counts to its end. A reward's own operations are given, or not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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


class Writing(NamedTuple):
  """How responses are written.

  Attributes:
    prompt_length: the most tokens of a prompt.
    new_tokens: the most of a response.
    rows: responses that are decoded at once for each prompt, beams included.
  """

  prompt_length: int
  new_tokens: int
  rows: int

  @classmethod
  def of(cls, options: Any, prompt_length: int) -> Writing:
    """From `decoding.GenerationOptions`."""
    return cls(prompt_length, options.max_new_tokens,
               max(options.num_return_sequences, options.num_beams))

  @property
  def length(self) -> int:
    return self.prompt_length + self.new_tokens


def rollout_flops(
  algorithm: updates.Updating, model: TransformerConfig, writing: Writing
) -> float:
  """Operations for one response: writing, scoring and updates."""
  one_pass = writing.length * flops.forward_flops_per_token(model, writing.length)
  return (writing.rows / algorithm.group_size + updates.num_passes(algorithm)) * one_pass


def rollouts_phase(
  name: str, algorithm: updates.Updating, model: Transformer,
  optimizer: optax.GradientTransformation, writing: Writing, *, num_steps: int,
  batch_size: int, partitioner: Partitioner, platform: str, setting: str,
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
  slots, width = writing.new_tokens + 1, writing.length
  batch = [jax.ShapeDtypeStruct((batch_size, width), jnp.int32) for _ in _WORDS]
  batch += [jax.ShapeDtypeStruct((batch_size, slots), jnp.float32) for _ in _NUMBERS]
  rows = batch_size / algorithm.num_minibatches / algorithm.accumulate
  trunks = 2 if algorithm.values == "separate" else 1
  learner = updates.learner(algorithm, model, optimizer, partitioner)
  config = model.config
  return training_phase(
    name, partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole"),
    batch_size * (rollout_flops(algorithm, config, writing) + reward_flops),
    num_steps, data=sum(math.prod(x.shape) * x.dtype.itemsize for x in batch)
    / partitioner.num_batch_shards,
    kept=trunks * transformer_bytes(config, rows, width, partitioner, platform),
    held={"reference": 4.0 * num_params(config), **(held or {})}, note=note,
    remedies=("more of reinforce's num_minibatches",))
