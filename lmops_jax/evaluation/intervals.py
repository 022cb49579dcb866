"""How sure a figure is: ends of intervals, and means over seeds with theirs."""

from __future__ import annotations

from collections.abc import Sequence

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
