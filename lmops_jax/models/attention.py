"""Self-attention, one function for each kind that a configuration can name.

- `xla`: scores written out, `[B,H,S,S]` in memory, differentiable to any order. Fastest for short
  sequences on a CPU.
- `chunked`: queries in blocks, whose scores are computed again backwards (Rabe & Staats 2021,
  arXiv:2112.05682), so memory grows linearly in the length. Plain jax operations: differentiable
  to any order, also `jax.jvp` of `jax.grad`. Keys beyond a block's last query are left out in
  steps of an eighth. On one CPU the blocks are those of one row and key head at a time, whose
  scores its caches hold, unless there is a table of biases; see `queries_at_a_time`.
- `cudnn`: fused kernel on NVIDIA GPUs. First derivatives only.
- `splash`: fused kernel on TPUs. First derivatives only.

All take `q [B,S,H,E]` and `k, v [B,S,K,E]` with `H` a multiple of `K`, and return `[B,S,H,E]`.
Query head `h` reads key head `h // (H // K)`. A position sees itself and, within its own segment
and window, earlier positions, or all positions if attention is not causal. ALiBi adds to a score
the head's slope times the (negative) distance. Softmax is float32. Only `xla` and `chunked` drop
probabilities at random. For keys and values of earlier calls see `cached_attention`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.models.attention_scores import (
  CAUSAL,
  Pattern,
  added,
  distance_bias,
  heads_first,
  in_chunks,
  keep_largest,
  partial_attention,
  softmax_attention,
  visible,
)
from lmops_jax.models.dropout import dropped_probabilities
from lmops_jax.models.fused_attention import cudnn, first_order_only, splash_sharded
from lmops_jax.models.partitioning import on_one_cpu, platform_in_use
from lmops_jax.models.prefixes import prefixes, turned, with_turned_gradient

ATTENTION_KINDS = ("xla", "chunked", "cudnn", "splash")
_PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}
_NUM_PREFIXES = 8  # chunked: keys are cut to the causal prefix in this many steps


def supports_forward_mode(kind: str) -> bool:
  """Whether `jax.jvp`, and so a Hessian-vector product, passes through this kind.

  Raises:
    ValueError: for a kind that does not exist.
  """
  _check_known(kind)
  return kind in ("xla", "chunked")


def check_platform(kind: str, platform: str | None = None) -> None:
  """Raises ValueError if the kind does not exist or does not run on the platform.

  Args:
    kind: one of `ATTENTION_KINDS`.
    platform: "cpu", "gpu", "cuda" or "tpu"; None is that of the mesh in use, or else the default.
  """
  _check_known(kind)
  if kind not in _PLATFORMS:
    return
  platform = platform or platform_in_use()
  if platform not in _PLATFORMS[kind]:
    raise ValueError(
      f"attention={kind!r} needs a {_PLATFORMS[kind][0]} and this program runs on {platform!r}; "
      "set models.TransformerConfig.attention to 'xla' or 'chunked'."
    )


def check_dropout(kind: str, rate: float) -> None:
  """Raises ValueError if attention of this kind should drop probabilities and cannot."""
  if rate and kind in _PLATFORMS:
    raise ValueError(
      f"attention={kind!r} has no dropout and models.TransformerConfig.attention_dropout={rate}; "
      "set the latter to 0, or attention to 'xla' or 'chunked'."
    )


def check_bias(kind: str) -> None:
  """Raises ValueError if attention of this kind takes no table of biases."""
  if kind in _PLATFORMS:
    raise ValueError(
      f"attention={kind!r} takes no relative biases; set models.TransformerConfig.attention to "
      "'xla' or 'chunked', or relative_buckets to 0."
    )


def queries_at_a_time(chunk: int, length: int) -> int:
  """Queries a block of chunked attention where a CPU takes one head at a time: `chunk` or more.

  An eighth of the sequence needs no loop over the blocks of a prefix; fewer than 256 are products
  so small that threads mostly wait for each other. Without a bound, here 512, memory would grow
  with the square of the length.
  """
  eighth, quarter = -(-length // _NUM_PREFIXES), -(-length // 4)
  return max(chunk, min(max(eighth, min(quarter, 256)), 512))


def self_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  pattern: Pattern = CAUSAL,
  kind: str = "xla",
  chunk: int = 128,
  dropout: float = 0.0,
  keys: jax.Array | None = None,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Attention `[B,S,H,E]` of a sequence to itself, scores scaled by `E ** -0.5`.

  Args:
    q: `[B,S,H,E]`.
    k: `[B,S,K,E]`, `K` divides `H`.
    v: like `k`.
    segment_ids: `[B,S] int32`; attention stays within equal ids. None is one segment.
    pattern: who sees whom; distances are those of the sequence axis.
    kind: one of `ATTENTION_KINDS`.
    chunk: queries a block, for `chunked` only; a CPU may take more of one head.
    dropout: share of probabilities that are dropped, in [0, 1).
    keys: `[B]` typed keys of dropout, one for each example; None drops nothing.
    bias: `[H,S,S] float32`, added to the scaled scores of all rows, beside ALiBi's; or None.

  Raises:
    ValueError: for a kind that the platform lacks, or that cannot do the pattern, dropout or bias.
  """
  check_platform(kind)
  check_dropout(kind, dropout)
  if bias is not None:
    check_bias(kind)
    bias = bias.reshape(k.shape[2], -1, *bias.shape[1:])  # [K,G,S,S]

  if kind in ("xla", "chunked"):
    arrays = _Arrays(*heads_first(q, k, v), segment_ids, keys, bias, 0)
    if kind == "xla":
      out = _xla(arrays, pattern, dropout)
    else:
      out, total = _by_heads(arrays, pattern, dropout, chunk)
      out = (out / total).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)
  if kind == "splash" and pattern.slopes is not None:
    raise ValueError(
      "attention='splash' has no ALiBi positions; set models.TransformerConfig.attention to 'xla' "
      "or 'chunked'."
    )
  kernel = cudnn if kind == "cudnn" else splash_sharded
  kernel = functools.partial(kernel, pattern=pattern)
  return first_order_only(kernel, kind)(q, k, v, segment_ids)


