"""Plots as pure functions: numbers in, a matplotlib figure out, no display and no global state.

`png` turns a figure into bytes for `html.Figure`, `save` into a file. Figures are 7.2 inches wide
at 200 dots an inch, that is 720 pixels of a page drawn at twice their size. The colours (Okabe and
Ito, 2008) stay apart for colour-blind eyes; series also differ in their dashes and are named beside
the curve.
"""

from lmops_jax.reporting.plots.bars import grouped_bars, histogram
from lmops_jax.reporting.plots.fields import clouds, heatmap, scatter
from lmops_jax.reporting.plots.lines import Fit, curves, fits, paths
from lmops_jax.reporting.plots.style import DPI, NEUTRAL, Look, Run, looks, png, save

__all__ = [
  "DPI", "NEUTRAL", "Fit", "Look", "Run", "clouds", "curves", "fits", "grouped_bars", "heatmap",
  "histogram", "looks", "paths", "png", "save", "scatter",
]
