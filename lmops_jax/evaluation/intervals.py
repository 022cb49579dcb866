"""How sure a figure is: ends of intervals, means over seeds with theirs, paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


def quantiles(level: float) -> tuple[float, float]:
  """The quantiles at the two ends of an interval.

  Raises:
    ValueError: a level that is not between 0 and 1.
  """
  if not 0 < level < 1:
    raise ValueError(f"level={level} is not between 0 and 1; 0.95 is usual.")
  return (1 - level) / 2, (1 + level) / 2


def mean_and_half_width(
  values: Sequence[float | None], level: float = 0.95
) -> tuple[float | None, float | None]:
  """Mean over seeds and half the width of its t interval.

  Both are None if a seed has no value; the half width is None if there is one seed only.
  """
  if not values or any(v is None for v in values):
    return None, None
  mean = float(np.mean(values))
  if len(values) == 1:
    return mean, None
  upper = stats.t.ppf(quantiles(level)[1], len(values) - 1)
  return mean, float(upper * np.std(values, ddof=1) / len(values)**0.5)


def half_width_of_difference(
  groups: Sequence[Sequence[float]], level: float = 0.95
) -> float | None:
  """Half the width of the t interval of a difference between the means of any two groups.

  The deviation is pooled within groups, which few values in each of many groups give surely.

  Args:
    groups: `[G][N]`, such as a loss by method and seed.

  Returns:
    None for groups of one value, which tell no deviation.

  Raises:
    ValueError: for no group, groups of several sizes, or a level that is not between 0 and 1.
  """
  sizes = {len(group) for group in groups}
  if len(sizes) != 1 or not min(sizes):
    raise ValueError(
      f"groups of {', '.join(map(str, sorted(sizes))) or 'no'} values have no pooled deviation; "
      "give each as many.")
  size, = sizes
  if size == 1:
    return None
  deviation = np.var(groups, axis=1, ddof=1).mean() ** 0.5
  upper = stats.t.ppf(quantiles(level)[1], len(groups) * (size - 1))
  return float(upper * deviation * (2 / size) ** 0.5)


def of_proportion(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
  """Wilson's interval of a proportion, such as an accuracy over rows (Wilson 1927).

  It stays within 0 and 1, and is right for few rows and near the ends, where the standard error is
  not.

  Args:
    successes: rows that are right, 0 to `total`.
    total: all rows, at least 1.

  Raises:
    ValueError: a level that is not between 0 and 1, or counts that make no proportion.
  """
  z = float(stats.norm.ppf(quantiles(level)[1]))
  if not 0 <= successes <= total or total < 1:
    raise ValueError(
      f"{successes} of {total} rows are no proportion; give counts of right rows and of all.")
  middle = (successes + z**2 / 2) / (total + z**2)
  half = z * (successes * (total - successes) / total + z**2 / 4) ** 0.5 / (total + z**2)
  return max(middle - half, 0.0), min(middle + half, 1.0)


class Difference(NamedTuple):
  """How much more one of two has, over the rows that both have.

  Attributes:
    value: mean difference.
    low, high: ends of its interval.
    num_rows: rows that it is over.
    share_above: of the rows, those whose difference is above 0.
  """

  value: float
  low: float
  high: float
  num_rows: int
  share_above: float


def of_difference(
  first: Sequence[float], second: Sequence[float], level: float = 0.95, num_resamples: int = 9999,
  seed: int = 0,
) -> Difference:
  """The mean of `second - first` with its bootstrap interval, rows drawn in pairs (percentiles).

  What makes a row easy or hard for both drops out, so the interval is far narrower than those of
  the two means would let expect.

  Args:
    first, second: `[N]` values of the same rows; a row in which either is NaN is left out.
    level: of the interval.
    num_resamples: drawings of N rows with replacement.
    seed: of the drawing.

  Raises:
    ValueError: different numbers of rows, none with both, no resamples, or a level that is not
      between 0 and 1.
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if first.shape != second.shape or first.ndim != 1:
    raise ValueError(
      f"the rows' values have shapes {list(first.shape)} and {list(second.shape)}; give both for "
      "the same rows."
    )
  if num_resamples < 1:
    raise ValueError(f"num_resamples={num_resamples} must be at least 1.")
  ends = quantiles(level)
  values = (second - first)[~np.isnan(second - first)]
  if not len(values):
    raise ValueError("there is no row with both values to compare; give at least one.")
  means = [values[rows].mean() for rows in resampled(len(values), num_resamples, seed)]
  low, high = np.quantile(means, ends)
  return Difference(
    float(values.mean()), float(low), float(high), len(values), float(np.mean(values > 0)))


def resampled(num: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
  """Rows drawn with replacement, `[num] int64` of 0 .. num - 1, for each of the resamples."""
  rng = np.random.default_rng(seed)
  return (rng.integers(num, size=num) for _ in range(num_resamples))
