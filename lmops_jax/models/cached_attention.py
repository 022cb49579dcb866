"""Attention of new positions over keys and values of earlier calls, and over some for all rows.

Keys that all rows of a batch see are held once (`Shared`); their part of the softmax is joined with
the part of a row's own keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.models.attention_scores import (
  MASKED,
  Part,
  alibi,
  grouped,
  in_chunks,
  partial_attention,
  softmax_attention,
)
from lmops_jax.models.cache import Adaptive, Prefix
from lmops_jax.models.partitioning import on_one_cpu

_WHOLE_BYTES = 1 << 25  # most bytes of scores over shared keys that one CPU device makes at once
_BLOCK_QUERIES, _BLOCK_KEYS = 256, 512  # sizes of the blocks if there are more


class Shared(NamedTuple):
  """Keys and values that all rows of a batch see, held once.

  Attributes:
    keys: `[1,K,P,E]`.
    values: like `keys`.
    valid: `[1,P] bool`, False for keys that nothing sees.
    positions: `[1,P] int32`, positions of the keys.
    at: `[B,S] int32`, positions of the queries.
    own_weight: `[]`, added to the scores of a row's own keys.
    window: number of latest positions that a query sees, itself included; None for all.
    adaptive: how the shared keys are weighed, with one layer's front; None is 1.
  """

  keys: jax.Array
  values: jax.Array
  valid: jax.Array
  positions: jax.Array
  at: jax.Array
  own_weight: jax.Array | float = 0.0
  window: int | None = None
  adaptive: Adaptive | None = None

  def astype(self, dtype) -> Shared:
    """With keys and values of another type."""
    adaptive = self.adaptive
    if adaptive is not None:
      adaptive = adaptive._replace(
        keys=adaptive.keys.astype(dtype), values=adaptive.values.astype(dtype))
    return self._replace(
      keys=self.keys.astype(dtype), values=self.values.astype(dtype), adaptive=adaptive)

  def visible(self) -> tuple[jax.Array, jax.Array]:
    """`visible_shared` for these keys and queries."""
    return visible_shared(self.valid, self.positions, self.at, self.window)


def of_layer(prefix: Prefix, i: int, at, window: int | None) -> Shared:
  """The i-th layer's keys and values in front of queries at the positions `at [B,S]`."""
  cache, adaptive = prefix.cache, prefix.adaptive
  if adaptive is not None:
    adaptive = adaptive._replace(keys=adaptive.keys[i], values=adaptive.values[i])
  return Shared(
    cache.keys[i], cache.values[i], cache.valid, cache.positions, at, prefix.own_weight, window,
    adaptive)


def visible_shared(valid, positions, at, window: int | None) -> tuple[jax.Array, jax.Array]:
  """Which shared keys queries at the positions `at [B,S]` see, see `Shared`.

  Returns:
    mask `[B,S,P] bool` and distance `[B,S,P] int32`, key position minus query position.
  """
  distance = positions[:, None, :] - at[:, :, None]
  mask = jnp.broadcast_to(valid[:, None, :], distance.shape)
  if window is not None:
    mask = mask & (-distance < window)
  return mask, distance


def shared_in_blocks() -> bool:
  """Whether scores over many shared keys are never in memory as a whole, see `_over_shared`."""
  return on_one_cpu()


