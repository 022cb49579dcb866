"""The parts of all kinds of attention: who sees whom, scores, and their softmax over values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lmops_jax.models.products import matrix_product, product_of_rows

MASKED = -1e30  # finite, so that no derivative of the softmax is 0 * inf
_LARGEST = "attention_largest"  # what `keep_largest` finds

# Policy of `jax.checkpoint` that keeps each row's largest score, so that only scores and their
# exponentials are computed twice.
keep_largest = jax.checkpoint_policies.save_only_these_names(_LARGEST)


class Pattern(NamedTuple):
  """Who sees whom, besides segments.

  Attributes:
    causal: a position sees no later ones.
    window: number of latest positions that a position sees, itself included; None for all.
    slopes: ALiBi's `[H] float32`, or None.
  """

  causal: bool = True
  window: int | None = None
  slopes: np.ndarray | None = None


CAUSAL = Pattern()


def grouped(q, kv_heads):
  """`[B,S,H,E]` to `[B,K,G,S,E]`, with the G query heads that share a key head."""
  return q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)


def masked_scores(q_BKGSE, k_BKME, mask, bias):
  """Scores `[B,K,G,S,M]`, at least float32; `mask` and `bias`, or None, broadcast to them."""
  # Query heads of a group are rows of one product: XLA then multiplies without copies.
  q_BKRE = q_BKGSE.reshape(*q_BKGSE.shape[:2], -1, q_BKGSE.shape[-1])
  scores = product_of_rows(q_BKRE, k_BKME, jnp.promote_types(q_BKRE.dtype, jnp.float32))
  scores = scores.reshape(*q_BKGSE.shape[:4], -1) * q_BKGSE.shape[-1]**-0.5
  return jnp.where(mask, scores if bias is None else scores + bias, MASKED)


class Part(NamedTuple):
  """Attention over some keys before its division: all that is needed to join it with other parts.

  So keys may be read in blocks or lie on several devices, each of which adds up its own, and no row
  of scores is ever put together.

  Attributes:
    largest: `[...,1]`, the largest score.
    total: `[...,1]`, the sum of `exp(score - largest)`.
    out: `[...,E]`, the values summed with those weights.
  """

  largest: jax.Array
  total: jax.Array
  out: jax.Array


def partial_attention(q_BKGSE, k_BKME, v_BKME, mask, bias=None, drop=None) -> Part:
  """The part for the arguments of `softmax_attention`; a bias may also be one number."""
  scores = masked_scores(q_BKGSE, k_BKME, mask, bias)
  largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  largest = checkpoint_name(largest, _LARGEST)  # before its use, which is what is computed twice
  weights = jnp.exp(scores - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  kept = weights if drop is None else drop(weights)
  out = summed(kept, v_BKME, weights.dtype).reshape(q_BKGSE.shape)
  return Part(largest, total, out)


def softmax_attention(q_BKGSE, k_BKME, v_BKME, mask, bias=None, drop=None):
  """Attention of some queries over some keys; `mask`, `bias` broadcast to `[B,K,G,S,M]`.

  The sum over values is divided, not each weight (FlashAttention, arXiv:2205.14135): backwards too
  a row of scores is then summed over the width of a head instead of over all keys.

  `drop` multiplies weights, of that shape, by numbers of its own.
  """
  found = partial_attention(q_BKGSE, k_BKME, v_BKME, mask, bias, drop)
  return (found.out / found.total).astype(v_BKME.dtype)


def summed(weights, v_BKME, dtype):
  """Values `[B,K,G*S,E]` summed with the weights `[B,K,G,S,M]`, in `dtype` or their own."""
  weights = weights.astype(v_BKME.dtype).reshape(*weights.shape[:2], -1, weights.shape[-1])
  return matrix_product(weights, v_BKME, dtype)


def heads_first(q, k, v):
  """`[B,K,G,S,E]`, with the G query heads that share a key head, and twice `[B,K,S,E]`.

  Batched products want the batch axes first; moving them once is cheaper than once a product.
  """
  return grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)


def visible(query_index, key_index, query_segments, key_segments, pattern):
  """Which keys each query sees, `[1 or B, 1, 1, s, M] bool`."""
  distance = key_index[None, :] - query_index[:, None]
  mask = jnp.ones((1, *distance.shape), bool)
  if pattern.causal:
    mask = (distance <= 0)[None]
  if pattern.window is not None:
    mask = mask & (jnp.abs(distance) < pattern.window)[None]
  if query_segments is not None:
    mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
  return mask[:, None, None]


def distance_bias(query_index, key_index, pattern, kv_heads):
  """ALiBi's `[K,G,s,M] float32`, or None."""
  if pattern.slopes is None:
    return None
  return alibi(pattern.slopes, kv_heads, key_index[None, :] - query_index[:, None])


def added(*biases):
  """The sum of those biases that are not None, or None."""
  some = [bias for bias in biases if bias is not None]
  return sum(some[1:], some[0]) if some else None


def alibi(slopes, kv_heads, distance):
  """`slope * -|distance|`, with heads as `[K,G,1,1]` in front of the last two axes."""
  slopes = slopes.reshape(kv_heads, -1, 1, 1)
  return slopes * -jnp.abs(distance).astype(jnp.float32)


def in_chunks(x, axis, chunk):
  """Pads and cuts an axis; the chunks come first, `[n,...,chunk,...]`."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % chunk)
  x = jnp.pad(x, padding)
  x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)
