"""Means over rows with intervals: of a whole task, and of its categories."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.data.tasks import Example
from lmops_jax.evaluation import intervals

_RESAMPLES = 1000


class Estimate(NamedTuple):
  """A mean over rows.

  Attributes:
    name: of what is measured.
    value: the mean, or a figure of all of them together.
    low, high: ends of its interval of 95 %.
    num_rows: rows that it is over.
  """

  name: str
  value: float
  low: float
  high: float
  num_rows: int


def estimate(
  name: str, values: np.ndarray, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Estimate:
  """The mean of rows' values, with an interval that knows which rows belong together.

  It is Wilson's if the values are right or wrong and no rows share a group. Otherwise groups are
  drawn with replacement a thousand times (bootstrap, percentiles), since phrases of one picture are
  right or wrong together; if all rows are right, or all wrong, each group counts as one row of
  Wilson's.

  Args:
    name: of what is measured.
    values: `[N]` scores of rows.
    groups: what each row belongs to, its picture for instance; None is itself.
    seed: of the drawing.

  Raises:
    ValueError: for no rows.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    raise ValueError(f"there are no rows to estimate {name} over; give at least one.")
  index = _numbered(range(len(values)) if groups is None else groups)
  num, mean = index.max() + 1, float(values.mean())
  is_binary = np.isin(values, (0, 1)).all()
  if is_binary and (num == len(values) or mean in (0, 1)):
    low, high = intervals.of_proportion(round(mean * num), num)
    return Estimate(name, mean, low, high, len(values))
  totals, counts = np.bincount(index, values), np.bincount(index)
  drawn = intervals.resampled(num, _RESAMPLES, seed)
  means = [totals[chosen].sum() / counts[chosen].sum() for chosen in drawn]
  low, high = np.quantile(means, intervals.quantiles(0.95))
  return Estimate(name, mean, float(low), float(high), len(values))


def of_corpus(
  name: str, figure: Callable[[np.ndarray], float], groups: Sequence[Hashable], seed: int = 0
) -> Estimate:
  """A figure of all rows together, such as BLEU, with a bootstrap interval as in `estimate`.

  Args:
    name: of what is measured.
    figure: `(numbers of rows) -> figure`, a row perhaps several times.
    groups: what each row belongs to.
    seed: of the drawing.
  """
  index = _numbered(groups)
  members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
  rng = np.random.default_rng(seed)
  found = [
    figure(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
    for _ in range(_RESAMPLES)]
  low, high = np.quantile(found, intervals.quantiles(0.95))
  return Estimate(name, figure(np.arange(len(index))), float(low), float(high), len(index))


def _numbered(keys: Sequence[Hashable]) -> np.ndarray:
  """The number of each key, from 0 on by first appearance."""
  numbers: dict[Hashable, int] = {}
  return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def by_category(rows: Sequence[Example], values: np.ndarray) -> list[Estimate]:
  """The mean of each category's rows, by name; a row of several counts in each.

  Args:
    rows: with their `categories`; without any there are no estimates.
    values: `[N]` scores of the rows.
  """
  members: dict[str, list[int]] = {}
  for i, row in enumerate(rows):
    for category in row.categories:
      members.setdefault(category, []).append(i)
  return [
    estimate(name, np.asarray(values)[members[name]], [picture_of(rows[i]) for i in members[name]])
    for name in sorted(members)]


def picture_of(row: Example) -> Hashable:
  """What groups a row with others: its pictures, or itself without any."""
  return row.images or row.id


def line(found: Estimate, width: int = 0) -> str:
  """An estimate as it is printed."""
  return (f"  {found.name:{width}}  {found.value:.4f} ({found.low:.4f} to {found.high:.4f}), "
          f"{found.num_rows} rows")