def cached_attention(
  q, keys, values, mask, distance, slopes=None, shared: Shared | None = None
) -> jax.Array:
  """Attention `[B,S,H,E]` of new positions over slots of a cache.

  Args:
    q: `[B,S,H,E]`.
    keys: `[B,K,M,E]`.
    values: like `keys`.
    mask: `[B,S,M] bool`, which slots a query sees.
    distance: `[B,S,M]`, key position minus query position; read for ALiBi only.
    slopes: ALiBi's `[H] float32`, or None.
    shared: more keys and values, which all rows see, or None.
  """
  q_BKGSE = grouped(q, keys.shape[1])
  mask = mask[:, None, None]
  bias = None if slopes is None else alibi(slopes, keys.shape[1], distance[:, None, None])
  if shared is None:
    out = softmax_attention(q_BKGSE, keys, values, mask, bias)
  else:
    bias = shared.own_weight if bias is None else shared.own_weight + bias
    part = _joined(
      partial_attention(q_BKGSE, keys, values, mask, bias), _before(q, shared, slopes))
    out = (part.out / part.total).astype(values.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _joined(a: Part, b: Part) -> Part:
  largest = jnp.maximum(a.largest, b.largest)
  of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
  return Part(largest, a.total * of_a + b.total * of_b, a.out * of_a + b.out * of_b)


def _before(q, shared: Shared, slopes):
  """The `Part` of all that stands before the rows."""
  how = shared.adaptive
  if how is None:
    return _over_shared(q, shared, slopes)
  cooled = 1 / how.temperature
  texts = _over_shared(
    (q * cooled).astype(q.dtype), shared, None if slopes is None else slopes * cooled)
  logarithm = texts.largest + jnp.log(texts.total)
  weighed = Part(logarithm * how.power, jnp.ones_like(texts.total), texts.out / texts.total)
  if not how.positions.shape[1]:
    return weighed
  front = Shared(
    how.keys, how.values, jnp.ones(how.positions.shape, bool), how.positions, shared.at,
    window=shared.window)
  return _joined(_over_shared(q, front, slopes), weighed)


def _over_shared(q, shared: Shared, slopes):
  """`Part` `[B,K,G,S,...]` over shared keys, computed with all rows' queries as those of one row.

  One CPU device computes it in blocks whose scores its caches hold. Through memory, scores over
  31,744 keys take 1.7 times as long on two cores.
  """
  b, s, h, e = q.shape
  kv_heads, num_keys = shared.keys.shape[1:3]
  q_1KGNE = grouped(q.reshape(1, b * s, h, e), kv_heads)
  row = shared._replace(at=shared.at.reshape(1, -1))
  if not shared_in_blocks() or 4 * b * s * h * num_keys <= _WHOLE_BYTES:
    part = _over_keys(q_1KGNE, row, slopes)
  else:
    part = _over_blocks(q_1KGNE, row, slopes)
  return jax.tree.map(
    lambda x: x.reshape(*x.shape[1:3], b, s, x.shape[-1]).transpose(2, 0, 1, 3, 4), part)


def _over_keys(q_1KGNE, shared: Shared, slopes):
  mask, distance = (x[:, None, None] for x in shared.visible())
  bias = None if slopes is None else alibi(slopes, shared.keys.shape[1], distance)
  return partial_attention(q_1KGNE, shared.keys, shared.values, mask, bias)


def _over_blocks(q_1KGNE, shared: Shared, slopes):
  """`_over_keys`, a block of queries at a time over a block of keys at a time."""
  wide = jnp.promote_types(q_1KGNE.dtype, jnp.float32)
  num_queries, num_keys = q_1KGNE.shape[3], shared.keys.shape[2]
  num_block_queries, num_block_keys = min(_BLOCK_QUERIES, num_queries), min(_BLOCK_KEYS, num_keys)

  def of_queries(inputs):
    q_1KGNE, at = inputs

    def go_on(part, first):
      start = jnp.minimum(first, num_keys - num_block_keys)
      keys, values, valid, positions = (
        jax.lax.dynamic_slice_in_dim(x, start, num_block_keys, axis)
        for x, axis in ((shared.keys, 2), (shared.values, 2), (shared.valid, 1),
                        (shared.positions, 1)))
      valid = valid & (start + jnp.arange(num_block_keys) >= first)  # the last block reaches back
      block = Shared(keys, values, valid, positions, at, window=shared.window)
      return _joined(part, _over_keys(q_1KGNE, block, slopes)), None

    one = (*q_1KGNE.shape[:4], 1)
    nothing = Part(
      jnp.full(one, MASKED, wide), jnp.zeros(one, wide), jnp.zeros(q_1KGNE.shape, wide))
    return jax.lax.scan(go_on, nothing, jnp.arange(0, num_keys, num_block_keys))[0]

  part = jax.lax.map(of_queries, (
    in_chunks(q_1KGNE, 3, num_block_queries), in_chunks(shared.at, 1, num_block_queries)))

  def together(x):  # [n,1,K,G,block,...] to [1,K,G,N,...]
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :num_queries]

  return jax.tree.map(together, part)
