"""Metrics against NumPy, scipy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmops_jax.systems.meta_optimizer import metrics

N, L, H, D = 5, 3, 2, 16


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _cos(u, v):
  return np.sum(u * v, -1) / (np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1))


def test_recall_to_finetuning():
  gold, zs = [0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0]
  ft, icl = [0, 1, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]
  assert metrics.rec2ftp(gold, zs, ft, icl) == pytest.approx(75)
  with pytest.warns(metrics.Undefined, match="no row is wrong zero-shot"):
    assert np.isnan(metrics.rec2ftp(gold, zs, zs, icl))
  with pytest.raises(ValueError, match=r"predictions ft \(5,\)"):
    metrics.rec2ftp(gold, zs, ft[1:], icl)
  with pytest.raises(ValueError, match="row 2 has the label -1"):
    metrics.rec2ftp([0, 1, -1, 1, 0, 1], zs, ft, icl)


def test_similarity_of_updates():
  icl, zs, ft = (_normal(N, L, D, seed=i) for i in range(3))
  np.testing.assert_allclose(
    metrics.sim_aou(icl, zs, ft, normalise=False), _cos(icl - zs, ft - zs).mean(0), rtol=1e-5)
  units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (icl, zs, ft)]
  want = _cos(units[0] - units[1], units[2] - units[1]).mean(0)
  got = metrics.sim_aou(icl, zs, ft)
  assert got.shape == (L,)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(metrics.sim_aou(icl, zs, icl), np.ones(L), rtol=1e-5)
  for of in (metrics.sim_aou, jax.jit(metrics.sim_aou)):
    np.testing.assert_array_equal(of(icl, zs, zs), np.zeros(L))
    np.testing.assert_array_equal(of(zs, zs.copy(), zs.copy()), np.zeros(L))
  random = metrics.uniform(0, range(N), (L, D))
  np.testing.assert_allclose(
    metrics.sim_aou_random_each(icl, zs, random), _cos(units[0] - units[1], np.array(random)),
    rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("square, want", [(3.0, 0.25), (1.0, None), (0.1, None)])
def test_normalising_makes_unrelated_updates_alike(square, want):
  with jax.enable_x64(True):
    z, u, v = np.eye(4)[:3] * np.array([[2.0], [2 * square**0.5], [2 * square**0.5]])
    got = float(metrics.sim_aou_each(z + u, z, z + v))
    a = 1 / np.sqrt(1 + square) - 1
    assert got == pytest.approx(a**2 / (a**2 + square / (1 + square)), rel=1e-12)
    if want is not None:
      assert got == pytest.approx(want, rel=1e-12)
    assert float(metrics.sim_aou_each(z + u, z, z + v, normalise=False)) == pytest.approx(0)


def test_similarity_of_maps():
  icl, zs, ft = (_normal(N, L, H, 7, seed=i) for i in range(3))
  np.testing.assert_allclose(metrics.sim_am(icl, ft), _cos(icl, ft).mean((0, 2)), rtol=1e-5)
  np.testing.assert_allclose(
    metrics.sim_am_delta(icl, zs, ft), _cos(icl - zs, ft - zs).mean((0, 2)), rtol=1e-5)
  padded = [np.pad(x, ((0, 0),) * 3 + ((2, 1),)) for x in (icl, zs, ft)]
  np.testing.assert_allclose(
    metrics.sim_am_delta(*padded), metrics.sim_am_delta(icl, zs, ft), rtol=1e-6)
  with pytest.raises(ValueError, match=r"shapes disagree: icl \(5, 3, 2, 7\), other"):
    metrics.sim_am(icl, ft[..., 1:])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [2000, 7])
def test_kendall_equals_scipy(ties, block, monkeypatch):
  monkeypatch.setattr(metrics, "_BLOCK", block)
  metrics._kendall.clear_cache()
  a, b = _normal(N, L, 37), _normal(N, L, 37, seed=1)
  b = b + a
  if ties:
    a, b = np.round(a), np.round(b)
  each = metrics.kendall_each(a, b)
  want = [[stats.kendalltau(x, y).statistic for x, y in zip(*rows)] for rows in zip(a, b)]
  np.testing.assert_allclose(each, want, rtol=1e-5)
  np.testing.assert_allclose(metrics.kendall(a, b).mean, np.mean(want, 0), rtol=1e-5)
  signs = [np.sign(x[..., :, None] - x[..., None, :]) for x in (a, b)]
  np.testing.assert_allclose(
    metrics.kendall_each(a, b, "tau_a"), (signs[0] * signs[1]).sum((-1, -2)) / (37 * 36), rtol=1e-5)


def test_kendall_above_the_block_and_at_its_ends():
  a = _normal(1, 1, 2500)
  assert float(metrics.kendall_each(a, a)[0, 0]) == pytest.approx(1, abs=1e-6)
  assert float(metrics.kendall_each(a, -a)[0, 0]) == pytest.approx(-1, abs=1e-6)
  b = _normal(1, 1, 2500, seed=1)
  assert float(metrics.kendall_each(a, b)[0, 0]) == pytest.approx(
    stats.kendalltau(a[0, 0], b[0, 0]).statistic, abs=1e-6)


def test_undefined_kendall_is_left_out_and_counted():
  a, b = _normal(N, L, 6), _normal(N, L, 6, seed=1)
  b[1, 0] = 2.0
  b[:, 2] = 1.0
  with pytest.warns(metrics.Undefined, match="undefined for 6 of 15 pairs"):
    found = metrics.kendall(a, b)
  np.testing.assert_array_equal(found.num_undefined, [1, 0, 5])
  want = np.mean([stats.kendalltau(a[i, 0], b[i, 0]).statistic for i in (0, 2, 3, 4)])
  assert found.mean[0] == pytest.approx(want, rel=1e-5) and np.isnan(found.mean[2])
  with pytest.warns(metrics.Undefined, match="15 of 15"):
    assert np.isnan(metrics.kendall(a[..., :1], b[..., :1]).mean).all()
  with pytest.raises(ValueError, match="not one of tau_a, tau_b"):
    metrics.kendall(a, b, "tau_c")


def test_baselines_depend_on_the_row_alone():
  whole = metrics.uniform(3, range(4), (2, 5))
  np.testing.assert_array_equal(whole[2:], metrics.uniform(3, [2, 3], (2, 5)))
  assert 0 <= whole.min() and whole.max() < 1
  assert not np.array_equal(whole, metrics.uniform(4, range(4), (2, 5)))


def test_scores_of_demonstrations_and_recall():
  scores = _normal(2, L, 6)
  groups = np.array([0, 0, 1, 1, 1, 2])
  got = metrics.of_groups(scores, groups, 3)
  soft = np.asarray(jax.nn.softmax(jnp.array(scores)))
  np.testing.assert_allclose(got[..., 1], soft[..., 2:5].sum(-1), rtol=1e-5)
  np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
  a, b = np.array([[5.0, 4, 3, 2, 1]]), np.array([[1.0, 5, 4, 2, 3]])
  assert float(metrics.top_recall_each(a, b, 2)[0]) == 0.5
  assert float(metrics.top_recall_each(a, b, 9)[0]) == 1
