"""Means over seeds and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_and_half_width(
  values: Sequence[float | None], level: float = 0.95
) -> tuple[float | None, float | None]:
  """Mean over seeds and half the width of its t interval.

  Both are None where a seed has no value, the half where there is one seed only.
  """
  if not values or any(v is None for v in values):
    return None, None
  mean = float(np.mean(values))
  if len(values) == 1:
    return mean, None
  half = stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values)**0.5
  return mean, float(half)
