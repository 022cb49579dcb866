"""Self-attention, one function for each kind that a configuration can name.

- `xla`: scores written out, `[B,H,S,S]` in memory, differentiable to any order. Fastest for short
  sequences on a CPU.
- `chunked`: queries in blocks, each block rematerialised (Rabe & Staats 2021, arXiv:2112.05682),
  so memory grows linearly in the length. Plain jax operations: differentiable to any order, also
  `jax.jvp` of `jax.grad`. Keys beyond a block's last query are left out in steps of an eighth.
- `cudnn`: fused kernel on NVIDIA GPUs. First derivatives only.
- `splash`: fused kernel on TPUs. First derivatives only.

All take `q [B,S,H,E]` and `k, v [B,S,K,E]` with `H` a multiple of `K`, and return `[B,S,H,E]`.
Query head `h` reads key head `h // (H // K)`. A position sees itself and, within its own segment
and window, earlier positions, or all of them where attention is not causal. ALiBi adds to a score
the head's slope times the (negative) distance. Softmax is float32. `cached_attention` is the one
for keys and values of earlier calls. Left out: dropout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmops_jax.models.partitioning import free_axes, platform_in_use

ATTENTION_KINDS = ("xla", "chunked", "cudnn", "splash")
_PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}
_NUM_PREFIXES = 8  # chunked: keys are cut to the causal prefix in this many steps
_WHOLE_BYTES = 1 << 25  # of scores over shared keys that one CPU device computes at once
_BLOCK_QUERIES, _BLOCK_KEYS = 256, 512  # otherwise
_MASKED = -1e30  # finite, so that no derivative of the softmax is 0 * inf


def supports_forward_mode(kind: str) -> bool:
  """Whether `jax.jvp`, and so a Hessian-vector product, passes through this kind.

  Raises:
    ValueError: for a kind that does not exist.
  """
  _check_known(kind)
  return kind in ("xla", "chunked")


def check_platform(kind: str, platform: str | None = None) -> None:
  """Raises ValueError when the kind does not exist or does not run on the platform.

  Args:
    kind: one of `ATTENTION_KINDS`.
    platform: "cpu", "gpu", "cuda" or "tpu"; None is that of the mesh in use, else the default one.
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


class Pattern(NamedTuple):
  """Who sees whom, besides segments.

  Attributes:
    causal: a position sees no later ones.
    window: latest positions seen, itself included; None for all.
    slopes: ALiBi's `[H] float32`, or None.
  """

  causal: bool = True
  window: int | None = None
  slopes: np.ndarray | None = None


CAUSAL = Pattern()


def self_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  pattern: Pattern = CAUSAL,
  kind: str = "xla",
  chunk: int = 128,
) -> jax.Array:
  """Attention `[B,S,H,E]` of a sequence to itself, scores scaled by `E ** -0.5`.

  Args:
    q: `[B,S,H,E]`.
    k: `[B,S,K,E]`, `K` divides `H`.
    v: like `k`.
    segment_ids: `[B,S] int32`; attention stays within equal ids. None is one segment.
    pattern: who sees whom; distances are those of the sequence axis.
    kind: one of `ATTENTION_KINDS`.
    chunk: queries a block, for `chunked` only.

  Raises:
    ValueError: for a kind that the platform lacks, or that cannot do the pattern.
  """
  check_platform(kind)
  if kind == "xla":
    return _xla(q, k, v, segment_ids, pattern)
  if kind == "chunked":
    return _chunked(q, k, v, segment_ids, pattern, chunk)
  if kind == "splash" and pattern.slopes is not None:
    raise ValueError(
      "attention='splash' has no ALiBi positions; set models.TransformerConfig.attention to 'xla' "
      "or 'chunked'."
    )
  kernel = _cudnn if kind == "cudnn" else _splash_sharded
  kernel = functools.partial(kernel, pattern=pattern)
  return first_order_only(kernel, kind)(q, k, v, segment_ids)


class Shared(NamedTuple):
  """Keys and values that all rows of a batch see, held once.

  Attributes:
    keys: `[1,K,P,E]`.
    values: like `keys`.
    valid: `[1,P] bool`, False for keys that nothing sees.
    positions: `[1,P] int32`, of the keys.
    at: `[B,S] int32`, positions of the queries.
    own_weight: `[]`, added to the scores of a row's own keys.
    window: latest positions that a query sees, itself included; None for all.
  """

  keys: jax.Array
  values: jax.Array
  valid: jax.Array
  positions: jax.Array
  at: jax.Array
  own_weight: jax.Array | float = 0.0
  window: int | None = None

  def visible(self) -> tuple[jax.Array, jax.Array]:
    """`visible_shared` of these."""
    return visible_shared(self.valid, self.positions, self.at, self.window)


