"""Encoders in two stacks of layers, of which the upper one, `top`, can be trained alone.

The parameters of a stack are one array for all its layers, which an optimizer can only train or
freeze as a whole. So the last layers may be a stack of their own. Only the optimizer decides what
is frozen: `optim.partition` with, to freeze all but the last layers of an encoder called "reader",

    {'reader/(?!top/).*': None, '.*': @optim.adamw()}

No gradient is computed for frozen parameters, so below the first trained layer there is neither a
backward pass nor an activation kept for one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.dropout import dropped, folded
from lmops_jax.models.transformer import Transformer


def check_top(name: str, trunk: TransformerConfig, top_layers: int) -> None:
  """Raises ValueError if a trunk has no layer below its top; `name` is the configuration's."""
  if top_layers >= trunk.num_layers:
    raise ValueError(
      f"{name}.top_layers={top_layers} must be below the trunk's num_layers={trunk.num_layers}; 0 "
      "keeps all layers in one stack."
    )


def stacks(trunk: TransformerConfig, top_layers: int) -> dict[str, TransformerConfig]:
  """The configurations of "trunk" and, unless `top_layers` is 0, of "top".

  Both are initialised and scaled as in the whole, and its final norm is the last one's.
  """
  if not top_layers:
    return {"trunk": trunk}

  def part(num_layers, final_norm):
    return dataclasses.replace(
      trunk, num_layers=num_layers, final_norm=final_norm, branch_gain=trunk.branch_factor,
      residual_scale=trunk.residual_factor)

  return {
    "trunk": part(trunk.num_layers - top_layers, False), "top": part(top_layers, trunk.final_norm)}


class StackedEncoder(nn.Module):
  """Base of encoders whose configuration has `trunk` and `top_layers`.

  Parameters: `trunk` and, with `top_layers`, `top`, both those of a `Transformer` without head.
  """

  config: Any
  embeds_words = False  # whether the trunk has a table of words

  def setup(self):
    parts = stacks(self.config.trunk, self.config.top_layers)
    self.trunk = Transformer(
      parts["trunk"], with_unembedding=False, with_embedding=self.embeds_words)
    if "top" in parts:
      self.top = Transformer(parts["top"], with_unembedding=False, with_embedding=False)

  def encode(
    self, x: jax.Array, positions=None, segment_ids=None, keys: jax.Array | None = None
  ) -> jax.Array:
    """Dropout of the embeddings `[N,S,D]`, and all layers; arguments as `Transformer.encode`."""
    bias = self.trunk.score_bias(x.shape[1])  # of one table for both stacks
    x = dropped(x, folded(keys, 0), self.config.trunk.embedding_dropout)
    x = self.trunk.encode(x, positions, segment_ids, keys, bias)
    if self.config.top_layers:
      x = self.top.encode(x, positions, segment_ids, top_keys(keys, self.config.trunk), bias)
    return x


def top_keys(keys: jax.Array | None, trunk: TransformerConfig) -> jax.Array | None:
  """Keys of dropout for the top, none of which the layers below draw from."""
  return folded(keys, 1 + trunk.num_layers)


def with_top(params: Any, top_layers: int) -> Any:
  """Parameters of a `StackedEncoder` in one stack, split into those of one with `top_layers`.

  Raises:
    ValueError: for parameters that have a top already, or no more layers than `top_layers`.
  """
  trunk = dict(params["trunk"])
  layers = trunk.pop("layers")
  num_layers = jax.tree.leaves(layers)[0].shape[0]
  if "top" in params or not 0 < top_layers < num_layers:
    raise ValueError(
      f"top_layers={top_layers} must be from 1 to {num_layers - 1} of the {num_layers} layers of "
      "an encoder in one stack."
    )
  final = {name: trunk.pop(name) for name in ("final_norm",) if name in trunk}
  lower, upper = (
    jax.tree.map(lambda x, part=part: x[part], layers)
    for part in (slice(-top_layers), slice(-top_layers, None)))
  return {**params, "trunk": {**trunk, "layers": lower}, "top": {"layers": upper, **final}}
