"""What training an arm takes, from shapes alone: for `lmops plan` and `lmops aot`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.universal import SPAN_INPUTS
from lmops_jax.sizing import activations
from lmops_jax.sizing.aot import Program
from lmops_jax.sizing.budget import Phase, check_splits, device_bytes
from lmops_jax.systems.metalm import training
from lmops_jax.systems.metalm.arms import Arm
from lmops_jax.training import loop


def phase(
  config: training.Training, arm: Arm, length: int, partitioner: Partitioner, platform: str
) -> Phase:
  """Training of an arm. Activations are the estimate of `sizing.activations`.

  Args:
    arm: with a vocabulary size. length: of a row.
    platform: decides the size of a chunk of logits.
  """
  learner, state, batch = _abstract(config, arm, length, partitioner)
  params = device_bytes(state.params)
  encoder_length = arm.sampler.encoder_length(length)
  parts = {
    "params": params, "opt_state": device_bytes(state.opt_state),
    "accumulators": params * (1 + (config.accumulate > 1)), "data": device_bytes(batch),
    "activations": _activation_bytes(
      config, arm, length, encoder_length, partitioner, platform),
  }
  return Phase(
    "train", sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
    config.num_steps * training.step_flops(
      arm.model, config.optimizer, config.batch_size, length, encoder_length),
    config.num_steps, parts,
    f"{config.batch_size} rows in {config.accumulate} micro-batches",
    _remedies(config, partitioner))


def program(config: training.Training, arm: Arm, length: int, partitioner: Partitioner) -> Program:
  """The step of an arm's training; arguments as for `phase`."""
  learner, state, batch = _abstract(config, arm, length, partitioner)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def lower():
    step = loop.compiled_step(learner, partitioner, jax.tree.map(lambda x: x.sharding, state))
    return step.lower(state, batch, key, jax.ShapeDtypeStruct((), jnp.int32))

  return Program(
    "train", lower, training.step_flops(
      arm.model, config.optimizer, config.batch_size, length,
      arm.sampler.encoder_length(length)),
    remedies=_remedies(config, partitioner))


def _remedies(config, partitioner) -> tuple[str, ...]:
  return (
    f"a smaller micro-batch (metalm.Training.accumulate above {config.accumulate})",
    f"more devices on mesh.make.fsdp (now {partitioner.mesh.shape['fsdp']})")


def _activation_bytes(config, arm, length, encoder_length, partitioner, platform) -> float:
  rows = config.batch_size / config.accumulate / partitioner.num_batch_shards
  mesh = partitioner.mesh.shape
  sizes = {"platform": platform, "num_fsdp": mesh["fsdp"], "num_tensor": mesh["tensor"]}
  total = activations.activation_bytes(arm.config.text, rows, length, **sizes)
  if encoder_length:
    total += activations.activation_bytes(
      arm.config.reader.encoder.trunk, rows, encoder_length, unembedding=False, **sizes)
  return total


def _abstract(config, arm, length, partitioner):
  """The learner of an arm, and its placed state and batch as shapes.

  Raises:
    ConfigError: when the mesh does not divide the batch.
  """
  rows = config.batch_size
  check_splits(rows, "rows", partitioner, "metalm.Training.batch_size")
  learner = training.learner(arm.model, config.optimizer, config.accumulate, partitioner)
  state = partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole")

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(
      (rows, *shape), dtype, sharding=partitioner.batch_sharding(1 + len(shape)))

  batch = {"weight": array(jnp.float32), "loss_mask": array(jnp.float32, length)}
  batch |= {name: array(jnp.int32, length) for name in ("tokens", "targets")}
  encoder_length = arm.sampler.encoder_length(length)
  if encoder_length:
    batch["vector_index"] = array(jnp.int32, length)
    batch |= {name: array(jnp.int32, encoder_length) for name in SPAN_INPUTS}
  return learner, state, batch
