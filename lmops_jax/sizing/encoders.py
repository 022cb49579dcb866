"""What an encoder docked to a language model takes, with the connector behind it.

The encoder's arithmetic is analytic, as in `flops`. A connector is any module, so its matrix
products are counted in its own lowered program, and what its backward pass keeps is read from its
traced one.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from lmops_jax.control import dynamics
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import ConnectorConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.stacks import stacks
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig
from lmops_jax.sizing import activations, flops, hlo


class Stacked(Protocol):
  """Configuration of an encoder in stacks, see `models.stacks`."""

  trunk: TransformerConfig
  top_layers: int


class Depth(enum.Enum):
  """How much of an encoder is trained: nothing, the stack `top` (if it has one), or all layers."""

  FROZEN = enum.auto()
  TOP = enum.auto()
  WHOLE = enum.auto()


class _Passes(enum.Enum):
  """What is computed of a connector: its vectors, gradients of its weights, or of its input too."""

  FORWARD = enum.auto()
  TO_WEIGHTS = enum.auto()
  TO_FEATURES = enum.auto()


def gradients_read(optimizer: optax.GradientTransformation, params: Any) -> Any:
  """For each parameter, whether the optimizer reads its gradient, so that one is computed.

  Args:
    params: those of a model, or their shapes.
  """
  params = unboxed(params)
  state = dynamics.State(params, jax.eval_shape(optimizer.init, params))
  return jax.tree.unflatten(
    jax.tree.structure(params), dynamics.gradients_read(optimizer.update, state))


def step_flops(
  encoder: Stacked, connector: ConnectorConfig, text: TransformerConfig, num: int, depth: Depth,
  in_front: float = 0.0,
) -> float:
  """Operations of a training step for one sequence of `num` vectors, and its connector's.

  What a connector computes once for all sequences, such as its latents' keys, is left out.

  Args:
    encoder: attention is counted over the whole sequence, also if spans are packed in it.
    connector: it is trained.
    text: the configuration of the language model.
    num: vectors.
    depth: what is trained of the encoder.
    in_front: operations in front of the blocks, whose inputs get no gradient.
  """
  parts = stacks(encoder.trunk, encoder.top_layers)
  trained = {Depth.FROZEN: None, Depth.TOP: parts.get("top"), Depth.WHOLE: encoder.trunk}[depth]
  backward = 0.0 if trained is None else 2 * _blocks_flops(trained, num)
  if depth is Depth.WHOLE:
    backward += in_front  # of the weights
  passes = _Passes.TO_WEIGHTS if trained is None else _Passes.TO_FEATURES
  return (
    forward_flops(encoder, num, in_front) + backward
    + _connector_flops(connector, text, encoder.trunk.width, num, passes))


def encoding_flops(
  encoder: Stacked, connector: ConnectorConfig, text: TransformerConfig, num: int,
  in_front: float = 0.0,
) -> float:
  """Operations of making the vectors of one sequence, without a gradient; see `step_flops`."""
  return forward_flops(encoder, num, in_front) + _connector_flops(
    connector, text, encoder.trunk.width, num, _Passes.FORWARD)


def forward_flops(encoder: Stacked, num: int, in_front: float = 0.0) -> float:
  """Operations of an encoder alone for one sequence, without a gradient; see `step_flops`."""
  return in_front + _blocks_flops(encoder.trunk, num)


def connector_step_flops(
  connector: ConnectorConfig, text: TransformerConfig, width: int, num: int
) -> float:
  """Operations of a training step of a connector for one sequence whose vectors are known."""
  return _connector_flops(connector, text, width, num, _Passes.TO_WEIGHTS)


def patch_flops(vision: VisionConfig) -> float:
  """Operations of embedding the patches of an image of the encoder's own size."""
  return 2 * vision.num_patches * vision.patch_size**2 * NUM_CHANNELS * vision.trunk.width


def _blocks_flops(stack: TransformerConfig, num: int) -> float:
  return num * flops.forward_flops_per_token(stack, num, unembedding=False)


@functools.lru_cache(maxsize=64)
def _connector_flops(
  connector: ConnectorConfig, text: TransformerConfig, width: int, num: int, passes: _Passes
) -> float:
  def products(batch):
    connect, params, features, cotangent = _connector(connector, text, width, num, batch)
    if passes is _Passes.FORWARD:
      lowered = jax.jit(connect).lower(params, features)
    else:
      pull = _pull(connect, to_features=passes is _Passes.TO_FEATURES)
      lowered = jax.jit(pull).lower(params, features, cotangent)
    return hlo.count(lowered.as_text("hlo")).product_flops

  return products(2) - products(1)


@functools.lru_cache(maxsize=16)
def connector_bytes(
  connector: ConnectorConfig, text: TransformerConfig, width: int, num: int
) -> float:
  """What a connector's backward pass keeps of each sequence of `num` vectors of that width."""
  def kept(batch):
    connect, params, features, _ = _connector(connector, text, width, num, batch)
    return activations.kept_bytes(connect, (params, features))

  return kept(2) - kept(1)


def _connector(connector, text, width, num, batch) -> tuple[Callable, Any, Any, Any]:
  """The function, and shapes of its parameters, features, and the cotangent of its vectors."""
  module = connector.module(text, width)
  features = jax.ShapeDtypeStruct((batch, num, width), jnp.dtype(text.dtype))
  params = unboxed(jax.eval_shape(module.init, jax.random.key(0), features)["params"])

  def connect(params, features):
    return module.apply({"params": params}, features)

  return connect, params, features, jax.eval_shape(connect, params, features)


def _pull(connect: Callable, to_features: bool) -> Callable:
  """The connector forwards and backwards, to the features if a layer below them is trained."""
  def pull(params, features, cotangent):
    if to_features:
      out, back = jax.vjp(connect, params, features)
    else:
      out, back = jax.vjp(lambda params: connect(params, features), params)
    return out, back(cotangent)

  return pull
