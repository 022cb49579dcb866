"""The look of every plot: sizes, colours, dashes, names beside curves; and figures as PNG files."""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.2  # inches
DPI = 200

INK, SOFT, LINE = "#1c1f23", "#5b636d", "#d9dde2"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#8a8a8a")
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_STYLE = {
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "axes.titlesize": 9.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.labelsize": 9,
  "axes.edgecolor": SOFT,
  "axes.labelcolor": INK,
  "axes.linewidth": 0.7,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "axes.grid": True,
  "grid.color": "#e8ebee",
  "grid.linewidth": 0.7,
  "text.color": INK,
  "xtick.color": SOFT,
  "ytick.color": SOFT,
  "xtick.labelcolor": INK,
  "ytick.labelcolor": INK,
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
      COLOURS[i % len(COLOURS)],
      "-" if name in emphasis else _DASHES[(i + i // len(COLOURS)) % len(_DASHES)],
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


def plot(draw: Callable[..., Figure]) -> Callable[..., Figure]:
  """Has a function draw in this look, whatever matplotlib is set to."""
  @functools.wraps(draw)
  def styled(*args, **kwargs) -> Figure:
    with matplotlib.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return styled


def new(height: float, columns: int = 1, **kwargs):
  """A figure of `height` inches and its axes, one or a row of `columns`."""
  figure = Figure(figsize=(WIDTH, height), layout="constrained")
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04)
  axes = figure.subplots(1, columns, **kwargs)
  return figure, axes


def label_ends(figure, axes, ends):
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


def signed(value: float, spec: str) -> str:
  """A number with a true minus sign."""
  return format(value, spec).replace("-", "\N{MINUS SIGN}")
