"""What a training takes, as a `Phase`, from the shapes of its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.config import TransformerConfig
from lmops_jax.sizing import activations
from lmops_jax.sizing.budget import Phase, device_bytes


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
