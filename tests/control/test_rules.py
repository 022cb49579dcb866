"""Steps on weights by hand; `test_policy` takes the older rules through a whole improvement."""

import numpy as np
import pytest

from lmops_jax.control import OuterLoop, SignGradient

GAMMA = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], np.float32)
SCORES = np.array([[9.0, 8.0, 1.0, 2.0], [-3.0, -1.0, -1.0, -1.0]], np.float32)


def test_a_sign_step_is_of_one_size_up_or_down_and_stops_at_0():
  # The means are 4.1 and -1.5: two up and two down, then three up and one down.
  got = SignGradient().move(GAMMA, SCORES, 1.0)
  want = np.array([[0.35, 0.45, 0.05, 0.15], [0.0, 0.5, 0.5, 0.5]])
  np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), rtol=1e-6)
  assert got.dtype == np.float32 and got[1, 0] == 0
  np.testing.assert_array_equal(SignGradient().move(GAMMA, 5 * SCORES - 3, 1.0), got)


def test_rows_that_are_no_examples_keep_no_weight_and_count_for_nothing():
  mask = np.array([True, True, True, True, False])
  wide = [np.pad(x, ((0, 0), (0, 1)), constant_values=value)
          for x, value in ((GAMMA, 0), (SCORES, 1e9))]
  got = SignGradient().move(*wide, 0.5, mask)
  np.testing.assert_allclose(got[:, :4], SignGradient().move(GAMMA, SCORES, 0.5), rtol=1e-6)
  assert not np.any(got[:, 4])


@pytest.mark.parametrize("value", [0.1, -1e8, 3e7])
def test_equal_scores_move_nothing_whatever_the_rate(value):
  gamma = np.full(7, 1 / 7, np.float32)
  got = OuterLoop(rate=100.0, rule=SignGradient()).moved(gamma, np.full(7, value, np.float32))
  np.testing.assert_allclose(got, gamma, rtol=1e-6)
