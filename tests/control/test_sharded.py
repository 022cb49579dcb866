"""One device and two, four or eight virtual ones give the same scores, whatever the mesh."""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.control import (
  SolveOptions,
  TrainingRun,
  mean_target_loss,
  pmp_scores,
  solve,
)
from lmops_jax.control.targets import MeanTargetLoss
from lmops_jax.mesh.checkpoints import CheckpointStore
from lmops_jax.mesh.meshes import BATCH_AXES, MeshConfig
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.sizing import hlo
from lmops_jax.sizing.solve_programs import segment_programs
from lmops_jax.training.losses import lm_example_losses

CONFIG = TransformerConfig(
  vocab_size=32, num_layers=1, width=16, num_heads=4, num_kv_heads=2, mlp_width=24)
LOSSES = lm_example_losses(Transformer(CONFIG))
# A large eps: Adam's first step is else the sign of the gradient, which multiplies rounding errors.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01, eps=1e-2))


def _sequences(seed, *shape):
  tokens = np.random.default_rng(seed).integers(0, 30, size=(*shape, 9)).astype(np.int32)
  mask = np.ones((*shape, 8), np.float32)
  mask[..., 6:] = tokens[..., :1] % 2
  return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "loss_mask": mask}


def _solve(partitioner=None, num_proxies=24, optimizer=OPTIMIZER, store=None, progress=None, **kw):
  """Three steps of 16 sequences, the proxies, 8 target sequences; placed on the mesh if given."""
  boxed = Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  params, batches = nn.unbox(boxed), _sequences(0, 3, 16)
  proxy, dev = _sequences(1, num_proxies), _sequences(2, 8)
  if partitioner is not None:
    params = jax.device_put(params, partitioner.shardings(boxed))
    place = lambda tree, *axes: jax.device_put(  # noqa: E731
      tree, NamedSharding(partitioner.mesh, PartitionSpec(*axes)))
    batches, proxy, dev = (
      place(batches, None, BATCH_AXES), place(proxy, BATCH_AXES), place(dev, BATCH_AXES))
  with partitioner.activate() if partitioner is not None else contextlib.nullcontext():
    device_rows = None if partitioner is None else partitioner.device_rows
    target_loss = mean_target_loss(LOSSES, dev, device_rows=device_rows)
    weights = np.full((3, 16), 1 / 16, np.float32)
    run = TrainingRun(LOSSES, optimizer, params, batches, weights, device_rows)
    return params, solve(
      run, target_loss, SolveOptions(**kw), proxy=proxy, store=store, progress=progress)


@pytest.fixture(scope="module")
def single():
  return _solve(groups=2)[1]


def _assert_close(got, want):
  for name in ("scores", "proxy_scores"):
    a, b = np.asarray(getattr(got, name)), np.asarray(getattr(want, name))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-4)
  np.testing.assert_allclose(got.target_losses, want.target_losses, rtol=1e-6)
  for name in ("costate_norms", "target_grad_norms"):
    np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, want.params)


@pytest.mark.parametrize("sizes, reduction, kw", [
  ((4, 2, 1), "step", dict(trajectory=2, micro_batch_size=8, proxy_batch_size=8)),
  ((2, 2, 2), "auto", dict(trajectory="host")),
  *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    ((8, 1, 1), "auto", dict()),
    ((8, 1, 1), "layer", dict()),
    ((4, 2, 1), "auto", dict(trajectory=2, micro_batch_size=8, proxy_batch_size=8)),
    ((2, 2, 2), "step", dict(trajectory="host")),
    ((2, 1, 1), "auto", dict(proxy_batch_size=8)),
    ((2, 2, 1), "auto", dict()),
  )),
])
def test_meshes_agree_with_one_device(single, sizes, reduction, kw):
  rules = "sharded" if sizes[1] > 1 else "default"
  partitioner = MeshConfig(*sizes, rules=rules, reduction=reduction).build(
    jax.devices()[:math.prod(sizes)])
  params, got = _solve(partitioner, groups=2, **kw)
  _assert_close(got, single)
  for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(params)):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_surrogate_takes_the_width_of_whole_arrays():
  """Not of a device's part of a parameter."""
  kw = dict(optimizer=optax.lion(1e-3), surrogate="clipped_straight_through")
  partitioner = MeshConfig(2, 2, 2, rules="sharded").build()
  _assert_close(_solve(partitioner, **kw)[1], _solve(**kw)[1])


