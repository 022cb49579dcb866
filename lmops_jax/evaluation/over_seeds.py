"""Figures of several seeds together: values, means and intervals, and how they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmops_jax.evaluation.intervals import mean_and_half_width, of_proportion

LEVEL = 0.95


def spread_of(values: Sequence[float]) -> dict[str, Any]:
  """Values by seed, their mean and half the width of its interval (t distribution)."""
  mean, half = mean_and_half_width(values, LEVEL)
  return {"values": list(values), "mean": mean, "half_width": half}


def shares_of(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
  """Shares of right answers.

  Args:
    counts: of each seed the right answers and all, the same number in each.

  Returns:
    `spread_of` the shares; `num` answers of a seed; and `interval`, Wilson's, of the answers of all
    seeds as if each were drawn on its own.
  """
  right, num = (sum(of) for of in zip(*counts))
  return spread_of([r / n for r, n in counts]) | {
    "num": counts[0][1], "interval": list(of_proportion(right, num, LEVEL))}


def spread(of: Mapping[str, Any] | None, spec: str) -> str:
  """Mean and half width of the interval over seeds; a dash for what was not asked."""
  if of is None:
    return "–"
  text = format(of["mean"], spec)
  return text if of["half_width"] is None else f"{text} ± {format(of['half_width'], spec)}"


def share(of: Mapping[str, Any] | None) -> str:
  """A share with Wilson's interval of all answers, in percent; a dash for what was not asked."""
  if of is None:
    return "–"
  low, high = (100 * end for end in of["interval"])
  return f"{100 * of['mean']:.1f} ({low:.0f}–{high:.0f})"
