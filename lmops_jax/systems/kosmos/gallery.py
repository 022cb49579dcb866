"""Pictures with what was said of them, and matrices with what fits them, each as one figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmops_jax.reporting.plots.style import COLOURS, INK, WIDTH, plot

_COLUMNS = 4
_GAP = 3  # pixels between the pictures of a matrix
_LINE = 30  # characters under a picture
_PICTURE, _TEXT = 1.82, 0.155  # inches of a picture and of a line


class Shown(NamedTuple):
  """A picture `[side,side,3] uint8`, and lines of (text, whether it is right or None)."""

  picture: np.ndarray
  lines: Sequence[tuple[str, bool | None]]


class Puzzle(NamedTuple):
  """A matrix and what was said of it.

  Attributes:
    context: pictures `[side,side,3] uint8` in reading order; the last place is empty.
    layout: its rows and columns.
    candidates: as many pictures as probabilities, those of fitting; label: the right one.
  """

  context: Sequence[np.ndarray]
  layout: tuple[int, int]
  candidates: Sequence[np.ndarray]
  probabilities: Sequence[float]
  label: int


@plot
def puzzles(shown: Sequence[Puzzle]) -> Figure:
  """Matrices in rows, each beside its candidates with their probabilities.

  The right candidate's is green; if another one is the most probable, that one's is red.

  Raises:
    ValueError: nothing to show.
  """
  if not shown:
    raise ValueError("A figure of matrices needs at least one.")
  num = max(len(of.candidates) for of in shown)
  figure = Figure(figsize=(WIDTH, 1.25 * len(shown)))
  FigureCanvasAgg(figure)
  grid = figure.subplots(len(shown), 1 + num, squeeze=False, width_ratios=[2.4] + [1] * num)
  figure.subplots_adjust(0.01, 0.1, 0.99, 0.99, wspace=0.12, hspace=0.3)
  for axes, of in zip(grid, shown):
    axes[0].imshow(montage(of.context, of.layout))
    chosen = int(np.argmax(of.probabilities))
    for number, (cell, picture) in enumerate(zip(axes[1:], of.candidates)):
      cell.imshow(picture)
      right = number == of.label
      colour = COLOURS[2] if right else COLOURS[1] if number == chosen else INK
      cell.annotate(
        f"{of.probabilities[number]:.3g}", (0.5, 0), xycoords="axes fraction", xytext=(0, -4),
        textcoords="offset points", ha="center", va="top", fontsize=8, color=colour,
        weight="bold" if number == chosen else "normal")
  for cell in grid.ravel():
    cell.set_axis_off()
  return figure


def montage(pictures: Sequence[np.ndarray], layout: tuple[int, int]) -> np.ndarray:
  """Pictures of one size in rows and columns on grey, `[height,width,3] uint8`."""
  (rows, columns), (height, width, _) = layout, pictures[0].shape
  whole = np.full(
    (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 190, np.uint8)
  for number, picture in enumerate(pictures):
    row, column = divmod(number, columns)
    top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
    whole[top : top + height, left : left + width] = picture
  return whole


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
