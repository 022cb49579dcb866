"""Pictures of prompts before and after, each column from one and the same noise."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmops_jax.reporting.plots.style import INK, WIDTH, plot

_LINE = 34  # characters of a prompt in a line
_PICTURE = 0.62  # inches


class Shown(NamedTuple):
  """A prompt as several arms have it.

  Attributes:
    names: of the arms.
    texts: their prompts.
    pictures: `[arms,n,side,side,3] uint8`; column j of all arms starts from the same noise.
    notes: a line under each prompt, such as its score.
  """

  names: Sequence[str]
  texts: Sequence[str]
  pictures: np.ndarray
  notes: Sequence[str]


@plot
def before_and_after(shown: Sequence[Shown]) -> Figure:
  """Rows of pictures, one for each arm of each prompt, with the prompt beside them.

  Raises:
    ValueError: nothing to show.
  """
  if not shown:
    raise ValueError("A figure of prompts needs at least one.")
  rows = [(name, text, pictures, note) for of in shown
          for name, text, pictures, note in zip(*of, strict=True)]
  num = max(len(pictures) for _, _, pictures, _ in rows)
  figure = Figure(figsize=(WIDTH, _PICTURE * len(rows) * 1.12))
  FigureCanvasAgg(figure)
  text_share = (WIDTH - num * _PICTURE) / _PICTURE
  axes = figure.subplots(
    len(rows), 1 + num, squeeze=False, width_ratios=[text_share] + [1] * num)
  figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, wspace=0.06, hspace=0.12)
  for cells, (name, text, pictures, note) in zip(axes, rows):
    wrapped = "\n".join(textwrap.wrap(text, int(text_share * _LINE / 3.2)))
    cells[0].text(0, 0.98, name, fontsize=8, color=INK, weight="bold", va="top")
    cells[0].text(0.17, 0.98, f"{wrapped}\n{note}", fontsize=7.5, color=INK, va="top")
    for cell, picture in zip(cells[1:], pictures):
      cell.imshow(picture, interpolation="nearest")
  for cell in axes.ravel():
    cell.set_axis_off()
  return figure
