"""What a docked language model takes: operations of a training step, and bytes of its pictures.

The tower's and the decoder's arithmetic is analytic, as in `flops`. A connector is any module, so
its matrix products are counted in its own lowered program, and what its backward pass keeps is read
from its traced one. Unless the whole tower is trained, its layers below `top_layers` are taken to
be frozen: they have a forward pass alone.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from lmops_jax.control import dynamics
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


def trains_whole_tower(optimizer: optax.GradientTransformation, params: Any) -> bool:
  """Whether an optimizer trains the tower from its first layer on.

  Args:
    params: those of the docked model, or their shapes.
  """
  return any(jax.tree.leaves(_read_of_tower(optimizer, params)["trunk"]))


def trains_tower(optimizer: optax.GradientTransformation, params: Any) -> bool:
  """Whether an optimizer trains anything of the tower; arguments as for `trains_whole_tower`."""
  return any(jax.tree.leaves(_read_of_tower(optimizer, params)))


def _read_of_tower(optimizer, params):
  """For each parameter of the tower, whether the optimizer reads its gradient."""
  params = unboxed(params)
  state = dynamics.State(params, jax.eval_shape(optimizer.init, params))
  return jax.tree.unflatten(
    jax.tree.structure(params), dynamics.gradients_read(optimizer.update, state))["vision"]


def group_flops(
  config: DockedConfig, shapes: Iterable[Shape], whole_tower: bool = False, encoded: bool = False
) -> float:
  """Operations of a training step for each group of rows.

  What a connector computes once for all pictures, such as its latents' keys, is left out.

  Args:
    whole_tower: whether all layers of the tower are trained.
    encoded: whether pictures come as features, so that the tower does nothing.
  """
  of_picture = (
    _connector_flops(config, _Passes.TO_WEIGHTS) if encoded else picture_flops(config, whole_tower))
  return sum(
    shape.rows * (
      3 * shape.length * flops.forward_flops_per_token(config.text, shape.length)
      + shape.pictures * of_picture)
    for shape in shapes)


def picture_flops(config: DockedConfig, whole_tower: bool = False) -> float:
  """Operations of a training step for each picture: tower and connector."""
  trained = config.vision.trunk if whole_tower else _stacks(config).get("top")
  backward = 0.0 if trained is None else 2 * _blocks_flops(config, trained)
  if whole_tower:
    backward += _patch_flops(config)  # of the weights; no gradient goes on to the pixels
  connector = _connector_flops(config, _Passes.TO_FEATURES if trained else _Passes.TO_WEIGHTS)
  return tower_flops(config) + backward + connector


def encoding_flops(config: DockedConfig) -> float:
  """Operations of making the vectors of a picture, without a gradient."""
  return tower_flops(config) + _connector_flops(config, _Passes.FORWARD)


def tower_flops(config: DockedConfig) -> float:
  """Operations of the tower for each picture, without a gradient."""
  return _patch_flops(config) + _blocks_flops(config, config.vision.trunk)


def _patch_flops(config: DockedConfig) -> float:
  vision = config.vision
  return 2 * vision.num_patches * vision.patch_size**2 * NUM_CHANNELS * vision.trunk.width


def _blocks_flops(config: DockedConfig, stack: TransformerConfig) -> float:
  num = 1 + config.vision.num_patches
  return num * flops.forward_flops_per_token(stack, num, unembedding=False)


def picture_bytes(
  config: DockedConfig, images: float, whole_tower: bool = False, encoded: bool = False, **sizes
) -> float:
  """Bytes on one device of the activations of tower and connector for one micro-batch.

  Args:
    images: pictures of the micro-batch on this device.
    whole_tower: whether all layers of the tower are trained.
    encoded: whether pictures come as features.
    sizes: `platform`, `num_fsdp` and `num_tensor` of `activations.activation_bytes`.
  """
  num = 1 + config.vision.num_patches
  if encoded:
    return images * (_connector_bytes(config) + feature_bytes(config))
  towers = [
    activations.activation_bytes(
      dataclasses.replace(stack, vocab_size=1), images, num,  # it looks up no word
      unembedding=False, backward=whole_tower or part == "top", **sizes)
    for part, stack in _stacks(config).items()]
  of_input = 4 * NUM_CHANNELS * config.vision.image_size**2
  kept = sum(towers) if whole_tower else max(towers)
  return images * of_input + kept + images * _connector_bytes(config)


def feature_bytes(config: DockedConfig) -> int:
  """Bytes of a picture's features, as the connector reads them."""
  num, width = 1 + config.vision.num_patches, config.vision.trunk.width
  return num * width * jnp.dtype(config.text.dtype).itemsize


def _stacks(config: DockedConfig) -> Mapping[str, Any]:
  vision = config.vision
  stacks = {"trunk": vision.stack(vision.trunk.num_layers - vision.top_layers)}
  return stacks | ({"top": vision.stack(vision.top_layers)} if vision.top_layers else {})


class _Passes(enum.Enum):
  """What is computed of a connector: its vectors, gradients of its weights, or of its input too."""

  FORWARD = enum.auto()
  TO_WEIGHTS = enum.auto()
  TO_FEATURES = enum.auto()


@functools.lru_cache(maxsize=16)
def _connector_flops(config: DockedConfig, passes: _Passes) -> float:
  def products(num):
    params, features, cotangent = _connector_inputs(config, num)
    if passes is _Passes.FORWARD:
      lowered = jax.jit(_connect(config)).lower(params, features)
    else:
      pull = _pull(config, to_features=passes is _Passes.TO_FEATURES)
      lowered = jax.jit(pull).lower(params, features, cotangent)
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


def _pull(config: DockedConfig, to_features: bool) -> Callable:
  """The connector forwards and backwards, to the features if a layer below them is trained."""
  connect = _connect(config)

  def pull(params, features, cotangent):
    if to_features:
      out, back = jax.vjp(connect, params, features)
    else:
      out, back = jax.vjp(lambda params: connect(params, features), params)
    return out, back(cotangent)

  return pull
