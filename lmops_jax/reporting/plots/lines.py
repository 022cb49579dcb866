"""Curves with the band of their runs, paths through a plane, and fitted laws."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from lmops_jax.reporting.plots.style import INK, NEUTRAL, Look, Run, label_ends, looks, new, plot

_DIGIT = 0.016  # width of a digit of a label, in widths of the axes


@plot
def curves(
  series: Mapping[str, Sequence[Run]],
  *,
  x_label: str,
  y_label: str,
  styles: Mapping[str, Look] | None = None,
  reference: tuple[float, str] | None = None,
  crossings: Mapping[str, float] | None = None,
  focus_from: float | None = None,
  log_x: bool = False,
  log_y: bool = False,
  title: str = "",
  height: float = 3.9,
) -> Figure:
  """Mean curves of several series, each with the band its runs span.

  Args:
    series: name to runs (one a seed) that share their x values; a single run has no band.
    x_label, y_label: with units.
    styles: from `looks`, by the series' order if not given; a series it lacks is drawn in grey.
    reference: a y value and its label, drawn as a dashed horizontal line.
    crossings: series to the x where it meets the reference, marked, and labelled unless an earlier
      label stands there.
    focus_from: the y axis is fitted to the curves from this x on, so that a steep start does not
      flatten the rest.
    log_x, log_y: logarithmic axes.

  Raises:
    ValueError: no series, an empty or non-finite run, or runs of one series with different x.
  """
  if not series:
    raise ValueError("A plot of curves needs at least one series.")
  styles = styles or looks(list(series))
  figure, axes = new(height)
  ends, low, high = [], math.inf, -math.inf
  for name, runs in series.items():
    x, ys = _stacked(name, runs)
    look = styles.get(name, NEUTRAL)
    mean = ys.mean(0)
    if len(ys) > 1:
      axes.fill_between(x, ys.min(0), ys.max(0), color=look.colour, alpha=0.16, linewidth=0)
    axes.plot(
      x, mean, color=look.colour, linestyle=look.dashes, linewidth=look.width,
      marker="o" if len(x) < 3 else None, markersize=3.5, solid_capstyle="round",
      zorder=2 + look.width,
    )
    ends.append((name, float(x[-1]), float(mean[-1]), look))
    shown = ys[:, x >= focus_from] if focus_from is not None and x[-1] >= focus_from else ys
    low, high = min(low, shown.min()), max(high, shown.max())
  if reference is not None:
    low, high = min(low, reference[0]), max(high, reference[0])
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  if log_x:
    axes.set_xscale("log")
  if log_y:
    axes.set_yscale("log")
  else:
    pad = 0.05 * (high - low or abs(high) or 1)
    axes.set_ylim(low - pad, high + pad)
  if not log_x:
    axes.margins(x=0.01)
  if reference is not None:
    _reference(axes, reference, crossings or {}, styles)
  label_ends(figure, axes, ends)
  return figure


def _stacked(name, runs) -> tuple[np.ndarray, np.ndarray]:
  if not runs:
    raise ValueError(f"The series {name!r} has no run.")
  xs, ys = zip(*[(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in runs])
  for x, y in zip(xs, ys):
    if x.ndim != 1 or not len(x) or x.shape != y.shape:
      raise ValueError(
        f"A run of {name!r} needs x and y of one length, but has shapes {x.shape} and {y.shape}."
      )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
      raise ValueError(f"A run of {name!r} holds a number that is not finite.")
    if not np.array_equal(x, xs[0]):
      raise ValueError(f"The runs of {name!r} were measured at different x values.")
  return xs[0], np.stack(ys)


def _reference(axes, reference, crossings, styles):
  value, text = reference
  axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
  axes.annotate(
    text, (0.0, value), xycoords=("axes fraction", "data"), xytext=(4, -3),
    textcoords="offset points", ha="left", va="top", fontsize=8.5, color=INK,
  )
  labelled = []
  for name, x in crossings.items():
    colour = styles.get(name, NEUTRAL).colour
    axes.plot([x, x], [0, value], color=colour, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1.6)
    axes.plot([x], [value], "o", color=colour, markersize=5, markeredgecolor="white", zorder=6)
    label = f"{x:,.0f}"
    place = (axes.transScale + axes.transLimits).transform((x, value))[0]
    if any(abs(place - other) < _DIGIT * (len(label) + 1) for other in labelled):
      continue  # it would stand on an earlier one
    labelled.append(place)
    axes.annotate(
      label, (x, 0), xycoords=("data", "axes fraction"), xytext=(3, 4),
      textcoords="offset points", fontsize=8.5, color=colour, fontweight="bold",
    )


@plot
def paths(
  series: Mapping[str, Sequence[Run]],
  *,
  x_label: str,
  y_label: str,
  styles: Mapping[str, Look] | None = None,
  log_x: bool = False,
  log_y: bool = False,
  falling_x: bool = False,
  title: str = "",
  height: float = 3.9,
) -> Figure:
  """Lines through points in their order, each run with x values of its own.

  Args:
    series: name to runs; points with a value that is not finite (or, on a logarithmic axis, not
      positive) are left out. Runs after the first are faint.
    log_x, log_y: logarithmic axes.
    falling_x: large x at the left, as for a loss that falls while training goes on.

  Raises:
    ValueError: no series, or not one point to draw.
  """
  if not series:
    raise ValueError("A plot of paths needs at least one series.")
  styles = styles or looks(list(series))
  figure, axes = new(height)
  ends = []
  for name, runs in series.items():
    look = styles.get(name, NEUTRAL)
    for i, run in enumerate(runs):
      x, y = (np.asarray(v, np.float64) for v in run)
      good = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
      x, y = x[good], y[good]
      if not len(x):
        continue
      axes.plot(x, y, color=look.colour, linestyle=look.dashes, linewidth=look.width,
                alpha=1.0 if i == 0 else 0.45)
      if i == 0:
        ends.append((name, float(x[-1]), float(y[-1]), look))
  if not ends:
    raise ValueError("A plot of paths has no point that can be drawn.")
  if log_x:
    axes.set_xscale("log")
  if log_y:
    axes.set_yscale("log")
  if falling_x:
    axes.invert_xaxis()
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  label_ends(figure, axes, ends)
  return figure


class Fit(NamedTuple):
  """Measured points of one series and a fitted curve with an optional interval.

  Attributes:
    points: measured `x` and `y`.
    curve: fitted `x` and `y`, also where nothing was measured.
    band: lower and upper ends at the curve's x, or None.
  """

  points: Run
  curve: Run
  band: tuple[Sequence[float], Sequence[float]] | None = None


@plot
def fits(
  series: Mapping[str, Fit],
  *,
  x_label: str,
  y_label: str,
  styles: Mapping[str, Look] | None = None,
  log_x: bool = True,
  log_y: bool = True,
  title: str = "",
  height: float = 3.9,
) -> Figure:
  """Points with fitted curves: solid over the measured range, dashed where extrapolated."""
  if not series:
    raise ValueError("A plot of fits needs at least one series.")
  styles = styles or looks(list(series))
  figure, axes = new(height)
  ends = []
  for name, fit in series.items():
    look = styles.get(name, NEUTRAL)
    x, y = np.asarray(fit.curve.x, np.float64), np.asarray(fit.curve.y, np.float64)
    measured = np.asarray(fit.points.x, np.float64)
    if fit.band is not None:
      axes.fill_between(x, *fit.band, color=look.colour, alpha=0.14, linewidth=0)
    axes.plot(x, y, color=look.colour, linewidth=1.1, linestyle=(0, (4, 2)))
    inside = (x >= measured.min()) & (x <= measured.max())
    axes.plot(x[inside], y[inside], color=look.colour, linewidth=look.width)
    axes.scatter(
      measured, fit.points.y, s=20, color=look.colour, edgecolors="white", linewidths=0.6, zorder=4
    )
    ends.append((name, float(x[-1]), float(y[-1]), look))
  if log_x:
    axes.set_xscale("log")
  if log_y:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 8 * low:  # too few powers of ten for the usual ticks
      axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
      axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
      axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  label_ends(figure, axes, ends)
  return figure
