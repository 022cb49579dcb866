"""Points and their density, and matrices as colours."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lmops_jax.reporting.plots.style import (
  COLOURS,
  DPI,
  INK,
  SOFT,
  WIDTH,
  new,
  plot,
  signed,
)


@plot
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
  figure, axes = new(height)
  if len(x) <= max_points:
    size, alpha = (14, 0.65) if len(x) < 400 else (7, 0.35)
    axes.scatter(x, y, s=size, alpha=alpha, color=COLOURS[0], linewidths=0)
  else:
    hexagons = axes.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="Blues", linewidths=0)
    bar = figure.colorbar(hexagons, ax=axes, pad=0.01, shrink=0.8, label="examples in a cell")
    bar.outline.set_visible(False)
  if identity:
    ends = [max(x.min(), y.min()), min(x.max(), y.max())]
    axes.plot(ends, ends, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  if note:
    axes.text(
      0.02, 0.97, note, transform=axes.transAxes, va="top", fontsize=9,
      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3},
    )
  return figure


@plot
def clouds(
  groups: Mapping[str, np.ndarray],
  marks: Mapping[str, np.ndarray],
  *,
  x_label: str = "",
  y_label: str = "",
  title: str = "",
  height: float = 4.6,
) -> Figure:
  """Points of several groups, each with a colour, and marks of the same groups on top.

  Args:
    groups: `[n,2]` points by group; a colour returns after eight groups, with another shape.
    marks: `[m,2]` by group, drawn large; its groups are those of `groups`.

  Raises:
    ValueError: no group, a mark of none of them, or points that are not finite pairs.
  """
  if not groups or set(marks) - set(groups):
    raise ValueError(
      f"marks of {', '.join(sorted(set(marks) - set(groups))) or 'no group'} need points of the "
      "same groups."
    )
  figure, axes = new(height)
  for i, (name, points) in enumerate(groups.items()):
    both = [np.asarray(of, np.float64).reshape(-1, 2)
            for of in (points, marks.get(name, np.zeros((0, 2))))]
    if not all(np.isfinite(of).all() for of in both):
      raise ValueError(f"the group {name} has points that are not finite.")
    colour, shape = COLOURS[i % len(COLOURS)], "o^sDv"[i // len(COLOURS) % 5]
    axes.scatter(*both[0].T, s=9, alpha=0.45, color=colour, marker=shape, linewidths=0, label=name)
    axes.scatter(*both[1].T, s=90, color=colour, marker="*", edgecolors=INK, linewidths=0.7)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  axes.legend(
    loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False, markerscale=2)
  return figure


@plot
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
  figure, axes = new(height)
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
          j, i, signed(value, annotate), ha="center", va="center", fontsize=8,
          color="white" if dark else INK,
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
