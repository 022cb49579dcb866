"""Values of many rows in fixed-size batches."""

import jax
import numpy as np
import pytest

from lmops_jax.evaluation import examples
from lmops_jax.mesh import meshes


@pytest.mark.parametrize("num_rows", [0, 1, 4, 10])
def test_every_row_once_in_order_whatever_the_batch_size(num_rows):
  rows = {"x": np.arange(num_rows, dtype=np.float32), "y": np.ones((num_rows, 3), np.float32)}
  function = jax.jit(lambda params, batch: params * batch["x"] + batch["y"].sum(-1))
  for batch_size in (1, 4, 16):
    got = examples.map_examples(function, 2.0, rows, batch_size)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, 2 * np.arange(num_rows) + 3)


def test_compiles_once():
  shapes = []

  @jax.jit
  def function(params, batch):
    shapes.append(batch["x"].shape)
    return batch["x"]

  examples.map_examples(function, None, {"x": np.arange(10.0)}, 4)
  assert shapes == [(4,)]


def test_a_mesh_gives_the_same_values():
  partitioner = meshes.MeshConfig(data=jax.device_count()).build()
  n = 2 * jax.device_count()
  function = jax.jit(lambda params, batch: batch["x"] ** 2)
  rows = {"x": np.arange(n + 1, dtype=np.float32)}
  for batch_size in (n, 3):  # the latter is rounded up to what the mesh divides
    got = examples.map_examples(function, None, rows, batch_size, partitioner)
    np.testing.assert_array_equal(got, np.arange(n + 1.0) ** 2)
