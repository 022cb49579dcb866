"""Prototypes as a mixture: against float64 sums, closed forms and the figures of eq. 6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.systems.prototypes import mixture
from lmops_jax.systems.prototypes.mixture import Prototypes

K, D, C = 6, 5, 3


@pytest.fixture
def setting():
  rng = np.random.default_rng(0)
  prototypes = Prototypes(
    jnp.asarray(rng.normal(size=(K, D)), jnp.float32),
    jnp.asarray(rng.normal(size=(K, C)), jnp.float32), jnp.float32(0.3))
  active = np.array([True, False, True, True, False, True])
  return prototypes, active, rng.normal(size=(4, D)).astype(np.float32)


def brute_force(prototypes, active, features, log_variances):
  """P(class | input) by the definition, float64."""
  found = np.zeros((len(features), C))
  for i, x in enumerate(features.astype(np.float64)):
    densities = np.zeros(K)
    for k in np.flatnonzero(active):
      variance = np.exp(log_variances[k])
      distance = np.sum((x - np.asarray(prototypes.centers[k], np.float64)) ** 2)
      densities[k] = (2 * np.pi * variance) ** (-D / 2) * np.exp(-distance / (2 * variance))
    for k in np.flatnonzero(active):
      said = np.exp(np.asarray(prototypes.logits[k], np.float64))
      found[i] += densities[k] / densities.sum() * said / said.sum()
  return found


@pytest.mark.parametrize("private", [False, True])
def test_probabilities_are_those_of_the_definition(setting, private):
  prototypes, active, features = setting
  variances = np.linspace(-1, 1, K) if private else np.full(K, 0.3)
  if private:
    prototypes = prototypes._replace(log_variance=jnp.asarray(variances, jnp.float32))
  weights = mixture.log_importance(prototypes, active, features)
  np.testing.assert_allclose(np.exp(weights).sum(axis=1), 1, rtol=1e-6)
  assert np.all(np.exp(weights[:, ~active]) == 0)
  said = mixture.log_probabilities(weights, prototypes.logits)
  want = np.log(brute_force(prototypes, active, features, variances))
  np.testing.assert_allclose(said, want, atol=1e-5)
  label = np.array([2, 0, 1, 1])
  np.testing.assert_allclose(
    mixture.log_probability(weights, prototypes.logits, label), want[np.arange(4), label],
    atol=1e-5)


def test_unused_slots_have_no_say(setting):
  prototypes, active, features = setting

  def said(prototypes):
    weights = mixture.log_importance(prototypes, active, features)
    return mixture.log_probabilities(weights, prototypes.logits)

  unused = ~active[:, None]
  other = prototypes._replace(
    centers=jnp.where(unused, features[0], prototypes.centers),
    logits=jnp.where(unused, 1e6, prototypes.logits))
  np.testing.assert_array_equal(said(prototypes), said(other))
  grads = jax.grad(lambda p: jnp.sum(said(p)[:, 0]))(prototypes)
  assert np.all(grads.centers[~active] == 0) and np.all(grads.logits[~active] == 0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_one_prototype_a_class_tells_the_nearest_mean():
  rng = np.random.default_rng(1)
  centers, features = rng.normal(size=(C, D)), rng.normal(size=(200, D))
  prototypes = Prototypes(
    jnp.asarray(centers, jnp.float32), mixture.first_logits(jnp.arange(C), C), jnp.float32(0))
  weights = mixture.log_importance(prototypes, jnp.ones(C, bool), features)
  said = mixture.log_probabilities(weights, prototypes.logits)
  nearest = np.argmin(((features[:, None] - centers) ** 2).sum(-1), axis=1)
  np.testing.assert_array_equal(np.argmax(said, axis=1), nearest)


@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_a_new_prototype_gives_its_class_nine_tenths(num_classes):
  logits = mixture.first_logits(jnp.arange(num_classes), num_classes)
  np.testing.assert_allclose(np.diag(jax.nn.softmax(logits)), 0.9, rtol=1e-6)


def test_threshold():
  def at(variance=5.0, spread=0.0054, alpha=0.1):
    return float(mixture.threshold(jnp.float32(variance), jnp.float32(spread), alpha, 384))

  assert at() == pytest.approx(25.1, abs=0.05)
  assert at(variance=6.0) > at() and at(spread=0.1) > at() > at(alpha=0.5) > 0


def test_threshold_is_where_a_new_cluster_is_as_likely():
  variance, spread, alpha, width = 0.7, 1.9, 0.1, 3
  limit = float(mixture.threshold(jnp.float32(variance), jnp.float32(spread), alpha, width))
  old = (2 * np.pi * variance) ** (-width / 2) * np.exp(-limit / (2 * variance))
  new = alpha * (2 * np.pi * (variance + spread)) ** (-width / 2)
  assert old == pytest.approx(new, rel=1e-5)


def test_spread_is_the_mean_unbiased_variance(setting):
  prototypes, active, _ = setting
  want = np.asarray(prototypes.centers)[active].var(axis=0, ddof=1).mean()
  assert float(mixture.spread_of(prototypes.centers, active)) == pytest.approx(want, rel=1e-6)
  alone = np.arange(K) == 2
  assert float(mixture.spread_of(prototypes.centers, alone)) == 0


def test_calibrated_variance_puts_the_threshold_at_the_quantile():
  distances = np.random.default_rng(2).gamma(20, 1.0, 500)
  variance = mixture.calibrated_variance(distances, 0.05, 0.1, 64, 0.75)
  limit = mixture.threshold(jnp.float32(variance), jnp.float32(0.05), 0.1, 64)
  assert float(limit) == pytest.approx(np.quantile(distances, 0.75), rel=1e-5)
  with pytest.raises(ValueError, match=r"prototypes\.Growth\.variance"):
    mixture.calibrated_variance(np.zeros(5), 0.05, 0.1, 64, 0.75)


@pytest.mark.parametrize("squared", [True, False])
def test_diversity(setting, squared):
  prototypes, active, _ = setting
  limit = 9.0
  centers = np.asarray(prototypes.centers, np.float64)[active]
  want = sum(
    max(0, (limit if squared else 3) - np.linalg.norm(a - b)) ** 2
    for i, a in enumerate(centers) for b in centers[i + 1 :])
  found = mixture.diversity(prototypes.centers, active, jnp.float32(limit), squared)
  assert float(found) == pytest.approx(want, rel=1e-5)
  slope = jax.grad(mixture.diversity)(prototypes.centers, active, jnp.float32(limit), squared)
  want = np.zeros((K, D))
  for j in np.flatnonzero(active):
    for k in np.flatnonzero(active & (np.arange(K) != j)):
      gap = np.asarray(prototypes.centers[j] - prototypes.centers[k], np.float64)
      length = np.linalg.norm(gap)
      want[j] -= 2 * max(0, (limit if squared else 3) - length) * gap / length
  np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-5)
  same = jnp.zeros((K, D))
  grad = jax.grad(lambda c: mixture.diversity(c, active, jnp.float32(limit), squared))(same)
  assert np.isfinite(grad).all()


def test_signs():
  logits = jnp.array([[1.0, -2.0, 3.0], [-1.0, 2.0, 0.5]])
  want = [[1, -2, 0], [-1, 2, 0]]
  np.testing.assert_array_equal(mixture.with_signs(logits, jnp.array([0, 1])), want)
  np.testing.assert_array_equal(
    mixture.with_signs(-logits, jnp.array([0, 1])), [[0, 0, -3], [0, 0, -0.5]])
