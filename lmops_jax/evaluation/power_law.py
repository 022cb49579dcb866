"""Loss against training steps: L(t) = L0 + (B / t)^beta, as arXiv 2402.17759 (section 4.2) fits it.

The fit is the paper's: linear regression of ln(L - L0) on ln t for t > t0, with L0 (and t0)
searched for the highest correlation, one L0 for all curves that are compared. The law is
ill-conditioned in L0, and more so in B: an ill-conditioned fit says so, and every fit comes with
its profile over L0 and bootstrap intervals.
"""

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.evaluation.intervals import quantiles

_FLAT = 1e-3  # r^2 this close to the best cannot be told from it
_MIN_POINTS = 3


class IllConditioned(UserWarning):
  """The curves do not determine L0, and so not B either."""


class PowerLaw(NamedTuple):
  """A fitted `L0 + (B / t)^beta`.

  Attributes:
    B, beta: the curve's own. L0: shared by the curves fitted together, same unit as the losses.
    t0: the last step that is not used.
    r2: squared correlation of ln(L - L0) and ln t.
    samples: `[num_bootstrap, 2]`, (ln B, beta) refitted at the same L0 with resampled blocks of
      residuals.
  """

  B: float
  beta: float
  L0: float
  t0: int
  r2: float
  samples: np.ndarray

  def predict(self, steps) -> np.ndarray:
    """Loss after each of `steps` (> 0)."""
    return self.L0 + (self.B / np.asarray(steps, np.float64)) ** self.beta

  def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Ends of the bootstrap intervals of B and beta; NaN without samples."""
    if not len(self.samples):
      return {"B": (np.nan, np.nan), "beta": (np.nan, np.nan)}
    ends = np.quantile(self.samples, quantiles(level), axis=0)
    return {"B": tuple(np.exp(ends[:, 0])), "beta": tuple(ends[:, 1])}


class Fits(NamedTuple):
  """Laws of several curves with one L0.

  Attributes:
    laws: name to `PowerLaw`.
    profile: `[G, 2]`, tried L0 and the mean r^2 over curves (at the chosen t0).
    is_ill_conditioned: whether two L0 apart by over a tenth of the lowest loss fit equally well.
  """

  laws: dict[str, PowerLaw]
  profile: np.ndarray
  is_ill_conditioned: bool


def fit_power_laws(
  curves: Mapping[str, Sequence[float]],
  *,
  L0: float | None = None,
  t0: int | Sequence[int] = 0,
  num_bootstrap: int = 0,
  seed: int = 0,
) -> Fits:
  """Fits every curve, with one L0 and one t0.

  Args:
    curves: name to losses `[T + 1]`, before the first step and after each.
    L0: fixed, or None to search from 0 up to the lowest loss used.
    t0: fixed, or several to choose from by the mean r^2.
    num_bootstrap: refits with resampled blocks of residuals; 0 gives no intervals.
    seed: the seed of the bootstrap.

  Raises:
    ValueError: if there are no curves, a curve is not finite, t0 leaves fewer than 3 points, or a
      loss after t0 is at or below L0 (0 if that is searched).

  Warns:
    IllConditioned: if very different L0 fit equally well.
  """
  curves = {name: np.asarray(losses, np.float64) for name, losses in curves.items()}
  if not curves:
    raise ValueError("there are no loss curves to fit.")
  for name, losses in curves.items():
    if losses.ndim != 1:
      raise ValueError(f"the losses of {name!r} have shape {losses.shape}; expected [T + 1].")
  starts = [operator.index(start) for start in ([t0] if np.ndim(t0) == 0 else t0)]
  shortest = min(len(losses) - 1 for losses in curves.values())
  if not starts or min(starts) < 0:
    raise ValueError(f"t0={t0} must be one or more steps >= 0.")
  if max(starts) > shortest - _MIN_POINTS:
    raise ValueError(
      f"t0={max(starts)} leaves {max(shortest - max(starts), 0)} of {shortest} steps; a fit needs "
      f"{_MIN_POINTS} or more."
    )
  for name, losses in curves.items():
    bad = np.flatnonzero(~np.isfinite(losses[min(starts) + 1 :]))
    if bad.size:
      raise ValueError(f"the loss of {name!r} is not finite at step {min(starts) + 1 + bad[0]}.")
  found = []
  for start in starts:
    used = {name: losses[start + 1 :] for name, losses in curves.items()}
    lowest = min(losses.min() for losses in used.values())
    if lowest <= (0 if L0 is None else L0):
      name = min(used, key=lambda name: used[name].min())
      step = start + 1 + int(np.argmin(used[name]))
      raise ValueError(
        f"the loss of {name!r} is {lowest:.6g} at step {step}, not above L0={L0 or 0}; "
        + ("a search of L0 needs losses above 0." if L0 is None else "choose a lower L0.")
      )
    # Denser towards the lowest loss, where the fit changes fastest.
    grid = np.array([L0]) if L0 is not None else lowest * (1 - np.geomspace(1, 1e-3, 200))
    scores = np.array([
      np.mean([_regress(losses, start, level)[2] for losses in used.values()]) for level in grid
    ])
    found.append((scores.max(), start, float(grid[scores.argmax()]), grid, scores))
  _, start, level, grid, scores = max(found, key=lambda row: row[0])
  rng = np.random.default_rng(seed)
  laws = {
    name: _law(losses[start + 1 :], start, level, num_bootstrap, rng)
    for name, losses in curves.items()
  }
  alike = grid[scores >= scores.max() - _FLAT]
  lowest = min(losses[start + 1 :].min() for losses in curves.values())
  vague = L0 is None and bool(np.ptp(alike) > 0.1 * lowest)
  if vague:
    warnings.warn(IllConditioned(
      f"L0 between {alike.min():.4g} and {alike.max():.4g} fits the loss curves equally well (r^2 "
      f"within {_FLAT:g}), so L0 and B are not determined; compare laws at a fixed L0."
    ), stacklevel=2)
  return Fits(laws, np.stack([grid, scores], axis=1), vague)


def predicted_acceleration(base: PowerLaw, new: PowerLaw, num_steps: float) -> float:
  """`B1^(beta1/beta2) / B2 * T^(1 - beta1/beta2)`: T over `new`'s steps to base's loss at T.

  Raises:
    ValueError: if the laws have different L0.
  """
  if base.L0 != new.L0:
    raise ValueError(
      f"the laws have L0={base.L0:.6g} and L0={new.L0:.6g}; fit the curves together, with one L0."
    )
  ratio = base.beta / new.beta
  log = ratio * np.log(base.B) - np.log(new.B) + (1 - ratio) * np.log(num_steps)
  return float(np.exp(log))


def _regress(losses, start, level):
  """ln B, beta, r^2 and the residuals of the regression."""
  x = np.log(np.arange(start + 1, start + 1 + len(losses)))
  y = np.log(losses - level)
  slope, intercept, r2 = _line(x, y)
  return intercept / -slope if slope else np.nan, -slope, r2, y - intercept - slope * x


def _line(x, y):
  dx, dy = x - x.mean(), y - y.mean()
  slope = (dx @ dy) / (dx @ dx)
  total = dy @ dy
  r2 = slope * (dx @ dy) / total if total > 0 else 1.0
  return slope, y.mean() - slope * x.mean(), r2


def _law(losses, start, level, num_bootstrap, rng) -> PowerLaw:
  log_b, beta, r2, residuals = _regress(losses, start, level)
  x = np.log(np.arange(start + 1, start + 1 + len(losses)))
  fitted = -beta * x + beta * log_b
  block = max(1, round(len(losses) ** 0.5))  # neighbouring residuals are alike
  samples = []
  for _ in range(num_bootstrap):
    first = rng.integers(len(losses) - block + 1, size=-(-len(losses) // block))
    rows = (first[:, None] + np.arange(block)).reshape(-1)[: len(losses)]
    slope, intercept, _ = _line(x, fitted + residuals[rows])
    samples.append((intercept / -slope if slope else np.nan, -slope))
  return PowerLaw(
    float(np.exp(log_b)), float(beta), float(level), start, float(r2),
    np.array(samples).reshape(-1, 2),
  )
