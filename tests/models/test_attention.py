"""Attention kinds against a loop over positions, and against each other to second order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.mesh.meshes import MeshConfig, single_device
from lmops_jax.models import attention
from lmops_jax.models.attention import (
  ATTENTION_KINDS,
  check_platform,
  queries_at_a_time,
  self_attention,
  supports_forward_mode,
)
from lmops_jax.models.attention_scores import Pattern
from lmops_jax.models.fused_attention import first_order_only, splash_sharded
from tests.abstract_meshes import abstract_mesh

B, S, H, K, E = 2, 11, 4, 2, 6


def _inputs(seed=0, length=S):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, length, H, E)).astype(np.float32)
  k, v = rng.normal(size=(2, B, length, K, E)).astype(np.float32)
  segments = np.sort(rng.integers(0, 3, (B, length)), axis=1).astype(np.int32)
  return q, k, v, segments


def _loop(q, k, v, segments):
  """Position by position and head by head, float64."""
  out = np.zeros(q.shape)
  for b in range(q.shape[0]):
    for h in range(q.shape[2]):
      head = h // (q.shape[2] // k.shape[2])
      for s in range(q.shape[1]):
        seen = [m for m in range(s + 1) if segments is None or segments[b, m] == segments[b, s]]
        scores = np.array([q[b, s, h] @ k[b, m, head] for m in seen], np.float64) / E**0.5
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, seen, head]
  return out


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize(
  "kind,chunk", [("xla", 1), ("chunked", 1), ("chunked", 4), ("chunked", 64)]
)
def test_equals_a_loop_over_positions(kind, chunk, with_segments):
  q, k, v, segments = _inputs()
  segments = segments if with_segments else None
  got = jax.jit(functools.partial(self_attention, kind=kind, chunk=chunk))(q, k, v, segments)
  np.testing.assert_allclose(got, _loop(q, k, v, segments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_heads", [True, False])
def test_chunked_equals_xla_in_value_gradient_and_hessian_product(by_heads, monkeypatch):
  monkeypatch.setattr(attention, "on_one_cpu", lambda: by_heads)
  q, k, v, segments = _inputs(1, length=21)  # no multiple of the chunk, more chunks than prefixes
  tangents = jax.tree.map(jnp.asarray, _inputs(2, length=21)[:3])
  readout = np.random.default_rng(3).normal(size=q.shape).astype(np.float32)

  def all_orders(kind):
    def f(q, k, v):
      return jnp.vdot(readout, self_attention(q, k, v, segments, kind=kind, chunk=2) ** 2)

    grad = jax.grad(f, argnums=(0, 1, 2))
    return jax.jit(lambda *x: (f(*x), *jax.jvp(grad, x, tangents)))(q, k, v)

  for got, want in zip(
    jax.tree.leaves(all_orders("chunked")), jax.tree.leaves(all_orders("xla")), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("pattern, with_bias", [
  (Pattern(window=7, slopes=np.float32([0.5, 0.25, 0.1, 0.05])), False),
  (Pattern(causal=False), True)])
def test_chunked_equals_xla_for_each_head_and_row(pattern, with_bias):
  """Slopes and draws of dropout differ between heads, segments and draws between rows."""
  q, k, v, segments = _inputs(5)
  rng = np.random.default_rng(6)
  readout = rng.normal(size=q.shape).astype(np.float32)
  bias = rng.normal(size=(H, S, S)).astype(np.float32) if with_bias else None
  attend = functools.partial(
    self_attention, segment_ids=segments, pattern=pattern, chunk=4, dropout=0.3,
    keys=jax.random.split(jax.random.key(0), B))

  def gradients(kind):
    def f(q, k, v, bias):
      return jnp.vdot(readout, attend(q, k, v, kind=kind, bias=bias) ** 2)

    return jax.jit(jax.value_and_grad(f, (0, 1, 2, 3) if with_bias else (0, 1, 2)))(q, k, v, bias)

  got, want = gradients("chunked"), gradients("xla")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("platform, num_devices, own_rows, loops", [
  ("cpu", 1, False, True), ("cpu", 2, False, False), ("cpu", 2, True, True),
  ("gpu", 1, False, False)])
def test_heads_take_turns_where_one_cpu_runs_alone(platform, num_devices, own_rows, loops):
  """A device of several does so if it has rows of its own, in a `shard_map`."""
  mesh = abstract_mesh(platform, num_devices)
  q = jax.ShapeDtypeStruct((2, 8, 4, 16), jnp.float32)
  attend = lambda q: self_attention(q, q, q, kind="chunked", chunk=8)  # noqa: E731
  if own_rows:
    attend = jax.shard_map(attend, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
  with jax.sharding.use_abstract_mesh(mesh):
    trace = jax.make_jaxpr(attend)(q)
  equations = trace.jaxpr.eqns
  if own_rows:
    equations = equations[0].params["jaxpr"].eqns
  assert any(eqn.primitive.name == "scan" for eqn in equations) == loops


@pytest.mark.parametrize("chunk, length, queries", [
  (128, 300, 128), (128, 1000, 250), (128, 1024, 256), (16, 2048, 256), (128, 3000, 375),
  (128, 16384, 512), (1024, 16384, 1024)])
def test_a_cpu_takes_more_queries_of_one_head(chunk, length, queries):
  assert queries_at_a_time(chunk, length) == queries


def test_hessian_product_equals_finite_differences_in_float64():
  with jax.enable_x64(True):
    q, k, v, _ = (jnp.asarray(x, jnp.float64) for x in _inputs(4, length=5))

    def f(q):
      return jnp.sum(jnp.sin(self_attention(q, k, v, kind="chunked", chunk=2)))

    direction = jnp.cos(q)
    grad = jax.jit(jax.grad(f))
    _, hvp = jax.jvp(grad, (q,), (direction,))
    step = 1e-5
    central = (grad(q + step * direction) - grad(q - step * direction)) / (2 * step)
    np.testing.assert_allclose(hvp, central, rtol=1e-6, atol=1e-9)


def test_backwards_chunked_seeks_no_largest_score_again():
  q = jnp.zeros((1, 64, 2, 8))

  def attend(q):
    return jnp.sum(self_attention(q, q, q, kind="chunked", chunk=16))

  def count(f):
    program = str(jax.make_jaxpr(f)(q))
    return program.count(" reduce_max["), program.count(" exp ")

  (largest, exponentials), backwards = count(attend), count(jax.grad(attend))
  assert largest > 1 and backwards == (largest, 2 * exponentials)


def test_chunked_memory_grows_linearly_and_xla_quadratically(monkeypatch):
  def temp_bytes(kind, length, heads=1):
    shape = jax.ShapeDtypeStruct((heads, length, heads, 8), jnp.float32)
    grad = jax.grad(lambda q, k, v: jnp.sum(self_attention(q, k, v, kind=kind, chunk=64) ** 2))
    return jax.jit(grad).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

  # A head at a time, of which a CPU takes up to 512 queries.
  assert temp_bytes("chunked", 8192, 2) < 2.5 * temp_bytes("chunked", 4096, 2)
  assert temp_bytes("chunked", 2048, 2) < temp_bytes("xla", 2048, 2) / 4
  monkeypatch.setattr(attention, "on_one_cpu", lambda: False)
  assert temp_bytes("xla", 2048) > 3 * temp_bytes("xla", 1024)
  assert temp_bytes("chunked", 2048) < 2.5 * temp_bytes("chunked", 1024)
  assert temp_bytes("chunked", 2048) < temp_bytes("xla", 2048) / 4


def test_kernels_are_refused_where_they_do_not_run():
  q, k, v, _ = _inputs()
  for kind in ("cudnn", "splash"):
    with pytest.raises(ValueError, match=f"attention='{kind}' needs a .*set models.Trans"):
      self_attention(q, k, v, kind=kind)
    with pytest.raises(ValueError, match=f"attention='{kind}' needs a .*set models.Trans"):
      jax.jit(functools.partial(self_attention, kind=kind))(q, k, v)
    with MeshConfig(8).build().activate():
      with pytest.raises(ValueError, match=f"attention='{kind}' needs a .*set models.Trans"):
        jax.jit(functools.partial(self_attention, kind=kind))(q, k, v)
    assert not supports_forward_mode(kind)
  check_platform("cudnn", "gpu")
  check_platform("splash", "tpu")
  with pytest.raises(ValueError, match="needs a tpu and this program runs on 'gpu'"):
    check_platform("splash", "gpu")
  assert supports_forward_mode("xla") and supports_forward_mode("chunked")
  with pytest.raises(ValueError, match="'flash' is not one of xla, chunked, cudnn, splash"):
    self_attention(q, k, v, kind="flash")
  assert len(ATTENTION_KINDS) == 4


def test_first_order_kernels_refuse_second_derivatives_with_advice():
  q, k, v, segments = _inputs(5)

  def kernel(q, k, v, segment_ids):
    return self_attention(q, k, v, segment_ids)

  wrapped = first_order_only(kernel, "cudnn")

  def loss(attention):
    return lambda q: jnp.sum(attention(q, k, v, segments) ** 2)

  got, want = (jax.jit(jax.grad(loss(attention)))(q) for attention in (wrapped, kernel))
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
  with pytest.raises(NotImplementedError, match="attention='cudnn' has first derivatives only"):
    jax.jvp(jax.grad(loss(wrapped)), (q,), (q,))
  with pytest.raises(NotImplementedError, match="attention='cudnn' has first derivatives only"):
    jax.grad(lambda q: jnp.sum(jax.grad(loss(wrapped))(q)))(q)


@pytest.mark.parametrize("kind, platform", [("cudnn", "gpu"), ("cudnn", "cuda"), ("splash", "tpu")])
def test_the_platform_is_that_of_the_mesh_also_under_jit(kind, platform):
  mesh = abstract_mesh(platform)

  @jax.jit
  def attention(q):
    check_platform(kind)
    return self_attention(q, q, q, kind=kind) if kind == "splash" else q  # cudnn asks for a GPU

  q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    assert jax.eval_shape(attention, q).shape == q.shape


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_splash_lowers_for_tpu_with_its_gradient(sizes):
  """Each device of a mesh runs the kernel on its own examples and heads."""
  partitioner = MeshConfig(*sizes).build() if sizes else single_device()

  def grad(q, k, v, segments):
    return jax.grad(
      lambda q: jnp.sum(splash_sharded(q, k, v, segments).astype(jnp.float32))
    )(q)

  def array(shape, dtype, *spec):
    sharding = NamedSharding(partitioner.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  axes = (("data", "fsdp"), None, "tensor", None)
  q = array((8, 256, 4, 128), jnp.bfloat16, *axes)
  kv = array((8, 256, 2, 128), jnp.bfloat16, *axes)
  segments = array((8, 256), jnp.int32, *axes[:2])
  with partitioner.activate():
    exported = jax.export.export(jax.jit(grad), platforms=["tpu"])(q, kv, kv, segments)
  assert exported.out_avals[0].shape == (8, 256, 4, 128)
  assert "tpu_custom_call" in exported.mlir_module()
