"""The projection onto the simplex against its optimality conditions and a bisection in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmops_jax.control import project_simplex, stationarity_gap
from lmops_jax.control.simplex import METHODS

_PAPER = 1 / 4096 + 1e-3 * np.random.default_rng(2).normal(size=4096)
VECTORS = {
  "one_element": [3.7], "ties": [0.2, 0.2, 0.2, -5.0], "all_equal": [1.0] * 7,
  "inside": [0.1, 0.2, 0.7], "vertex": [0.0, 10.0, 0.0], "negative": [-3.0, -3.1, -9.0],
  "one_hot_times_5": [0.0, 0.0, 5.0, 0.0], "large": [1e6, 1e6 + 0.25, 1e6 - 3.0],
  "small": [1e-6, -1e-6, 3e-6, 0.0], "random": np.random.default_rng(0).normal(size=50),
  "thousands": 1e3 * np.random.default_rng(1).normal(size=50), "paper": _PAPER,
  "vertex_of_many": np.eye(50)[3],
  "edge_of_support": [0.5, 0.5, -0.5, -0.5],  # the last two are just 0: tau is -0.5
}
PROJECT = jax.jit(project_simplex, static_argnames="method")


def _by_bisection(values):
  values = np.asarray(values, np.float64)
  low, high = values.max() - 1, values.max()
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if np.maximum(values - middle, 0).sum() > 1 else (low, middle)
  return np.maximum(values - low, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VECTORS)
def test_projection(x64, name, method):
  v = np.asarray(VECTORS[name], np.float64)
  project = lambda x: np.asarray(PROJECT(x, method=method))  # noqa: E731
  gamma = project(v)
  assert gamma.dtype == np.float64
  np.testing.assert_allclose(gamma, _by_bisection(v), atol=1e-9)
  np.testing.assert_allclose(gamma.sum(), 1, atol=1e-12)
  assert (gamma >= 0).all()
  # KKT: v - gamma is a constant tau on the support and at most tau off it.
  tau = (v - gamma)[gamma > 0]
  np.testing.assert_allclose(tau, tau[0], atol=1e-9)
  assert ((v - gamma)[gamma == 0] <= tau[0] + 1e-9).all()
  np.testing.assert_allclose(project(gamma), gamma, atol=1e-12)  # idempotent
  np.testing.assert_allclose(project(v + 0.5), gamma, atol=1e-9)  # shift
  order = np.random.default_rng(1).permutation(len(v))
  np.testing.assert_allclose(project(v[order]), gamma[order], atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VECTORS)
def test_projection_in_float32(name, method):
  v = np.asarray(VECTORS[name], np.float32)
  got = np.asarray(PROJECT(v, method=method))
  want = _by_bisection(v)  # of the same numbers
  assert got.dtype == np.float32
  np.testing.assert_allclose(got.sum(dtype=np.float64), 1, atol=1e-6)
  np.testing.assert_allclose(got, want, atol=2e-7)
  assert (got >= 0).all()
  assert (got[want == 0] == 0).all() or name == "edge_of_support"


@pytest.mark.parametrize("method", METHODS)
def test_projection_keeps_its_digits_in_float32(method):
  got = project_simplex(np.float32([1e6, 1e6 + 0.25, 1e6 - 3]), method=method)
  np.testing.assert_allclose(got, [0.375, 0.625, 0.0], atol=1e-6)
  assert got[2] == 0


def test_projection_is_non_expansive_and_exactly_sparse(x64):
  a, b = np.random.default_rng(0).normal(size=(2, 20, 12))
  for method in METHODS:
    moved = np.linalg.norm(PROJECT(a, method=method) - PROJECT(b, method=method), axis=1)
    assert (moved <= np.linalg.norm(a - b, axis=1) + 1e-12).all()
    assert (np.asarray(PROJECT(np.array([0.9, 0.1, -0.5, -0.6]), method=method)) == 0).sum() == 2


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_projected_one_by_one(x64, method):
  values = np.random.default_rng(0).normal(size=(2, 3, 9)) * [[[0.1]], [[10]]]
  got = np.asarray(PROJECT(values, method=method))
  assert got.shape == values.shape
  for i in np.ndindex(2, 3):
    np.testing.assert_allclose(got[i], PROJECT(values[i], method=method), atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_masked_entries_are_as_if_they_were_not_there(x64, method):
  values = np.random.default_rng(0).normal(size=(4, 9))
  mask = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0], bool)
  want = PROJECT(values[:, mask], method=method)
  for padding in (100.0, -100.0, np.nan):
    got = np.asarray(PROJECT(np.where(mask, values, padding), mask, method=method))
    np.testing.assert_allclose(got[:, mask], want, atol=1e-15)
    assert (got[:, ~mask] == 0).all()
  by_row = np.random.default_rng(1).random((4, 9)) < 0.6
  got = np.asarray(PROJECT(values, by_row, method=method))
  for row, value, keep in zip(got, values, by_row):
    np.testing.assert_allclose(row[keep], _by_bisection(value[keep]), atol=1e-12)
    assert (row[~keep] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_sharded_rows_are_projected_as_local_ones(x64, method):
  values = 1 / 512 + 1e-2 * np.random.default_rng(0).normal(size=(3, 512))
  mask = np.arange(512) < 509
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  place = lambda x, *axes: jax.device_put(  # noqa: E731
    x, NamedSharding(mesh, PartitionSpec(*axes)))
  got = PROJECT(place(values, None, "data"), place(mask, "data"), method=method)
  np.testing.assert_allclose(got, PROJECT(values, mask, method=method), rtol=0, atol=1e-15)
  if method == "bisect":
    assert not got.sharding.is_fully_replicated  # no row was gathered


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_number_is_not_hidden(method):
  got = PROJECT(np.float32([[0.5, np.nan, 0.2], [0.5, 0.3, 0.2]]), method=method)
  assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


def test_integers_are_projected_as_numbers():
  np.testing.assert_array_equal(project_simplex([0, 3, 1]), [0, 1, 0])
  assert project_simplex([0, 3, 1]).dtype == jnp.float32


def test_projection_refuses_what_has_no_entries():
  for bad in (np.zeros((2, 0)), np.zeros(0), 1.0):
    with pytest.raises(ValueError, match="non-empty last axis"):
      project_simplex(bad)


def test_projection_refuses_an_unknown_method():
  with pytest.raises(ValueError, match="method='newton' is not one of sort, bisect"):
    project_simplex([1.0, 2.0], method="newton")


def test_the_gap_is_the_most_that_a_vertex_promises(x64):
  rng = np.random.default_rng(0)
  gamma, scores = rng.dirichlet(np.ones(6), size=4), rng.normal(size=(4, 6))
  want = [max(float(s @ (vertex - g)) for vertex in np.eye(6)) for g, s in zip(gamma, scores)]
  np.testing.assert_allclose(stationarity_gap(gamma, scores), want, rtol=1e-12)
  mask = np.array([1, 0, 1, 1, 0, 1], bool)
  gamma = gamma * mask / (gamma * mask).sum(1, keepdims=True)
  want = [max(float(s @ (vertex - g)) for vertex in np.eye(6)[mask])
          for g, s in zip(gamma, scores)]
  np.testing.assert_allclose(stationarity_gap(gamma, scores, mask), want, rtol=1e-12)
  best = np.eye(6)[np.argmax(scores, axis=1)]
  np.testing.assert_array_equal(stationarity_gap(best, scores), 0)


def test_the_gap_keeps_its_digits_under_a_shift():
  gamma = np.float32([0.5, 0.25, 0.25])
  scores = np.float32([1000, 1000 + 2**-10, 1000 - 2**-10])
  np.testing.assert_array_equal(stationarity_gap(gamma, scores), 2**-11 + 2**-11)


def test_the_gap_is_zero_only_at_a_fixed_point_of_the_projected_step(x64):
  # Two equal best scores: every mixture of them is optimal.
  scores = np.array([2.0, 1.0, 2.0, -3.0])
  optimal, other = np.array([0.3, 0, 0.7, 0]), np.array([0.3, 0.1, 0.6, 0])
  assert stationarity_gap(optimal, scores) == 0
  np.testing.assert_allclose(project_simplex(optimal + 0.1 * scores), optimal, atol=1e-15)
  np.testing.assert_allclose(stationarity_gap(other, scores), 0.1, rtol=1e-12)
  assert np.abs(project_simplex(other + 0.1 * scores) - other).max() > 0.01