def _check_known(kind: str) -> None:
  if kind not in ATTENTION_KINDS:
    raise ValueError(
      f"models.TransformerConfig.attention={kind!r} is not one of {', '.join(ATTENTION_KINDS)}."
    )


class _Arrays(NamedTuple):
  """What the plain kinds read.

  Attributes:
    q: `[B,K,G,S,E]`.
    k, v: `[B,K,S,E]`.
    segment_ids: `[B,S]`, or None.
    keys: `[B]`, those of dropout, or None.
    bias: `[K,G,S,S]`, or None.
    first_head: the number of the first of these K key heads.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  segment_ids: jax.Array | None
  keys: jax.Array | None
  bias: jax.Array | None
  first_head: jax.Array | int

  def drop(self, rate, query_index):
    """What drops probabilities of queries at these positions."""
    _, _, group, length, _ = self.q.shape
    return functools.partial(
      dropped_probabilities, keys=self.keys, rate=rate, query_index=query_index, num_keys=length,
      first_head=self.first_head * group)


def _xla(arrays, pattern, dropout):
  """Attention `[B,K,G,S,E]`."""
  index = jnp.arange(arrays.q.shape[3])
  mask = visible(index, index, arrays.segment_ids, arrays.segment_ids, pattern)
  bias = added(distance_bias(index, index, pattern, arrays.k.shape[1]), arrays.bias)
  drop = arrays.drop(dropout, index)
  return softmax_attention(arrays.q, arrays.k, arrays.v, mask, bias, drop)


def _by_heads(arrays, pattern, dropout, chunk):
  """As `_chunked`, on a CPU of one row and one key head at a time, whose scores its caches hold."""
  # The gradient of a table of biases would be added up in memory, whole, in every turn.
  if not on_one_cpu() or arrays.bias is not None:
    return _chunked(arrays, pattern, dropout, chunk)
  num_rows, num_heads, length = arrays.k.shape[:3]

  queries = queries_at_a_time(chunk, length)

  @functools.partial(jax.checkpoint, policy=keep_largest)
  def of_one(head, slopes, *rest):
    q, k, v, segment_ids, keys = jax.tree.map(lambda x: x[None], rest)
    one = _Arrays(q[None], k[None], v[None], segment_ids, keys, None, head)
    return tuple(x[0, 0] for x in _chunked(one, pattern._replace(slopes=slopes), dropout, queries))

  def attend(inputs):
    head, slopes, q, k, v, *rest = inputs
    # The columns stay outside of the checkpoint, which would keep them.
    return of_one(head, slopes, q, with_turned_gradient(*k), with_turned_gradient(*v), *rest)

  def of_each_row(x):
    return None if x is None else jnp.tile(x, (num_rows, *[1] * (x.ndim - 1)))

  def of_each_head(x):
    return None if x is None else jnp.repeat(x, num_heads, axis=0)

  def stacked(x):
    return x.reshape(-1, *x.shape[2:])

  def with_columns(x):
    return stacked(x), stacked(turned(x))

  slopes = None if pattern.slopes is None else jnp.reshape(pattern.slopes, (num_heads, -1))
  return tuple(x.reshape(*arrays.q.shape[:4], -1) for x in jax.lax.map(attend, (
    of_each_row(jnp.arange(num_heads)), of_each_row(slopes),
    stacked(arrays.q), with_columns(arrays.k), with_columns(arrays.v),
    of_each_head(arrays.segment_ids), of_each_head(arrays.keys))))


def _chunked(arrays, pattern, dropout, chunk):
  """Attention before its division, `[B,K,G,S,E]`, and what divides it, `[B,K,G,S,1]`."""
  q, k, v, segment_ids, _, bias, _ = arrays
  length = q.shape[3]
  num_chunks = -(-length // chunk)
  q_chunks = in_chunks(q, 3, chunk)
  segment_chunks = None if segment_ids is None else in_chunks(segment_ids, 1, chunk)
  bias_chunks = None if bias is None else in_chunks(bias, 2, chunk)
  outputs = []
  chunks_a_prefix = -(-num_chunks // _NUM_PREFIXES)
  firsts = range(0, num_chunks, chunks_a_prefix)
  lasts = [min(first + chunks_a_prefix, num_chunks) for first in firsts]
  lengths = [min(last * chunk, length) if pattern.causal else length for last in lasts]
  for first, last, keys, values in zip(firsts, lasts, prefixes(k, lengths), prefixes(v, lengths)):
    key_segments = None if segment_ids is None else segment_ids[:, : keys.shape[2]]

    @functools.partial(jax.checkpoint, policy=keep_largest)
    def one_chunk(inputs, keys=keys, values=values, key_segments=key_segments):
      i, q_chunk, query_segments, given = inputs
      query_index = i * chunk + jnp.arange(chunk)
      key_index = jnp.arange(keys.shape[2])
      mask = visible(query_index, key_index, query_segments, key_segments, pattern)
      bias = distance_bias(query_index, key_index, pattern, keys.shape[1])
      bias = added(bias, None if given is None else given[..., : keys.shape[2]])
      drop = arrays.drop(dropout, query_index)
      found = partial_attention(q_chunk, keys, values, mask, bias, drop)
      return found.out, found.total

    segments, biases = (
      None if x is None else x[first:last] for x in (segment_chunks, bias_chunks))
    inputs = (jnp.arange(first, last), q_chunks[first:last], segments, biases)
    if last - first == 1:  # alone, XLA on a CPU need not copy it into and out of stacks
      one = jax.tree.map(lambda x: x[0], inputs)
      outputs.append(tuple(x[None] for x in one_chunk(one)))
    else:
      outputs.append(jax.lax.map(one_chunk, inputs))

  def joined(parts):
    x = jnp.moveaxis(jnp.concatenate(parts), 0, 3)  # [B,K,G,n,chunk,...]
    return x.reshape(*q.shape[:3], num_chunks * chunk, -1)[:, :, :, :length]

  return tuple(joined(parts) for parts in zip(*outputs))
