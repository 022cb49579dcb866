"""Batches drawn by a policy."""

import numpy as np
import pytest

from lmops_jax.data import sampling


def _weights(num_steps=6, num=10, seed=0):
  weights = np.random.default_rng(seed).dirichlet(np.full(num, 0.5), size=num_steps)
  weights[:, 3] = 0
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def test_each_example_comes_as_often_as_its_weight_says():
  weights = _weights()[0]
  counts = np.zeros(10)
  for step in range(2000):
    rows = sampling.draw(weights, 16, seed=1, step=step)
    one = np.bincount(rows, minlength=10)
    # Systematic resampling: floor or ceil of the expected count, every time.
    assert (np.abs(one - 16 * weights) < 1 + 1e-5).all()
    counts += one
  np.testing.assert_allclose(counts / 2000 / 16, weights, atol=2e-3)
  assert counts[3] == 0


def test_a_draw_is_a_function_of_seed_and_step():
  weights = _weights()[0]
  draws = [sampling.draw(weights, 8, seed, step) for seed in (0, 1) for step in (0, 5)]
  np.testing.assert_array_equal(draws[0], sampling.draw(weights, 8, 0, 0))
  assert len({tuple(d) for d in draws}) > 1


def test_all_weight_on_the_last_example_never_leaves_the_range():
  weights = np.zeros(5, np.float32)
  weights[2] = 1
  for step in range(50):
    np.testing.assert_array_equal(sampling.draw(weights, 4, 0, step), np.full(4, 2))


def test_a_policy_is_read_and_stretched_over_a_longer_run(tmp_path):
  weights = _weights()
  sampling.write(tmp_path / "policy.npz", weights, last=weights)
  stored = sampling.SamplingWeights(str(tmp_path / "policy.npz"))
  np.testing.assert_array_equal(stored.weights, weights)
  np.testing.assert_array_equal(stored.row(100), weights[5])  # past the end: the last row
  longer = sampling.SamplingWeights(str(tmp_path / "policy.npz"), num_steps=18)
  assert [int(np.flatnonzero((weights == longer.row(s)).all(1))[0]) for s in range(18)] == [
    s // 3 for s in range(18)]
  np.testing.assert_array_equal(
    longer.batch_indices(8, 0, 7), sampling.draw(weights[2], 8, 0, 7))


def test_bad_files_and_rows_are_refused(tmp_path):
  with pytest.raises(ValueError, match="is not a file"):
    sampling.SamplingWeights(str(tmp_path / "none.npz")).row(0)
  (tmp_path / "text.npz").write_text("no")
  with pytest.raises(ValueError, match="not a file of sampling weights"):
    sampling.SamplingWeights(str(tmp_path / "text.npz")).row(0)
  for bad, match in ((_weights() * 1.01, "step 0"), (-_weights(), "least"),
                     (np.full((2, 3), np.nan), "step 0"), (np.ones(3), r"\[T, N\]")):
    with pytest.raises(ValueError, match=match):
      sampling.write(tmp_path / "bad.npz", bad)
  with pytest.raises(ValueError, match="not positive"):
    sampling.draw(_weights()[0], 0, 0, 0)
