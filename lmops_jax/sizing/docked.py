"""What a docked language model takes: operations of a training step, and bytes of its pictures.

The tower's and the decoder's arithmetic is analytic, as in `flops`. A connector is any module, so
its matrix products are counted in its own lowered program, and what its backward pass keeps is read
from its traced one. The layers of the tower below `top_layers` are taken to be frozen: they have
a forward pass alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.docked import DockedConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.sizing import activations, flops, hlo


class Shape(Protocol):
  """Rows of one part of a group: their length, the pictures of each, and their number."""

  length: int
  pictures: int
  rows: int


def group_flops(config: DockedConfig, shapes: Iterable[Shape]) -> float:
  """Operations of a training step for each group of rows.

  What a connector computes once for all pictures, such as its latents' keys, is left out.
  """
  of_picture = picture_flops(config)
  return sum(
    shape.rows * (
      3 * shape.length * flops.forward_flops_per_token(config.text, shape.length)
      + shape.pictures * of_picture)
    for shape in shapes)


def picture_flops(config: DockedConfig) -> float:
  """Operations of a training step for each picture: tower and connector."""
  trained = _stacks(config).get("top")
  backward = 0.0 if trained is None else 2 * _blocks_flops(config, trained)
  return _tower_flops(config) + backward + _connector_flops(config, backward=True)


def encoding_flops(config: DockedConfig) -> float:
  """Operations of making the vectors of a picture, without a gradient."""
  return _tower_flops(config) + _connector_flops(config, backward=False)


def _tower_flops(config: DockedConfig) -> float:
  vision = config.vision
  patches = 2 * vision.num_patches * vision.patch_size**2 * NUM_CHANNELS * vision.trunk.width
  return patches + _blocks_flops(config, vision.trunk)


def _blocks_flops(config: DockedConfig, stack: TransformerConfig) -> float:
  num = 1 + config.vision.num_patches
  return num * flops.forward_flops_per_token(stack, num, unembedding=False)


def picture_bytes(config: DockedConfig, images: float, **sizes) -> float:
  """Bytes on one device of the activations of tower and connector for one micro-batch.

  Args:
    images: pictures of the micro-batch on this device.
    sizes: `platform`, `num_fsdp` and `num_tensor` of `activations.activation_bytes`.
  """
  num = 1 + config.vision.num_patches
  towers = [
    activations.activation_bytes(
      dataclasses.replace(stack, vocab_size=1), images, num,  # it looks up no word
      unembedding=False, backward=part == "top", **sizes)
    for part, stack in _stacks(config).items()]
  of_input = 4 * NUM_CHANNELS * config.vision.image_size**2
  return images * of_input + max(towers) + images * _connector_bytes(config)


def _stacks(config: DockedConfig) -> Mapping[str, Any]:
  vision = config.vision
  stacks = {"trunk": vision.stack(vision.trunk.num_layers - vision.top_layers)}
  return stacks | ({"top": vision.stack(vision.top_layers)} if vision.top_layers else {})


@functools.lru_cache(maxsize=16)
def _connector_flops(config: DockedConfig, backward: bool) -> float:
  def products(num):
    params, features, cotangent = _connector_inputs(config, num)
    if backward:
      lowered = jax.jit(_pull(config)).lower(params, features, cotangent)
    else:
      lowered = jax.jit(_connect(config)).lower(params, features)
    return hlo.count(lowered.as_text("hlo")).product_flops

  return products(2) - products(1)


@functools.lru_cache(maxsize=16)
def _connector_bytes(config: DockedConfig) -> float:
  """What a backward pass keeps of each picture."""
  def kept(num):
    params, features, _ = _connector_inputs(config, num)
    pull = jax.eval_shape(lambda *given: jax.vjp(_connect(config), *given)[1], params, features)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pull))

  return kept(2) - kept(1)


def _connect(config: DockedConfig) -> Callable:
  module = config.connector.module(config.text, config.vision.trunk.width)
  return lambda params, features: module.apply({"params": params}, features)


def _connector_inputs(config: DockedConfig, num: int) -> tuple[Any, Any, Any]:
  """Shapes of parameters, features, and the cotangent of the vectors."""
  width, dtype = config.vision.trunk.width, jnp.dtype(config.text.dtype)
  features = jax.ShapeDtypeStruct((num, 1 + config.vision.num_patches, width), dtype)
  module = config.connector.module(config.text, width)
  params = unboxed(jax.eval_shape(module.init, jax.random.key(0), features)["params"])
  return params, features, jax.eval_shape(_connect(config), params, features)


def _pull(config: DockedConfig) -> Callable:
  """The connector forwards and backwards, to the features if a layer below them is trained."""
  connect = _connect(config)

  def pull(params, features, cotangent):
    if config.vision.top_layers:
      out, back = jax.vjp(connect, params, features)
    else:
      out, back = jax.vjp(lambda params: connect(params, features), params)
    return out, back(cotangent)

  return pull
