"""Advantages and rewards of tokens, against the spec's numbers and loops in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.training.reinforce.advantages import gae, group_advantages, token_rewards, whiten


def _rows(seed=0, rows=5, length=7):
  rng = np.random.default_rng(seed)
  ends = rng.integers(0, length, rows)
  mask = (np.arange(length)[None] <= ends[:, None]).astype(np.float32)
  draws = rng.normal(size=(4, rows, length)).astype(np.float32)
  return draws, mask, ends


def _gae_by_hand(rewards, values, ends, gamma, lam):
  advantages = np.zeros(rewards.shape)
  for row, end in enumerate(ends):
    later, value_after = 0.0, 0.0
    for t in range(end, -1, -1):
      error = rewards[row, t] + gamma * value_after - values[row, t]
      later = error + gamma * lam * later
      advantages[row, t], value_after = later, values[row, t]
  return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_recursion(gamma, lam):
  (rewards, values, *_), mask, ends = _rows()
  advantages, returns = gae(jnp.asarray(rewards), jnp.asarray(values), mask, gamma, lam)
  want = _gae_by_hand(rewards.astype(float), values.astype(float), ends, gamma, lam)
  np.testing.assert_allclose(advantages, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(returns, want + values * mask, rtol=1e-5, atol=1e-6)


def test_gae_of_the_written_example():
  advantages, returns = gae(
    jnp.array([[0.0, 0.0, 1.0]]), jnp.full((1, 3), 0.5), jnp.ones((1, 3)), 1.0, 0.95)
  np.testing.assert_allclose(advantages, [[0.45125, 0.475, 0.5]], rtol=1e-6)
  np.testing.assert_allclose(returns, [[0.95125, 0.975, 1.0]], rtol=1e-6)


def test_gae_in_its_limits():
  (rewards, values, *_), mask, ends = _rows(1)
  terminal = np.zeros_like(rewards)
  terminal[np.arange(len(ends)), ends] = 2.5
  got, _ = gae(jnp.asarray(terminal), jnp.zeros(mask.shape), mask, 0.9, 0.8)
  powers = 0.72 ** np.maximum(ends[:, None] - np.arange(mask.shape[1]), 0)
  np.testing.assert_allclose(got, 2.5 * powers * mask, rtol=1e-5)
  got, _ = gae(jnp.asarray(rewards), jnp.asarray(values), mask, 1.0, 1.0)
  to_come = np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(got, (to_come - values) * mask, rtol=1e-4, atol=1e-5)


def test_what_stands_behind_the_end_changes_nothing():
  (rewards, values, *_), mask, _ = _rows(2)
  noise = np.where(mask > 0, 0, np.float32(np.nan))
  clean = gae(jnp.asarray(rewards), jnp.asarray(values), mask)
  dirty = gae(jnp.asarray(rewards + noise), jnp.asarray(values + noise), mask)
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  longer = [np.pad(x, ((0, 0), (0, 4)), constant_values=9) for x in (rewards, values)]
  wide = gae(*map(jnp.asarray, longer), np.pad(mask, ((0, 0), (0, 4))))
  for a, b in zip(wide, clean):
    np.testing.assert_array_equal(a[:, : mask.shape[1]], b)
    assert not np.any(a[:, mask.shape[1] :])


@pytest.mark.parametrize("at_end", ["add", "overwrite"])
def test_rewards_of_tokens(at_end):
  (log_probs, reference, _, draws), mask, ends = _rows(3)
  scores = draws[:, 0]
  got = token_rewards(scores, log_probs, reference, mask, 0.3, at_end)
  want = np.zeros(mask.shape)
  for row, end in enumerate(ends):
    for t in range(end + 1):
      penalty = -0.3 * (float(log_probs[row, t]) - reference[row, t])
      want[row, t] = penalty if t < end else scores[row] + (penalty if at_end == "add" else 0)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_reference_itself_pays_exactly_nothing():
  (log_probs, _, _, draws), mask, ends = _rows(4)
  got = np.array(token_rewards(draws[:, 0], log_probs, log_probs, mask, 0.2))
  np.testing.assert_array_equal(got[np.arange(len(ends)), ends], draws[:, 0])
  got[np.arange(len(ends)), ends] = 0
  assert not got.any()


def test_whitening_is_over_the_mask():
  (values, *_), mask, _ = _rows(5)
  got = np.asarray(whiten(jnp.asarray(np.where(mask > 0, values, np.nan)), mask))
  real = values[mask > 0].astype(float)
  want = (real - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(got[mask > 0], want, rtol=1e-5, atol=1e-6)
  assert not got[mask == 0].any()
  one = jnp.zeros((2, 3)).at[0, 0].set(1)
  np.testing.assert_array_equal(whiten(jnp.full((2, 3), 7.0), one), np.zeros((2, 3)))


@pytest.mark.parametrize("by_spread", [True, False])
def test_group_advantages(by_spread):
  scores = np.random.default_rng(6).normal(size=12).astype(np.float32)
  scores[4:8] = 3.25
  groups = scores.astype(float).reshape(3, 4)
  want = groups - groups.mean(axis=1, keepdims=True)
  if by_spread:
    want /= groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
  got = group_advantages(jnp.asarray(scores), 4, by_spread)
  np.testing.assert_allclose(got, want.reshape(-1), rtol=1e-4, atol=1e-5)
  assert not np.any(got[4:8])
