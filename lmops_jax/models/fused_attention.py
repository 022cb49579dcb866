"""Attention by fused kernels: cudnn on NVIDIA GPUs, splash on TPUs. First derivatives only."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmops_jax.models.attention_scores import CAUSAL, distance_bias
from lmops_jax.models.partitioning import free_axes


def first_order_only(kernel: Callable, kind: str) -> Callable:
  """Wraps a kernel without forward rule, so that the error of differentiating it twice helps.

  Without the wrapper the failure comes from deep inside jax, for cudnn only at lowering.
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


def cudnn(q, k, v, segment_ids, pattern=CAUSAL):
  mask, bias, window = None, None, None
  if segment_ids is not None:
    mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  if pattern.slopes is not None:
    index = jnp.arange(q.shape[1])
    bias = distance_bias(index, index, pattern, q.shape[2])[None, :, 0].astype(q.dtype)
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


def splash_sharded(q, k, v, segment_ids, pattern=CAUSAL):
  """Splash attention on a mesh: XLA cannot split a Pallas kernel, so each device runs its own."""
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