def visible_shared(valid, positions, at, window: int | None) -> tuple[jax.Array, jax.Array]:
  """What queries at the positions `at [B,S]` see of keys of all rows, see `Shared`.

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
  mesh = jax.sharding.get_abstract_mesh()
  return platform_in_use() == "cpu" and (mesh.empty or mesh.size == 1)


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
    shared: more keys and values, of all rows.
  """
  q_BKGSE = _grouped(q, keys.shape[1])
  mask = mask[:, None, None]
  bias = None if slopes is None else _alibi(slopes, keys.shape[1], distance[:, None, None])
  if shared is None:
    out = _softmax_attention(q_BKGSE, keys, values, mask, bias)
  else:
    bias = shared.own_weight if bias is None else shared.own_weight + bias
    part = _joined(_part(q_BKGSE, keys, values, mask, bias), _over_shared(q, shared, slopes))
    out = (part.out / part.total).astype(values.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def first_order_only(kernel: Callable, kind: str) -> Callable:
  """Wraps a kernel without forward rule so that differentiating it twice says what to do.

  Without it the failure comes from deep inside jax, for cudnn only at lowering.
  """

  @jax.custom_jvp
  def barrier(x):
    return x

  @barrier.defjvp
  def _(primals, tangents):
    raise NotImplementedError(
      f"attention={kind!r} has first derivatives only and was differentiated in forward mode or "
      "twice; set models.TransformerConfig.attention to 'xla' or 'chunked' for this computation."
    )

  @jax.custom_vjp
  def wrapped(q, k, v, segment_ids):
    return kernel(q, k, v, segment_ids)

  def forward(q, k, v, segment_ids):
    q, k, v = barrier(q), barrier(k), barrier(v)
    return jax.vjp(lambda q, k, v: kernel(q, k, v, segment_ids), q, k, v)

  def backward(pullback, cotangent):
    return *pullback(barrier(cotangent)), None

  wrapped.defvjp(forward, backward)
  return wrapped


def _check_known(kind: str) -> None:
  if kind not in ATTENTION_KINDS:
    raise ValueError(
      f"models.TransformerConfig.attention={kind!r} is not one of {', '.join(ATTENTION_KINDS)}."
    )


def _grouped(q, kv_heads):
  """`[B,S,H,E]` to `[B,K,G,S,E]`, with the G query heads that share a key head."""
  return q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)


def _scores(q_BKGSE, k_BKME, mask, bias):
  """`[B,K,G,S,M] float32` at least; `mask` and `bias`, or None, broadcast to it."""
  # Query heads of a group are rows of one product: XLA then multiplies without copies.
  q_BKRE = q_BKGSE.reshape(*q_BKGSE.shape[:2], -1, q_BKGSE.shape[-1])
  scores = jnp.einsum(
    "bkre,bkme->bkrm", q_BKRE, k_BKME,
    preferred_element_type=jnp.promote_types(q_BKRE.dtype, jnp.float32),
  ).reshape(*q_BKGSE.shape[:4], -1)
  scores = scores * q_BKGSE.shape[-1]**-0.5
  return jnp.where(mask, scores if bias is None else scores + bias, _MASKED)


def _softmax_attention(q_BKGSE, k_BKME, v_BKME, mask, bias=None):
  """Attention of some queries over some keys; `mask`, `bias` broadcast to `[B,K,G,S,M]`."""
  probabilities = jax.nn.softmax(_scores(q_BKGSE, k_BKME, mask, bias), axis=-1)
  return _summed(probabilities, v_BKME, None).reshape(q_BKGSE.shape)


def _summed(weights, v_BKME, dtype):
  """Values `[B,K,G*S,E]` summed with the weights `[B,K,G,S,M]`, in `dtype` or their own."""
  weights = weights.astype(v_BKME.dtype).reshape(*weights.shape[:2], -1, weights.shape[-1])
  return jnp.einsum("bkrm,bkme->bkre", weights, v_BKME, preferred_element_type=dtype)


