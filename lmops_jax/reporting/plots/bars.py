"""Bars by group, and distributions over shared bins."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from lmops_jax.reporting.plots.style import (
  INK,
  NEUTRAL,
  Look,
  looks,
  new,
  plot,
  signed,
)


@plot
def grouped_bars(
  series: Mapping[str, Mapping[str, float | None]],
  *,
  x_label: str,
  styles: Mapping[str, Look] | None = None,
  order: Sequence[str] | None = None,
  format: str = ".1%",
  title: str = "",
) -> Figure:
  """Horizontal bars: for every category one bar a series, with its value written beside it.

  Args:
    series: name to category to value >= 0; a missing category counts as 0, and None
      has no bar.
    x_label: what a value is.
    order: categories from top to bottom; by the first series' value if not given.
    format: the format spec of the written values; a "%" format also labels the axis in percent.

  Raises:
    ValueError: no series or category, or a value that is negative or not finite.
  """
  categories = list(dict.fromkeys(name for values in series.values() for name in values))
  if not categories:
    raise ValueError("A bar plot needs at least one series with one category.")
  first = next(iter(series.values()))
  order = list(order or sorted(categories, key=lambda name: -(first.get(name) or 0)))
  for name, values in series.items():
    for category, value in values.items():
      if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"The bar {category!r} of {name!r} is {value}, not a size.")
  styles = styles or looks(list(series))
  figure, axes = new(0.75 + len(order) * (0.17 * len(series) + 0.12))
  thick = 0.8 / len(series)
  largest = max(value or 0 for values in series.values() for value in values.values()) or 1
  for i, (name, values) in enumerate(series.items()):
    centres = np.arange(len(order)) + (i - (len(series) - 1) / 2) * thick
    drawn = [place for place, category in enumerate(order) if values.get(category, 0) is not None]
    centres, sizes = centres[drawn], [values.get(order[place], 0.0) for place in drawn]
    colour = styles.get(name, NEUTRAL).colour
    axes.barh(centres, sizes, height=thick * 0.9, color=colour, label=name)
    for centre, size in zip(centres, sizes):
      axes.text(
        size + 0.008 * largest, centre, signed(size, format), va="center", fontsize=8, color=INK
      )
  axes.set_yticks(range(len(order)), order)
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(len(order) - 0.45, -0.55)
  axes.set_xlim(0, largest * 1.12)
  axes.grid(False, axis="y")
  if format.endswith("%"):
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=None))
  axes.set_xlabel(x_label)
  axes.set_title(title)
  if len(series) > 1:
    figure.legend(loc="outside upper left", ncols=4)  # bars and their values may be anywhere
  return figure


@plot
def histogram(
  groups: Mapping[str, Sequence[float]],
  *,
  x_label: str,
  y_label: str = "examples",
  styles: Mapping[str, Look] | None = None,
  bins: int = 80,
  markers: Mapping[str, float] | None = None,
  clip_quantile: float = 0.001,
  stacked: bool = False,
  title: str = "",
  height: float = 3.0,
) -> Figure:
  """Histograms over shared bins; what lies beyond the shown range is counted into the end bins.

  Args:
    groups: name to values; any length.
    markers: label to x, drawn as vertical lines.
    clip_quantile: share of all values that may lie outside the shown range on either side; these
      values are added to the end bins, which is then said under the axis.
    stacked: stack the groups (parts of a whole) instead of overlaying them.

  Raises:
    ValueError: no value, or one that is not finite.
  """
  arrays = {name: np.asarray(values, np.float64).ravel() for name, values in groups.items()}
  everything = np.concatenate(list(arrays.values())) if arrays else np.empty(0)
  if not everything.size or not np.isfinite(everything).all():
    raise ValueError("A histogram needs at least one value, and finite ones only.")
  low, high = np.quantile(everything, [clip_quantile, 1 - clip_quantile])
  if high <= low:
    low, high = everything.min(), everything.max()
  if high <= low:
    low, high = low - 0.5, low + 0.5
  edges = np.linspace(low, high, bins + 1)
  beyond = int(np.count_nonzero((everything < low) | (everything > high)))
  styles = styles or looks(list(arrays))
  figure, axes = new(height)
  base = np.zeros(bins)
  for name, values in arrays.items():
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    colour = styles.get(name, NEUTRAL).colour
    if stacked:
      axes.stairs(base + counts, edges, baseline=base, fill=True, color=colour, label=name)
      base = base + counts
    else:
      axes.stairs(counts, edges, fill=True, color=colour, alpha=0.25 if len(arrays) > 1 else 0.5)
      axes.stairs(counts, edges, color=colour, linewidth=1.3, label=name)
  axes.set_xlim(low, high)
  axes.set_ylim(0, axes.dataLim.y1 * (1.16 if markers or len(arrays) > 1 else 1.05))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(_thousands))
  note = f"  (end bins include {beyond:,} values beyond the axis)" if beyond else ""
  axes.set_xlabel(x_label + note)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  for label, x in (markers or {}).items():
    if low <= x <= high:
      axes.axvline(x, color=INK, linewidth=1, linestyle=(0, (4, 3)))
      left = x > (low + high) / 2
      axes.annotate(
        label, (x, 0.97), xycoords=("data", "axes fraction"), xytext=(-4 if left else 4, 0),
        textcoords="offset points", ha="right" if left else "left", va="top", fontsize=8.5,
      )
  if len(arrays) > 1:
    axes.legend(loc="upper left")
  return figure


def _thousands(value: float, _position=None) -> str:
  return f"{value:,.0f}" if value == round(value) else f"{value:g}"