@pytest.mark.slow
def test_proxies_at_random_steps():
  """Five or six of the 16 proxies a step, which eight devices do not divide."""
  kw = dict(num_proxies=16, proxy_samples=2, sample_seed=3)
  _, want = _solve(**kw)
  _, got = _solve(MeshConfig(4, 2, reduction="step").build(), **kw)
  _assert_close(got, want)


@pytest.mark.parametrize("sizes", [
  pytest.param((8, 1, 1), marks=pytest.mark.slow), (1, 8, 1)])
def test_gradients_cross_the_mesh_once_a_step(sizes):
  """Four micro-batches a pass; the Hessian product and the target's gradient cross together."""
  def collectives(reduction):
    partitioner = MeshConfig(*sizes, reduction=reduction).build()
    boxed = jax.eval_shape(
      Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = partitioner.placed_shapes(boxed)

    def rows(*shape):
      sharding = partitioner.batch_sharding(len(shape) + 1, len(shape) - 1)
      return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*shape, 8), x.dtype, sharding=sharding), _sequences(0, 1))

    target = MeanTargetLoss(rows(32), LOSSES, 8, 32, partitioner.device_rows)
    weights = jax.ShapeDtypeStruct((1, 32), jnp.float32, sharding=partitioner.replicated)
    with partitioner.activate():
      lowered = segment_programs(
        TrainingRun(LOSSES, optax.sgd(0.1), params, rows(1, 32), weights, partitioner.device_rows),
        target, rows(32), SolveOptions(micro_batch_size=8, proxy_batch_size=8)).reverse()
    found = hlo.count(lowered.compile().as_text()).collectives
    num_bytes = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))
    on_devices = lowered.as_text().count("manual_computation")
    return {kind: c.num_bytes / num_bytes for kind, c in found.items()}, on_devices

  (by_step, on_devices), (by_layer, _) = collectives("step"), collectives("layer")
  assert by_step["all-reduce"] == pytest.approx(2, abs=0.05)  # H u and grad J
  assert by_layer["all-reduce"] >= 8
  # The segment's own steps again, both gradients, and the proxies' slopes, which cross as numbers.
  assert on_devices == 3
  if sizes[1] > 1:  # parameters and direction, for both gradients and for the proxies
    assert by_step["all-gather"] <= 4.1 < by_layer["all-gather"]


def test_rows_that_the_devices_do_not_divide_are_refused():
  rows = MeshConfig(8).build().device_rows
  with pytest.raises(ValueError, match="8 devices, which do not divide the 12 rows of data"):
    mean_target_loss(LOSSES, _sequences(0, 12), device_rows=rows)
  params = nn.unbox(Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  for batch_size, num_proxies, name in ((4, 8, "4 rows of batches"), (8, 9, "9 rows of proxy")):
    with pytest.raises(ValueError, match=name):
      pmp_scores(
        LOSSES, mean_target_loss(LOSSES, _sequences(0, 8)), OPTIMIZER, params["params"],
        _sequences(1, 2, batch_size), None, proxy=_sequences(2, num_proxies), device_rows=rows)


@pytest.mark.slow
def test_resumable_solve_on_a_mesh_and_then_on_another(single, tmp_path):
  partitioner = MeshConfig(2, 2, 2, rules="sharded").build()

  def resumable(mesh, folder, stop_at=None):
    def advance(done, _):
      if done == stop_at:
        raise KeyboardInterrupt

    with contextlib.closing(CheckpointStore(tmp_path / folder, keep_steps=(1,))) as store:
      return _solve(mesh, groups=2, segment_steps=2, store=store, progress=advance)[1]

  whole = resumable(partitioner, "whole")
  _assert_close(whole, single)
  for stop_at in (1, 3):  # in the forward and in the reverse pass
    for folder in ("same", "other"):
      with pytest.raises(KeyboardInterrupt):
        resumable(partitioner, f"{folder}{stop_at}", stop_at)
    again = resumable(partitioner, f"same{stop_at}")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
                 again, whole)
    _assert_close(resumable(MeshConfig(1, 4, 2).build(), f"other{stop_at}"), single)