class _Part(NamedTuple):
  """Attention over some keys before its division: parts meet in these numbers alone.

  So keys may be read in blocks or lie on several devices, each of which adds up its own, and no row
  of scores is ever put together.

  Attributes:
    largest: `[...,1]`, of the scores.
    total: `[...,1]`, the sum of `exp(score - largest)`.
    out: `[...,E]`, the values summed with those weights.
  """

  largest: jax.Array
  total: jax.Array
  out: jax.Array


def _part(q_BKGSE, k_BKME, v_BKME, mask, bias):
  """Of the same arguments as `_softmax_attention`; a bias may also be one number."""
  scores = _scores(q_BKGSE, k_BKME, mask, bias)
  largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  out = _summed(weights, v_BKME, weights.dtype).reshape(q_BKGSE.shape)
  return _Part(largest, jnp.sum(weights, axis=-1, keepdims=True), out)


def _joined(a: _Part, b: _Part) -> _Part:
  largest = jnp.maximum(a.largest, b.largest)
  of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
  return _Part(largest, a.total * of_a + b.total * of_b, a.out * of_a + b.out * of_b)


def _over_shared(q, shared: Shared, slopes):
  """`_Part` `[B,K,G,S,...]` of the keys of all rows, whose queries are those of a single row here.

  One CPU device computes it in blocks whose scores its caches hold. Written and read through
  memory, those over 31,744 keys take 1.7 times as long on two cores.
  """
  b, s, h, e = q.shape
  kv_heads, num_keys = shared.keys.shape[1:3]
  q_1KGNE = _grouped(q.reshape(1, b * s, h, e), kv_heads)
  row = shared._replace(at=shared.at.reshape(1, -1))
  if not shared_in_blocks() or 4 * b * s * h * num_keys <= _WHOLE_BYTES:
    part = _over_keys(q_1KGNE, row, slopes)
  else:
    part = _over_blocks(q_1KGNE, row, slopes)
  return jax.tree.map(
    lambda x: x.reshape(*x.shape[1:3], b, s, x.shape[-1]).transpose(2, 0, 1, 3, 4), part)


def _over_keys(q_1KGNE, shared: Shared, slopes):
  mask, distance = (x[:, None, None] for x in shared.visible())
  bias = None if slopes is None else _alibi(slopes, shared.keys.shape[1], distance)
  return _part(q_1KGNE, shared.keys, shared.values, mask, bias)


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
    nothing = _Part(
      jnp.full(one, _MASKED, wide), jnp.zeros(one, wide), jnp.zeros(q_1KGNE.shape, wide))
    return jax.lax.scan(go_on, nothing, jnp.arange(0, num_keys, num_block_keys))[0]

  part = jax.lax.map(of_queries, (
    _in_chunks(q_1KGNE, 3, num_block_queries), _in_chunks(shared.at, 1, num_block_queries)))

  def together(x):  # [n,1,K,G,block,...] to [1,K,G,N,...]
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :num_queries]

  return jax.tree.map(together, part)


def _heads_first(q, k, v):
  """`[B,K,G,S,E]`, with the G query heads that share a key head, and twice `[B,K,S,E]`.

  Batched products want the batch axes first; moving them once is cheaper than once a product.
  """
  return _grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _mask(query_index, key_index, query_segments, key_segments, pattern):
  """`[1 or B, 1, 1, s, M] bool`."""
  distance = key_index[None, :] - query_index[:, None]
  mask = jnp.ones((1, *distance.shape), bool)
  if pattern.causal:
    mask = (distance <= 0)[None]
  if pattern.window is not None:
    mask = mask & (jnp.abs(distance) < pattern.window)[None]
  if query_segments is not None:
    mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
  return mask[:, None, None]


def _bias(query_index, key_index, pattern, kv_heads):
  """ALiBi's `[K,G,s,M] float32`, or None."""
  if pattern.slopes is None:
    return None
  return _alibi(pattern.slopes, kv_heads, key_index[None, :] - query_index[:, None])


def _alibi(slopes, kv_heads, distance):
  """`slope * -|distance|`, with heads as `[K,G,1,1]` in front of the last two axes."""
  slopes = slopes.reshape(kv_heads, -1, 1, 1)
  return slopes * -jnp.abs(distance).astype(jnp.float32)


