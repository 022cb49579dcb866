"""What training a docked model takes, from shapes alone: for `lmops plan` and `lmops aot`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.data.image_tokens import KOSMOS_WORDS
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.docked import DockedConfig
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig
from lmops_jax.sizing import activations
from lmops_jax.sizing import docked as docked_sizes
from lmops_jax.sizing.aot import Program
from lmops_jax.sizing.budget import Phase, check_splits, device_bytes
from lmops_jax.sizing.training import lowered_step, training_phase
from lmops_jax.sizing.vocabulary import vocabulary_size
from lmops_jax.systems.kosmos import training
from lmops_jax.systems.kosmos.prepare import RowShape
from lmops_jax.training import loop

_WORD_FIELDS = ("tokens", "targets", "positions", "segment_ids")


def abstract_batch(
  config: training.Training, shapes: Mapping[str, RowShape], vision: VisionConfig,
  partitioner: Partitioner, features: jnp.dtype | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
  """A placed batch of groups of rows of these shapes, by part.

  Args:
    features: the dtype of features, which pictures come as; None: pixels.

  Raises:
    ConfigError: when the mesh does not divide the groups.
  """
  groups = config.num_groups
  check_splits(groups, "groups", partitioner, "kosmos.Training.num_groups")

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(
      (groups, *shape), dtype, sharding=partitioner.batch_sharding(1 + len(shape)))

  batch = {"weight": array(jnp.float32)}
  for part, shape in shapes.items():
    row = shape.rows, shape.length
    batch |= {f"{part}/{name}": array(jnp.int32, *row) for name in _WORD_FIELDS}
    batch[f"{part}/loss_mask"] = array(jnp.float32, *row)
    if shape.pictures:
      batch[f"{part}/vector_index"] = array(jnp.int32, *row)
      pictures, side = (shape.rows, shape.pictures), vision.image_size
      if features is None:
        batch[f"{part}/images"] = array(jnp.uint8, *pictures, side, side, NUM_CHANNELS)
      else:
        batch[f"{part}/features"] = array(
          features, *pictures, 1 + vision.num_patches, vision.trunk.width)
  return batch


def phase(
  config: training.Training, model: DockedConfig, vocabulary: Any, partitioner: Partitioner,
  platform: str, shapes: Mapping[str, RowShape] | None = None,
  words: Sequence[str] = KOSMOS_WORDS, encoded: bool = False,
) -> Phase:
  """Training of the full model.

  Activations are the estimate of `sizing.activations` for the decoder, by the largest part of a
  group, and of `sizing.docked` for pictures.

  Args:
    shapes: of the rows of each part; None: those of `config`.
    words: the special ones of the vocabulary.
    encoded: whether pictures come as features, which were computed before.
  """
  shapes = config.shapes if shapes is None else shapes
  docked, learner, state, batch = _abstract(
    config, model, vocabulary, partitioner, shapes, words, encoded)
  whole_tower = docked_sizes.trains_whole_tower(config.optimizer, state.params)
  return training_phase(
    "train", state, config.num_groups * docked_sizes.group_flops(
      docked.config, shapes.values(), whole_tower, encoded),
    config.num_steps, data=device_bytes(batch), kept=_activation_bytes(
      config, docked.config, shapes, partitioner, platform, whole_tower, encoded),
    accumulate=config.accumulate,
    note=f"{config.num_groups} groups in {config.accumulate} micro-batches",
    remedies=_remedies(config, partitioner))


def _remedies(config, partitioner) -> tuple[str, ...]:
  return (
    f"a smaller micro-batch (kosmos.Training.accumulate above {config.accumulate})",
    f"more devices on mesh.make.fsdp (now {partitioner.mesh.shape['fsdp']})")


def _activation_bytes(
  config, model, shapes, partitioner, platform, whole_tower, encoded
) -> float:
  groups = config.num_groups / config.accumulate / partitioner.num_batch_shards
  mesh = partitioner.mesh.shape
  sizes = {"platform": platform, "num_fsdp": mesh["fsdp"], "num_tensor": mesh["tensor"]}
  total = 0.0
  for shape in shapes.values():
    total += activations.activation_bytes(
      model.text, groups * shape.rows, shape.length, **sizes)
    if shape.pictures:
      total += docked_sizes.picture_bytes(
        model, groups * shape.rows * shape.pictures, whole_tower, encoded, **sizes)
  return total


def _abstract(config, model, vocabulary, partitioner, shapes, words, encoded):
  """The model, its learner, and its placed state and batch as shapes."""
  docked = training.docked_model(model, vocabulary_size(
    model.text.vocab_size, vocabulary, "text/models.TransformerConfig.vocab_size=64007",
    more=len(words)))
  arm = training.ARMS[training.FULL]._replace(parts=tuple(shapes))
  learner = training.learner(docked, config, arm, partitioner)
  state = partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole")
  return docked, learner, state, abstract_batch(
    config, shapes, model.vision, partitioner, jnp.dtype(model.text.dtype) if encoded else None)


def program(
  config: training.Training, model: DockedConfig, vocabulary: Any, partitioner: Partitioner,
  shapes: Mapping[str, RowShape] | None = None, words: Sequence[str] = KOSMOS_WORDS,
  encoded: bool = False,
) -> Program:
  """The step of the full model's training; arguments as for `phase`."""
  shapes = config.shapes if shapes is None else shapes
  docked, learner, state, batch = _abstract(
    config, model, vocabulary, partitioner, shapes, words, encoded)
  return Program(
    "train", functools.partial(lowered_step, learner, partitioner, state, batch),
    config.num_groups * docked_sizes.group_flops(
      docked.config, shapes.values(), encoded=encoded),
    remedies=_remedies(config, partitioner))
