"""The controllers: the written formula, and that the adaptive one holds its target."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.training.reinforce.kl_control import AdaptiveKL, FixedKL


def test_a_fixed_coefficient_stays():
  assert float(FixedKL(0.3).after(jnp.float32(0.3), jnp.float32(99.0), 256)) == np.float32(0.3)


@pytest.mark.parametrize("kl, num, want", [
  (6.0, 256, 0.2), (6.6, 256, 0.2 * (1 + 0.1 * 256 / 1e4)), (60.0, 8, 0.2 * (1 + 0.2 * 8 / 1e4)),
  (0.0, 8, 0.2 * 0.99984), (-5.0, 8, 0.2 * 0.99984),
])
def test_the_written_formula(kl, num, want):
  got = AdaptiveKL(0.2, target=6.0, horizon=1e4).after(jnp.float32(0.2), jnp.float32(kl), num)
  assert float(got) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("start", [0.01, 5.0])
def test_the_target_is_held(start):
  """A policy whose divergence follows the coefficient late, as trained ones do."""
  control = AdaptiveKL(start, target=6.0, horizon=2000.0)
  coefficient, kl, seen = jnp.float32(control.coefficient), 0.0, []
  for _ in range(1500):
    kl += 0.2 * (1.5 / float(coefficient) - kl)  # where it would rest: 1.5 / coefficient
    coefficient = control.after(coefficient, jnp.float32(kl), 256)
    seen.append(kl)
  np.testing.assert_allclose(seen[-200:], 6.0, rtol=0.02)
  assert float(coefficient) == pytest.approx(1.5 / 6.0, rel=0.02)


def test_a_horizon_that_one_batch_exceeds_is_refused():
  with pytest.raises(ValueError, match="horizon=200.0 is at most a fifth of a batch of 1000"):
    AdaptiveKL(horizon=200.0).after(jnp.float32(0.2), jnp.float32(0.0), 1000)
