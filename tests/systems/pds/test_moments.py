"""Exact sums: against rational arithmetic, and the same however the numbers are cut."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest

from lmops_jax.systems.pds.moments import Moments

LIMITS = np.finfo(np.float32)


def _numbers(kind):
  rng = np.random.default_rng(5)
  if kind == "ordinary":
    return rng.normal(3, 2, 2000).astype(np.float32)
  if kind == "all exponents":
    bits = rng.integers(0, 0x7F800000, 1000, np.uint32) | rng.integers(0, 2, 1000, np.uint32) << 31
    return bits.astype(np.uint32).view(np.float32)
  return np.array(
    [0.0, -0.0, LIMITS.smallest_subnormal, -LIMITS.tiny, LIMITS.max, LIMITS.min, 1, -1], np.float32
  )


@pytest.mark.parametrize("kind", ["ordinary", "all exponents", "extremes"])
def test_sums_are_exact(kind):
  values = _numbers(kind)
  got, exact = Moments.of(values), [Fraction(float(v)) for v in values]
  assert Fraction(got.total, 1 << 149) == sum(exact)
  assert Fraction(got.squares, 1 << 298) == sum(v * v for v in exact)
  assert got.mean == float(sum(exact) / len(exact))
  assert math.isclose(got.deviation, statistics.pstdev(exact), rel_tol=1e-15)


def test_any_cut_and_any_order_give_the_same():
  values = _numbers("ordinary")
  whole, rng = Moments.of(values), np.random.default_rng(0)
  for _ in range(5):
    cuts = np.sort(rng.integers(0, len(values), 6))  # some parts may be empty
    parts = [Moments.of(part) for part in np.split(rng.permutation(values), cuts)]
    left = sum((parts[i] for i in rng.permutation(len(parts))), start=Moments())
    nested = parts[0] + ((parts[1] + parts[2]) + (parts[3] + (parts[4] + parts[5]))) + parts[6]
    assert left == nested == whole


def test_equal_numbers_have_no_deviation():
  got = Moments.of(np.full(7, 0.1, np.float32))
  assert got.mean == float(np.float32(0.1)) and got.deviation == 0.0
