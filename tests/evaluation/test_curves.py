"""Steps to match a loss: interpolation, the edges, and curves that cannot be read."""

import pytest

from lmops_jax.evaluation import curves

CURVE = [(0, 8.0), (100, 6.0), (200, 5.0), (300, 5.5), (400, 4.5)]


@pytest.mark.parametrize(
  "value, want",
  [
    (7.0, 50.0),  # half-way between the first two points
    (6.0, 100.0),  # exactly at a point
    (5.25, 175.0),
    (4.75, 375.0),  # after a rise: only the last segment gets there
    (9.0, 0.0),  # already at the start
    (4.5, 400.0),
    (4.4, None),
  ],
)
def test_steps_to_match(value, want):
  got = curves.steps_to_match(CURVE, value)
  assert got is None if want is None else got == pytest.approx(want)


def test_first_crossing_counts_even_if_the_curve_rises_again():
  assert curves.steps_to_match(CURVE, 5.4) == pytest.approx(160.0)


@pytest.mark.parametrize(
  "curve, value, message",
  [
    ([], 1.0, "non-empty"),
    ([(0, 1.0), (0, 0.5)], 1.0, "must increase"),
    ([(0, 1.0), (10, float("nan"))], 1.0, "finite"),
    ([(0, 1.0)], float("inf"), "finite"),
  ],
)
def test_bad_curves(curve, value, message):
  with pytest.raises(ValueError, match=message):
    curves.steps_to_match(curve, value)