def _xla(q, k, v, segment_ids, pattern):
  index = jnp.arange(q.shape[1])
  mask = _mask(index, index, segment_ids, segment_ids, pattern)
  bias = _bias(index, index, pattern, k.shape[2])
  out = _softmax_attention(*_heads_first(q, k, v), mask, bias)
  return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _in_chunks(x, axis, chunk):
  """Pads and cuts an axis; the chunks come first, `[n,...,chunk,...]`."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % chunk)
  x = jnp.pad(x, padding)
  x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _chunked(q, k, v, segment_ids, pattern, chunk):
  shape, length = q.shape, q.shape[1]
  num_chunks = -(-length // chunk)
  q, k, v = _heads_first(q, k, v)

  q_chunks = _in_chunks(q, 3, chunk)
  segment_chunks = None if segment_ids is None else _in_chunks(segment_ids, 1, chunk)
  outputs = []
  chunks_a_prefix = -(-num_chunks // _NUM_PREFIXES)
  for first in range(0, num_chunks, chunks_a_prefix):
    last = min(first + chunks_a_prefix, num_chunks)
    prefix = min(last * chunk, length) if pattern.causal else length
    keys, values = k[:, :, :prefix], v[:, :, :prefix]
    key_segments = None if segment_ids is None else segment_ids[:, :prefix]

    @jax.checkpoint
    def one_chunk(inputs, keys=keys, values=values, key_segments=key_segments):
      i, q_chunk, query_segments = inputs
      query_index = i * chunk + jnp.arange(chunk)
      key_index = jnp.arange(keys.shape[2])
      mask = _mask(query_index, key_index, query_segments, key_segments, pattern)
      bias = _bias(query_index, key_index, pattern, keys.shape[1])
      return _softmax_attention(q_chunk, keys, values, mask, bias)

    segments = None if segment_chunks is None else segment_chunks[first:last]
    inputs = (jnp.arange(first, last), q_chunks[first:last], segments)
    outputs.append(jax.lax.map(one_chunk, inputs))
  out = jnp.concatenate(outputs)  # [n,B,K,G,chunk,E]
  out = out.transpose(1, 0, 4, 2, 3, 5).reshape(shape[0], num_chunks * chunk, *shape[2:])
  return out[:, :length]


def _cudnn(q, k, v, segment_ids, pattern=CAUSAL):
  mask, bias, window = None, None, None
  if segment_ids is not None:
    mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  if pattern.slopes is not None:
    index = jnp.arange(q.shape[1])
    bias = _bias(index, index, pattern, q.shape[2])[None, :, 0].astype(q.dtype)
  if pattern.window is not None:
    window = (pattern.window - 1, 0 if pattern.causal else pattern.window - 1)
  return jax.nn.dot_product_attention(
    q, k, v, bias=bias, mask=mask, is_causal=pattern.causal, local_window_size=window,
    implementation="cudnn",
  )


def _splash(q, k, v, segment_ids, pattern):
  """One device's share. The kernel wants heads first and no scale."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, num_heads = q.shape[1:3]
  groups = num_heads // k.shape[2]
  shape = (length, length)
  mask = splash.CausalMask(shape) if pattern.causal else splash.FullMask(shape)
  if pattern.window is not None:
    ahead = 0 if pattern.causal else pattern.window - 1
    mask = splash.LocalMask(shape, (pattern.window - 1, ahead), 0)
  mask = splash.MultiHeadMask([mask] * num_heads)
  kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
  q = jnp.swapaxes(q * q.shape[-1] ** -0.5, 1, 2)
  k, v = (jnp.swapaxes(jnp.repeat(x, groups, axis=2), 1, 2) for x in (k, v))
  if segment_ids is None:
    out = jax.vmap(kernel)(q, k, v)
  else:
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
  return jnp.swapaxes(out, 1, 2)


def _splash_sharded(q, k, v, segment_ids, pattern=CAUSAL):
  """XLA cannot split a Pallas kernel, so each device of the mesh runs its own."""
  mesh, free = jax.sharding.get_abstract_mesh(), free_axes()
  if math.prod(mesh.shape[axis] for axis in free) == 1:
    return _splash(q, k, v, segment_ids, pattern)
  batch = tuple(axis for axis in ("data", "fsdp") if axis in free)
  heads = "tensor" if "tensor" in free else None
  spec = PartitionSpec(batch, None, heads, None)
  shard = functools.partial(
    jax.shard_map, mesh=mesh, out_specs=spec, axis_names=free, check_vma=False)
  if segment_ids is None:
    return shard(lambda *qkv: _splash(*qkv, None, pattern), in_specs=(spec,) * 3)(q, k, v)
  one = functools.partial(_splash, pattern=pattern)
  return shard(one, in_specs=(spec,) * 3 + (PartitionSpec(batch, None),))(q, k, v, segment_ids)
