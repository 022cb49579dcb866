"""Plots as pure functions: numbers in, a matplotlib figure out, no display and no global state.

`png` turns a figure into bytes for `html.Figure`, `save` into a file. Figures are 7.2 inches wide
at 200 dots an inch, that is 720 pixels of a page drawn at twice their size. The colours (Okabe and
Ito, 2008) stay apart for colour-blind eyes; series also differ in their dashes and are named beside
the curve.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.2  # inches
DPI = 200

_INK, _SOFT, _LINE = "#1c1f23", "#5b636d", "#d9dde2"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#8a8a8a")
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_STYLE = {
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "axes.titlesize": 9.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.labelsize": 9,
  "axes.edgecolor": _SOFT,
  "axes.labelcolor": _INK,
  "axes.linewidth": 0.7,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "axes.grid": True,
  "grid.color": "#e8ebee",
  "grid.linewidth": 0.7,
  "text.color": _INK,
  "xtick.color": _SOFT,
  "ytick.color": _SOFT,
  "xtick.labelcolor": _INK,
  "ytick.labelcolor": _INK,
  "xtick.labelsize": 8.5,
  "ytick.labelsize": 8.5,
  "xtick.major.width": 0.7,
  "ytick.major.width": 0.7,
  "xtick.major.size": 3,
  "ytick.major.size": 3,
  "legend.fontsize": 8.5,
  "legend.frameon": False,
  "figure.facecolor": "white",
  "savefig.facecolor": "white",
  "image.interpolation": "nearest",
}


class Look(NamedTuple):
  """How one series is drawn in every plot of a report."""

  colour: str
  dashes: str | tuple
  width: float


NEUTRAL = Look("#b4bac2", "-", 1.4)  # for series without a look, which others are compared with


class Run(NamedTuple):
  """One curve: `x` `[n]` and `y` `[n]`."""

  x: Sequence[float]
  y: Sequence[float]


def looks(names: Sequence[str], emphasis: Sequence[str] = ()) -> dict[str, Look]:
  """A look for each series, fixed by its place in `names`; pass one result to all plots.

  Emphasised series are drawn thick; give them first to get the strongest colours.
  """
  return {
    name: Look(
      _COLOURS[i % len(_COLOURS)],
      "-" if name in emphasis else _DASHES[(i + i // len(_COLOURS)) % len(_DASHES)],
      2.4 if name in emphasis else 1.4,
    )
    for i, name in enumerate(names)
  }


def png(figure: Figure, *, dpi: int = DPI) -> bytes:
  """The figure as PNG bytes; the same figure gives the same bytes."""
  out = io.BytesIO()
  with matplotlib.rc_context(_STYLE):
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
  return out.getvalue()


def save(path, figure: Figure, *, dpi: int = DPI) -> bytes:
  """Writes the PNG to `path` and returns its bytes."""
  data = png(figure, dpi=dpi)
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Path(path).write_bytes(data)
  return data


def _plot(draw: Callable[..., Figure]) -> Callable[..., Figure]:
  @functools.wraps(draw)
  def styled(*args, **kwargs) -> Figure:
    with matplotlib.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return styled


def _new(height: float, columns: int = 1, **kwargs):
  figure = Figure(figsize=(WIDTH, height), layout="constrained")
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04)
  axes = figure.subplots(1, columns, **kwargs)
  return figure, axes


# --- curves ---------------------------------------------------------------------------------------


@_plot
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
    crossings: series to the x where it meets the reference, marked and labelled.
    focus_from: the y axis is fitted to the curves from this x on, so that a steep start does not
      flatten the rest.
    log_x, log_y: logarithmic axes.

  Raises:
    ValueError: no series, an empty or non-finite run, or runs of one series with different x.
  """
  if not series:
    raise ValueError("A plot of curves needs at least one series.")
  styles = styles or looks(list(series))
  figure, axes = _new(height)
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
  _label_ends(figure, axes, ends)
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
  axes.axhline(value, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
  axes.annotate(
    text, (0.0, value), xycoords=("axes fraction", "data"), xytext=(4, -3),
    textcoords="offset points", ha="left", va="top", fontsize=8.5, color=_INK,
  )
  for name, x in crossings.items():
    colour = styles.get(name, NEUTRAL).colour
    axes.plot([x, x], [0, value], color=colour, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1.6)
    axes.plot([x], [value], "o", color=colour, markersize=5, markeredgecolor="white", zorder=6)
    axes.annotate(
      f"{x:,.0f}", (x, 0), xycoords=("data", "axes fraction"), xytext=(3, 4),
      textcoords="offset points", fontsize=8.5, color=colour, fontweight="bold",
    )


def _label_ends(figure, axes, ends):
  """Writes each series' name beside its last point, moved apart if they would overlap."""
  figure.draw_without_rendering()
  to_points = axes.transData.transform
  height = 72 / figure.dpi  # points a pixel
  places = sorted((to_points((x, y))[1] * height, i) for i, (_, x, y, _) in enumerate(ends))
  gap = 11.0
  bottom, top = (edge * height for edge in axes.bbox.intervaly)
  wanted = [place for place, _ in places]
  for i in range(1, len(wanted)):
    wanted[i] = max(wanted[i], wanted[i - 1] + gap)
  if wanted and wanted[-1] > top:
    wanted[-1] = max(top, bottom + gap * (len(wanted) - 1))
    for i in range(len(wanted) - 2, -1, -1):
      wanted[i] = min(wanted[i], wanted[i + 1] - gap)
  right = axes.bbox.x1 * height
  for (place, i), label in zip(places, wanted):
    name, x, y, look = ends[i]
    start = to_points((x, y))[0] * height
    axes.annotate(
      name, (x, y), xytext=(right - start + 7, label - place), textcoords="offset points",
      va="center", fontsize=8.5, color=look.colour, fontweight="bold" if look.width > 2 else None,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-", "color": look.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2,
        "relpos": (0, 0.5),
      },
    )


