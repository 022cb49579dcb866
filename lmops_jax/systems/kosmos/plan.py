"""What training a docked model takes, from shapes alone: for `lmops plan` and `lmops aot`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.config.refusals import ConfigError
from lmops_jax.data.image_tokens import KOSMOS_WORDS
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.docked import DockedConfig
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.sizing import activations
from lmops_jax.sizing.aot import Program
from lmops_jax.sizing.budget import Phase, device_bytes
from lmops_jax.systems.kosmos import training
from lmops_jax.training import loop

_WORD_FIELDS = ("tokens", "targets", "positions", "segment_ids")


def vocabulary_size(
  model: DockedConfig, vocabulary: Any, words: Sequence[str] = KOSMOS_WORDS
) -> int:
  """V, before any text is read.

  Args:
    words: the special ones, which follow those of the vocabulary.

  Raises:
    ConfigError: when it is not known yet.
  """
  if model.text.vocab_size is not None:
    return model.text.vocab_size
  own = getattr(vocabulary, "vocab_size", None)
  if own is None:
    raise ConfigError(
      "the vocabulary's size is not known before its file is read; set it, for example with "
      "--gin.text/models.TransformerConfig.vocab_size=64007."
    )
  return own + len(words)


def abstract_batch(
  config: training.Training, parts: Sequence[str], image_size: int, partitioner: Partitioner
) -> dict[str, jax.ShapeDtypeStruct]:
  """A placed batch of groups.

  Raises:
    ConfigError: when the mesh does not divide the groups.
  """
  groups, shards = config.num_groups, partitioner.num_batch_shards
  if groups % shards:
    raise ConfigError(
      f"{groups} groups do not split over the mesh's {shards} data shards; use at most "
      f"{math.gcd(groups, shards)} of them and the others for mesh.make.tensor, or another "
      "kosmos.Training.num_groups."
    )

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(
      (groups, *shape), dtype, sharding=partitioner.batch_sharding(1 + len(shape)))

  batch = {"weight": array(jnp.float32)}
  for part in parts:
    shape = config.shapes[part]
    row = shape.rows, shape.length
    batch |= {f"{part}/{name}": array(jnp.int32, *row) for name in _WORD_FIELDS}
    batch[f"{part}/loss_mask"] = array(jnp.float32, *row)
    if shape.pictures:
      batch[f"{part}/vector_index"] = array(jnp.int32, *row)
      batch[f"{part}/images"] = array(
        jnp.uint8, shape.rows, shape.pictures, image_size, image_size, NUM_CHANNELS)
  return batch


def _abstract_state(learner, partitioner):
  return partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole")


def phase(
  config: training.Training, model: DockedConfig, vocabulary: Any, partitioner: Partitioner,
  platform: str, words: Sequence[str] = KOSMOS_WORDS,
) -> Phase:
  """Training of the full model.

  Activations are the estimate of `sizing.activations` for the decoder, by the largest part of a
  group, and of the tower's blocks that are trained, forward for the others.
  """
  docked = training.docked_model(model, vocabulary_size(model, vocabulary, words))
  arm = training.ARMS[training.FULL]
  state = _abstract_state(training.learner(docked, config, arm, partitioner), partitioner)
  batch = abstract_batch(config, arm.parts, model.vision.image_size, partitioner)
  params = device_bytes(state.params)
  trains_tower = training.tower_is_trained(config.optimizer, state.params)
  parts = {
    "params": params, "opt_state": device_bytes(state.opt_state),
    "accumulators": params * (1 + (config.accumulate > 1)), "data": device_bytes(batch),
    "activations": _activation_bytes(
      config, docked.config, partitioner, platform, trains_tower),
  }
  return Phase(
    "train", sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
    config.num_steps * config.num_groups * training.group_flops(
      docked.config, config.shapes, trains_tower),
    config.num_steps, parts,
    f"{config.num_groups} groups in {config.accumulate} micro-batches",
    (f"a smaller micro-batch (kosmos.Training.accumulate above {config.accumulate})",
     f"more devices on mesh.make.fsdp (now {partitioner.mesh.shape['fsdp']})"))


def _activation_bytes(config, model, partitioner, platform, trains_tower: bool) -> float:
  groups = config.num_groups / config.accumulate / partitioner.num_batch_shards
  mesh = partitioner.mesh.shape
  sizes = {"platform": platform, "num_fsdp": mesh["fsdp"], "num_tensor": mesh["tensor"]}
  vision, total = model.vision, 0.0
  num_trained = vision.trunk.num_layers if trains_tower else vision.top_layers
  for shape in config.shapes.values():
    total += activations.activation_bytes(
      model.text, groups * shape.rows, shape.length, **sizes)
    if shape.pictures:
      blocks = dataclasses.replace(
        vision.stack(max(num_trained, 1)), vocab_size=1)  # it looks up no word
      total += activations.activation_bytes(
        blocks, groups * shape.rows * shape.pictures,
        1 + vision.num_patches, unembedding=False, backward=num_trained > 0, **sizes)
  return total


def program(
  config: training.Training, model: DockedConfig, vocabulary: Any, partitioner: Partitioner,
  words: Sequence[str] = KOSMOS_WORDS,
) -> Program:
  """The step of the full model's training."""
  docked = training.docked_model(model, vocabulary_size(model, vocabulary, words))
  arm = training.ARMS[training.FULL]
  learner = training.learner(docked, config, arm, partitioner)
  state = _abstract_state(learner, partitioner)
  batch = abstract_batch(config, arm.parts, model.vision.image_size, partitioner)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def lower():
    step = loop.compiled_step(learner, partitioner, jax.tree.map(lambda x: x.sharding, state))
    return step.lower(state, batch, key, jax.ShapeDtypeStruct((), jnp.int32))

  return Program(
    "train", lower, config.num_groups * training.group_flops(
      docked.config, config.shapes, training.tower_is_trained(config.optimizer, state.params)))
