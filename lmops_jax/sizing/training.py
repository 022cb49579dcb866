"""What a training takes, as a `Phase`, from the shapes of its state; nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control.dynamics import State, init_state
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.config import TransformerConfig
from lmops_jax.sizing import activations, flops
from lmops_jax.sizing.budget import Phase, check_splits, device_bytes
from lmops_jax.training import loop
from lmops_jax.training.learner import Learner

_BATCH_ITEM_BYTES = 12  # tokens, targets and loss_mask, four bytes a position each


def training_phase(
  name: str, state: Any, step_flops: float, num_steps: int, *, data: float, kept: float,
  accumulate: int = 1, held: Mapping[str, float] | None = None, note: str = "",
  remedies: tuple[str, ...] = (),
) -> Phase:
  """A training by one step.

  Args:
    state: the learner's, with `params` and `opt_state`; placed shapes.
    step_flops: operations of a step.
    data: bytes of a batch on a device.
    kept: bytes that the backward pass keeps.
    accumulate: micro-batches of a step; with several, their sum and the gradient of one exist
      together.
    held: further bytes on a device, by what they are.
    note, remedies: see `Phase`.
  """
  params = device_bytes(state.params)
  parts = {
    "params": params, "opt_state": device_bytes(state.opt_state),
    "accumulators": params * (1 + (accumulate > 1)), **(held or {}), "data": data,
    "activations": kept}
  return Phase(
    name, count_params(state.params), num_steps * step_flops, num_steps, parts, note, remedies)


def language_training_phase(
  name: str, config: Any, model: Any, length: int, partitioner: Partitioner, platform: str,
  remedies: tuple[str, ...] = (),
) -> Phase:
  """A `shared_stages.language_training.LanguageTraining`.

  Args:
    model: the `Transformer` that is trained, see `recomputation.training_model`.
    length: S.
    platform: the devices' kind: "cpu", "gpu" or "tpu".

  Raises:
    ConfigError: if the mesh does not divide the batch.
  """
  rows = config.batch_size
  check_splits(rows, "instances of a batch", partitioner, f"{config.setting}.batch_size")
  state = abstract_train_state(model, config.optimizer, partitioner)
  of_one = partitioner.micro_batch_size(rows, rows // config.accumulate)
  num_parts = rows // of_one
  gathered = (2 + (num_parts > 1)) * gathered_bytes(state.params, partitioner)
  return training_phase(
    name, state, 3 * rows * length * flops.forward_flops_per_token(model.config, length),
    config.num_steps, data=batch_bytes(rows, length, partitioner), kept=transformer_bytes(
      model.config, of_one, length, partitioner, platform, loss_chunk=config.loss_chunk),
    accumulate=num_parts, held={"gathered": gathered}, remedies=remedies,
    note=f"{rows} x {length} in {num_parts} micro-batches, remat {model.config.remat!r}")


def batch_bytes(rows: int, length: int, partitioner: Partitioner) -> float:
  """Bytes on one device of rows of text."""
  return _BATCH_ITEM_BYTES * rows * length / partitioner.num_batch_shards


def abstract_train_state(model: Any, optimizer: Any, partitioner: Partitioner) -> State:
  """The placed shapes of a language model's training state."""
  return abstract_state_of(loop.initializer(model), optimizer, partitioner)


def abstract_state_of(init_params: Any, optimizer: Any, partitioner: Partitioner) -> State:
  """The placed shapes of a state that starts from `init_params(key)`."""
  boxed = jax.eval_shape(
    lambda key: init_state(optimizer.init, optimizer.update, init_params(key)), _key())
  return partitioner.placed_shapes(boxed)


def lowered_step(
  learner: Learner, partitioner: Partitioner, state: Any, batch: Any
) -> jax.stages.Lowered:
  """The step that `loop.train` runs, for placed shapes of a state and a batch."""
  step = loop.compiled_step(learner, partitioner, jax.tree.map(lambda x: x.sharding, state))
  return step.lower(state, batch, _key(), jax.ShapeDtypeStruct((), jnp.int32))


def _key() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda: jax.random.key(0))


def gathered_bytes(params: Any, partitioner: Partitioner) -> int:
  """Bytes of the parameters that every device holds whole for a step; 0 if they are not split."""
  rows = partitioner.device_rows
  if rows is None or not partitioner.splits_params:
    return 0

  def leaf(x):
    others = [a for axes in x.sharding.spec for a in (axes if isinstance(axes, tuple) else (axes,))
              if a is not None and a not in rows.axes]
    return math.prod(x.shape) * x.dtype.itemsize // math.prod(
      partitioner.mesh.shape[a] for a in others)

  return sum(map(leaf, jax.tree.leaves(params)))


def count_params(params: Any) -> int:
  """Numbers in a tree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def transformer_bytes(
  config: TransformerConfig, rows: float, length: int, partitioner: Partitioner, platform: str,
  **kwargs,
) -> float:
  """Bytes that a device keeps of a decoder's pass over `rows` rows of all devices.

  Args:
    kwargs: for `activations.activation_bytes`.
  """
  mesh = partitioner.mesh.shape
  return activations.activation_bytes(
    config, rows / partitioner.num_batch_shards, length, platform=platform, num_fsdp=mesh["fsdp"],
    num_tensor=mesh["tensor"], **kwargs)
