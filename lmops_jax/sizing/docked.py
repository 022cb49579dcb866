"""What a docked language model takes: operations of a training step, and bytes of its pictures.

Unless the whole tower is trained, its layers below `top_layers` are taken to be frozen: they have a
forward pass alone. See `encoders` on what is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import optax

from lmops_jax.models.docked import DockedConfig
from lmops_jax.models.stacks import stacks
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.sizing import activations, encoders, flops


class Shape(Protocol):
  """Rows of one part of a group: their length, the pictures of each, and their number."""

  length: int
  pictures: int
  rows: int


def trains_whole_tower(optimizer: optax.GradientTransformation, params: Any) -> bool:
  """Whether an optimizer trains the tower from its first layer on.

  Args:
    params: those of the docked model, or their shapes.
  """
  return any(jax.tree.leaves(encoders.gradients_read(optimizer, params)["vision"]["trunk"]))


def group_flops(
  config: DockedConfig, shapes: Iterable[Shape], whole_tower: bool = False
) -> float:
  """Operations of a training step for each group of rows.

  What a connector computes once for all pictures, such as its latents' keys, is left out.

  Args:
    whole_tower: whether all layers of the tower are trained.
  """
  of_picture = picture_flops(config, whole_tower)
  return sum(
    shape.rows * (
      3 * shape.length * flops.forward_flops_per_token(config.text, shape.length)
      + shape.pictures * of_picture)
    for shape in shapes)


def picture_flops(config: DockedConfig, whole_tower: bool = False) -> float:
  """Operations of a training step for each picture: tower and connector."""
  depth = encoders.Depth.WHOLE if whole_tower else encoders.Depth.TOP
  return encoders.step_flops(
    config.vision, config.connector, config.text, config.vision.num_features(), depth,
    encoders.patch_flops(config.vision))


def encoding_flops(config: DockedConfig) -> float:
  """Operations of making the vectors of a picture, without a gradient."""
  return encoders.encoding_flops(
    config.vision, config.connector, config.text, config.vision.num_features(),
    encoders.patch_flops(config.vision))


def picture_bytes(
  config: DockedConfig, images: float, whole_tower: bool = False, **sizes
) -> float:
  """Bytes on one device of the activations of tower and connector for one micro-batch.

  Args:
    images: pictures of the micro-batch on this device.
    whole_tower: whether all layers of the tower are trained.
    sizes: `platform`, `num_fsdp` and `num_tensor` of `activations.activation_bytes`.
  """
  vision, num = config.vision, config.vision.num_features()
  towers = [
    activations.activation_bytes(
      dataclasses.replace(stack, vocab_size=1), images, num,  # it looks up no word
      unembedding=False, backward=whole_tower or part == "top", **sizes)
    for part, stack in stacks(vision.trunk, vision.top_layers).items()]
  of_input = 4 * NUM_CHANNELS * vision.image_size**2
  kept = sum(towers) if whole_tower else max(towers)
  of_connector = encoders.connector_bytes(config.connector, config.text, vision.trunk.width, num)
  return images * of_input + kept + images * of_connector
