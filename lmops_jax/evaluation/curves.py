"""Reading learning curves: how many steps one run needs to reach another run's loss."""

from collections.abc import Sequence

import numpy as np


def steps_to_match(curve: Sequence[tuple[float, float]], value: float) -> float | None:
  """First step at which a loss curve is at or below `value`, linear between measured points.

  Args:
    curve: `(step, loss)` pairs in increasing order of step; lower losses are better.
    value: the loss to reach, for instance the final loss of a baseline.

  Returns:
    The step (a float, interpolated), or None if the curve never gets there.

  Raises:
    ValueError: an empty curve, steps out of order, or a non-finite number.
  """
  points = np.asarray(curve, np.float64)
  if points.ndim != 2 or points.shape[-1] != 2 or not len(points):
    raise ValueError(
      f"A curve is a non-empty sequence of (step, loss) pairs, but its shape is {points.shape}."
    )
  if not (np.all(np.isfinite(points)) and np.isfinite(value)):
    raise ValueError(f"A curve and the loss to match must be finite (the loss is {value}).")
  steps, losses = points.T
  if np.any(np.diff(steps) <= 0):
    raise ValueError("The steps of a curve must increase; sort the points and drop repeated steps.")
  reached = np.flatnonzero(losses <= value)
  if not reached.size:
    return None
  i = int(reached[0])
  if i == 0:
    return float(steps[0])
  share = (losses[i - 1] - value) / (losses[i - 1] - losses[i])
  return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