@_plot
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
  figure, axes = _new(height)
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
  _label_ends(figure, axes, ends)
  return figure


# --- bars -----------------------------------------------------------------------------------------


@_plot
def grouped_bars(
  series: Mapping[str, Mapping[str, float]],
  *,
  x_label: str,
  styles: Mapping[str, Look] | None = None,
  order: Sequence[str] | None = None,
  format: str = ".1%",
  title: str = "",
) -> Figure:
  """Horizontal bars: for every category one bar a series, with its value written beside it.

  Args:
    series: name to category to value >= 0; a missing category counts as 0.
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
  order = list(order or sorted(categories, key=lambda name: -first.get(name, 0)))
  for name, values in series.items():
    for category, value in values.items():
      if not 0 <= value < math.inf:
        raise ValueError(f"The bar {category!r} of {name!r} is {value}, not a size.")
  styles = styles or looks(list(series))
  figure, axes = _new(0.75 + len(order) * (0.17 * len(series) + 0.12))
  thick = 0.8 / len(series)
  largest = max(max(values.values(), default=0) for values in series.values()) or 1
  for i, (name, values) in enumerate(series.items()):
    centres = np.arange(len(order)) + (i - (len(series) - 1) / 2) * thick
    sizes = [values.get(category, 0.0) for category in order]
    colour = styles.get(name, NEUTRAL).colour
    axes.barh(centres, sizes, height=thick * 0.9, color=colour, label=name)
    for centre, size in zip(centres, sizes):
      axes.text(
        size + 0.008 * largest, centre, _format(size, format), va="center", fontsize=8, color=_INK
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
    axes.legend(loc="lower right")
  return figure


def _format(value: float, spec: str) -> str:
  return format(value, spec).replace("-", "\N{MINUS SIGN}")


# --- distributions --------------------------------------------------------------------------------


@_plot
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
  figure, axes = _new(height)
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
      axes.axvline(x, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
      left = x > (low + high) / 2
      axes.annotate(
        label, (x, 0.97), xycoords=("data", "axes fraction"), xytext=(-4 if left else 4, 0),
        textcoords="offset points", ha="right" if left else "left", va="top", fontsize=8.5,
      )
  if len(arrays) > 1:
    axes.legend(loc="upper left")
  return figure


@_plot
def scatter(
  x: Sequence[float],
  y: Sequence[float],
  *,
  x_label: str,
  y_label: str,
  note: str = "",
  identity: bool = False,
  max_points: int = 3000,
  title: str = "",
  height: float = 3.9,
) -> Figure:
  """Points, or with more than `max_points` of them their density in hexagons.

  Args:
    note: written into the upper left corner, such as a correlation.
    identity: draw the line y = x.

  Raises:
    ValueError: shapes differ, no point, or a value that is not finite.
  """
  x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
  if x.shape != y.shape or not x.size or not (np.isfinite(x).all() and np.isfinite(y).all()):
    raise ValueError(
      f"A scatter plot needs as many finite x as y values, at least one ({x.size} and {y.size})."
    )
  figure, axes = _new(height)
  if len(x) <= max_points:
    size, alpha = (14, 0.65) if len(x) < 400 else (7, 0.35)
    axes.scatter(x, y, s=size, alpha=alpha, color=_COLOURS[0], linewidths=0)
  else:
    hexagons = axes.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="Blues", linewidths=0)
    bar = figure.colorbar(hexagons, ax=axes, pad=0.01, shrink=0.8, label="examples in a cell")
    bar.outline.set_visible(False)
  if identity:
    ends = [max(x.min(), y.min()), min(x.max(), y.max())]
    axes.plot(ends, ends, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  if note:
    axes.text(
      0.02, 0.97, note, transform=axes.transAxes, va="top", fontsize=9,
      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3},
    )
  return figure


# --- images ---------------------------------------------------------------------------------------


@_plot
def heatmap(
  values,
  *,
  x_label: str = "",
  y_label: str = "",
  row_labels: Sequence[str] | None = None,
  column_labels: Sequence[str] | None = None,
  value_label: str = "",
  centre: float | None = None,
  limits: tuple[float, float] | None = None,
  annotate: str = "",
  extent: tuple[float, float, float, float] | None = None,
  title: str = "",
  height: float | None = None,
) -> Figure:
  """A matrix as an image: data weights over steps, shares by kind and method, and the like.

  Args:
    values: `[R,C]`; NaN cells stay white. A matrix of more rows or columns than the image has dots
      is averaged over blocks, so that thin lines do not vanish or flicker.
    row_labels, column_labels: a label for each, for small matrices.
    value_label: the label of the colour bar.
    centre: if given, colours diverge from this value (red above, blue below).
    limits: values at the ends of the colour scale; the data's own if not given.
    annotate: a format such as ".0%": the value is written into each cell.
    extent: left, right, bottom, top in units of the axes, when there are no labels.

  Raises:
    ValueError: not a matrix, empty, without a finite value, or labels that do not fit.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 2 or not values.size or not np.isfinite(values).any():
    raise ValueError(f"A heat map needs a matrix with finite values, not shape {values.shape}.")
  labelled = (("row", row_labels), ("column", column_labels))
  for (name, labels), n in zip(labelled, values.shape):
    if labels is not None and len(labels) != n:
      raise ValueError(f"A heat map of {n} {name}s has {len(labels)} {name} labels.")
  if height is None:
    height = 0.9 + 0.32 * len(values) if row_labels is not None else 3.6
  full_size = values.shape
  if row_labels is None and column_labels is None and not annotate:
    values = _block_means(values, max_rows=int(height * DPI), max_columns=int(WIDTH * DPI))
  low, high = limits or (np.nanmin(values), np.nanmax(values))
  if centre is not None:
    reach = max(high - centre, centre - low) or 1.0
    low, high, colours = centre - reach, centre + reach, "RdBu_r"
  else:
    colours = "Blues" if annotate else "viridis"
  high = high if high > low else low + 1
  figure, axes = _new(height)
  if extent is None and row_labels is None and column_labels is None:
    extent = (0, full_size[1], full_size[0], 0)
  image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, extent=extent)
  axes.grid(False)
  for spine in axes.spines.values():
    spine.set_visible(False)
  if row_labels is not None:
    axes.set_yticks(range(len(row_labels)), row_labels)
  if column_labels is not None:
    axes.set_xticks(range(len(column_labels)), column_labels)
    axes.xaxis.tick_top()
    if max(map(len, column_labels)) * len(column_labels) > 90:
      for text in axes.get_xticklabels():
        text.set(rotation=35, ha="left", rotation_mode="anchor")
  if row_labels is not None or column_labels is not None:
    axes.tick_params(length=0)
  if annotate:
    for (i, j), value in np.ndenumerate(values):
      if np.isfinite(value):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        axes.text(
          j, i, _format(value, annotate), ha="center", va="center", fontsize=8,
          color="white" if dark else _INK,
        )
  else:
    bar = figure.colorbar(image, ax=axes, pad=0.01, label=value_label)
    bar.outline.set_visible(False)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  return figure


def _block_means(values: np.ndarray, max_rows: int, max_columns: int) -> np.ndarray:
  for axis, most in ((0, max_rows), (1, max_columns)):
    n = values.shape[axis]
    if n > most:
      edges = np.linspace(0, n, most + 1).round().astype(int)
      known = np.isfinite(values)
      total = np.add.reduceat(np.where(known, values, 0.0), edges[:-1], axis=axis)
      count = np.add.reduceat(known.astype(np.float64), edges[:-1], axis=axis)
      values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
  return values


# --- fits -----------------------------------------------------------------------------------------


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


@_plot
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
  figure, axes = _new(height)
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
  _label_ends(figure, axes, ends)
  return figure


def _thousands(value: float, _position=None) -> str:
  return f"{value:,.0f}" if value == round(value) else f"{value:g}"
