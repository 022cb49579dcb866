"""A transformer with numbers on top.

One number a sequence is PDS's data scorer (arXiv:2410.07064, 2.3); one number a token is the value
model of reinforcement learning.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.models.transformer import Transformer, TransformerConfig

POOLINGS = ("mean", "last", "first")


class SequenceRegressor(nn.Module):
  """Pools the final hidden states over real positions and applies a linear head.

  Attributes:
    config: the trunk's.
    pooling: "mean" over all real positions (BOS and EOS are real, padding is not), the "last" real
      position, or the "first" position.
    bias: whether the head has a bias.

  Parameters: `trunk` (a `Transformer` without output matrix), `head/kernel [D]`, `head/bias []`.
  """

  config: TransformerConfig
  pooling: str = "mean"
  bias: bool = True

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """One number a sequence.

    Args:
      tokens: `[B,S] int32`.
      mask: `[B,S]`, nonzero at real positions, at least one in each row.
      positions: `[B,S] int32` or None, as in `Transformer`.
      segment_ids: `[B,S] int32` or None, as in `Transformer`.

    Returns:
      `[B] float32`. A row without real positions gives the head's bias (mean pooling).

    Raises:
      ValueError: for an unknown pooling.
    """
    if self.pooling not in POOLINGS:
      raise ValueError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}.")
    if segment_ids is None and not self.config.causal:
      segment_ids = (mask != 0).astype(jnp.int32)  # an encoder must not see padding
    trunk = Transformer(self.config, with_unembedding=False, name="trunk")
    hidden = trunk(tokens, positions, segment_ids)
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return Head(self.config, self.bias, name="head")(pool(hidden, mask, self.pooling))


class Head(nn.Module):
  """`<x, kernel> + bias`, `[B,D]` to `[B]`."""

  config: TransformerConfig
  bias: bool

  @nn.compact
  def __call__(self, x):
    dtype = jnp.dtype(self.config.param_dtype)
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",)),
      (x.shape[-1],),
      dtype,
    )
    out = jnp.einsum("bd,d->b", x, kernel)
    if self.bias:
      out = out + self.param(
        "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ()), (), dtype
      )
    return out


class TokenValues(nn.Module):
  """A trunk and one number for each of its tokens.

  Attributes:
    config: the trunk's.

  Parameters: `trunk` (a `Transformer` without output matrix) and `head` (a `TokenHead`).
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens, positions=None, segment_ids=None) -> jax.Array:
    """Numbers `[B,S] float32`; arguments as in `Transformer`."""
    trunk = Transformer(self.config, with_unembedding=False, name="trunk")
    return TokenHead(self.config, name="head")(trunk(tokens, positions, segment_ids))


class TokenHead(nn.Module):
  """Two layers on hidden states `[...,D]`, `D -> 2D`, ReLU, `2D -> 1`, computed in float32.

  The value head of Promptist (arXiv:2212.09611).
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    width, dtype = self.config.width, jnp.dtype(self.config.param_dtype)
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    for name, size, axes in (("inner", 2 * width, ("embed", "mlp")), ("out", 1, ("mlp", None))):
      hidden = nn.Dense(
        size, dtype=hidden.dtype, param_dtype=dtype, name=name,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
      )(hidden if name == "inner" else nn.relu(hidden))
    return hidden[..., 0]


def pool(hidden: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
  """`[B,S,D]` and a mask `[B,S]` to `[B,D]`; values at masked positions do not matter."""
  real = mask != 0
  if pooling == "first":
    return hidden[:, 0]
  if pooling == "last":
    last = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  total = jnp.sum(jnp.where(real[:, :, None], hidden, 0), axis=1)
  return total / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None].astype(hidden.dtype)


def trunk_of(lm_params, trunk):
  """The part of a language model's parameters that a trunk without output matrix has."""
  return {name: part for name, part in lm_params.items() if name in trunk}


def regressor_params(model: SequenceRegressor, key: jax.Array, lm_params):
  """Parameters of a regressor whose trunk starts from a language model.

  Args:
    model: the regressor.
    key: key of the new head's values.
    lm_params: those of a `Transformer` with the same config; its output matrix is left out.

  Returns:
    `{"trunk": ..., "head": ...}`, plain arrays.

  Raises:
    ValueError: if the language model has another shape.
  """
  tokens = jnp.zeros((1, 1), jnp.int32)
  fresh = nn.unbox(jax.eval_shape(lambda: model.init(key, tokens, tokens))["params"])
  trunk = trunk_of(nn.unbox(lm_params), fresh["trunk"])
  want, got = (
    {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
    for tree in (fresh["trunk"], trunk)
  )
  wrong = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
  if wrong:
    raise ValueError(
      f"The regressor's trunk has {wrong[0]} of shape {want.get(wrong[0])} and the language model "
      f"{got.get(wrong[0])}; give both the same models.TransformerConfig."
    )
  head = Head(model.config, model.bias).init(key, jnp.zeros((1, model.config.width)))["params"]
  return {"trunk": trunk, "head": nn.unbox(head)}
