"""Pictures with what was said of them, as one figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmops_jax.reporting.plots.style import COLOURS, INK, WIDTH, plot

_COLUMNS = 4
_LINE = 30  # characters under a picture
_PICTURE, _TEXT = 1.82, 0.155  # inches of a picture and of a line


class Shown(NamedTuple):
  """A picture `[side,side,3] uint8`, and lines of (text, whether it is right or None)."""

  picture: np.ndarray
  lines: Sequence[tuple[str, bool | None]]


@plot
def gallery(shown: Sequence[Shown]) -> Figure:
  """Pictures in rows of four, the lines of each under it: right ones green, wrong ones red.

  Raises:
    ValueError: nothing to show.
  """
  if not shown:
    raise ValueError("A gallery needs at least one picture.")
  texts = [[(part, right) for text, right in of.lines for part in textwrap.wrap(text, _LINE)]
           for of in shown]
  longest = max(map(len, texts))
  num_rows = -(-len(shown) // _COLUMNS)
  figure = Figure(figsize=(WIDTH, num_rows * (_PICTURE + _TEXT * longest)))
  FigureCanvasAgg(figure)
  axes = figure.subplots(num_rows, _COLUMNS, squeeze=False)
  figure.subplots_adjust(0.01, 0.0, 0.99, 1.0, wspace=0.05, hspace=0.0)
  for cell, of, lines in zip(axes.ravel(), shown, texts):
    cell.set_anchor("N")
    cell.imshow(of.picture)
    for number, (text, right) in enumerate(lines):
      colour = INK if right is None else COLOURS[2] if right else COLOURS[1]
      cell.annotate(
        text, (0.5, 0), xycoords="axes fraction", xytext=(0, -4 - 10.5 * number),
        textcoords="offset points", ha="center", va="top", fontsize=7, color=colour)
  for cell in axes.ravel():
    cell.set_axis_off()
  return figure
