"""Sums over micro-batches and devices, against the sum over all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.mesh.micro_batches import DeviceRows, sum_over_micro_batches

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 4)).astype(np.float32)
BATCH = {"x": RNG.normal(size=(16, 3)).astype(np.float32)}
WEIGHTS = RNG.uniform(size=16).astype(np.float32)


def _gradient_and_rows(w, batch, weights):
  def loss(w):
    rows = jnp.sum(jnp.tanh(batch["x"] @ w) ** 2, axis=1)
    return jnp.vdot(weights, rows), rows

  return jax.grad(loss, has_aux=True)(w)


def _sum(size, device_rows=None, sharding=None):
  batch, weights = BATCH, WEIGHTS
  if sharding is not None:
    batch, weights = jax.device_put((batch, weights), sharding)

  @jax.jit
  def summed(w, batch, weights):
    return sum_over_micro_batches(_gradient_and_rows, w, batch, weights, size, device_rows)

  return summed(W, batch, weights)


@pytest.mark.parametrize("size", [1, 4, 8, 16, 99, None])
def test_any_size_gives_the_sum_and_the_rows_in_order(size):
  for got, want in zip(_sum(size), _gradient_and_rows(W, BATCH, WEIGHTS)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("size", [1, 8, None])
def test_devices_first_gives_the_same(sizes, size):
  mesh = MeshConfig(*sizes).build().mesh
  device_rows = DeviceRows(mesh, ("data", "fsdp"))
  rows = NamedSharding(mesh, PartitionSpec(device_rows.axes))
  for got, want in zip(_sum(size, device_rows, rows), _gradient_and_rows(W, BATCH, WEIGHTS)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_rows, size, own", [
  (64, 16, 2), (64, None, None), (64, 4, 1), (24, 16, 1), (48, 32, 3), (16, 99, 2)])
def test_micro_batches_of_a_device_are_its_share(num_rows, size, own):
  """On eight devices; 48 rows in micro-batches of 32 are six a device, which four do not divide."""
  device_rows = DeviceRows(MeshConfig(8).build().mesh, ("data",))
  assert device_rows.size(num_rows, size) == own
