"""Scaling-law fits: the loss as a function of model size and training tokens.

The form is Hoffmann et al.'s (arXiv 2203.15556, equation 10 and appendix D.3):
L(N, D) = E + A / N^alpha + B / D^beta, fitted to log losses under a Huber penalty by L-BFGS from
a grid of starts. PDS (arXiv 2410.07064, section 3.3) extrapolates with it. A fit on few points is
weak evidence: residuals and bootstrap intervals come with every one.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import optimize

from lmops_jax.evaluation.intervals import quantiles

NAMES = ("E", "A", "B", "alpha", "beta")


class ScalingFit(NamedTuple):
  """A fitted L(N, D) = E + A / N^alpha + B / D^beta.

  Attributes:
    E, A, B, alpha, beta: the constants (nats for E; A and B belong to the units of N and D).
    residuals: `[M]`, log predicted minus log measured loss of each point.
    samples: `[num_bootstrap, 5]`, the constants (in the order of `NAMES`) refitted to resampled
      points.
  """

  E: float
  A: float
  B: float
  alpha: float
  beta: float
  residuals: np.ndarray
  samples: np.ndarray

  def predict(self, num_params, num_tokens) -> np.ndarray:
    """Loss at model size N and D training tokens; the arguments broadcast."""
    return _loss(self[:5], num_params, num_tokens)

  def interval(self, num_params, num_tokens, level: float = 0.95) -> np.ndarray:
    """Bootstrap interval of the prediction, shape `[2, ...]`; NaN without bootstrap samples."""
    n, d = np.broadcast_arrays(np.asarray(num_params, float), np.asarray(num_tokens, float))
    if not len(self.samples):
      return np.full((2, *n.shape), np.nan)
    columns = self.samples.T.reshape(5, -1, *(1,) * n.ndim)
    return np.quantile(_loss(columns, n, d), quantiles(level), axis=0)

  def constants(self, level: float = 0.95) -> dict[str, tuple[float, float, float]]:
    """Each constant with the ends of its bootstrap interval."""
    if not len(self.samples):
      return {name: (value, np.nan, np.nan) for name, value in zip(NAMES, self[:5])}
    low, high = np.quantile(self.samples, quantiles(level), axis=0)
    return {
      name: (value, float(a), float(b)) for name, value, a, b in zip(NAMES, self[:5], low, high)
    }


def fit_scaling_law(
  num_params,
  num_tokens,
  losses,
  *,
  delta: float = 1e-3,
  num_bootstrap: int = 0,
  seed: int = 0,
) -> ScalingFit:
  """Fits L(N, D) = E + A / N^alpha + B / D^beta with E, A, B > 0 and alpha, beta >= 0.

  Minimises sum_i Huber_delta(logsumexp(a - alpha ln N_i, b - beta ln D_i, e) - ln L_i), with
  A = e^a, B = e^b, E = e^e. The whole grid of starts is scored and its best are refined by L-BFGS.
  (The penalty is divided by delta^2 and the terms are centred at the mean ln N and ln D, or L-BFGS
  stops too early in an ill-conditioned valley of tiny values.)

  Args:
    num_params: `[M]`, N > 0.
    num_tokens: `[M]`, D > 0.
    losses: `[M]`, > 0, nats per token.
    delta: where the Huber penalty turns from square to linear, in log loss.
    num_bootstrap: refits to points drawn with replacement; 0 gives no intervals, 200 is usual.
    seed: the seed of the bootstrap.

  Raises:
    ValueError: fewer than 5 points, fewer than 3 different model sizes or token counts (then the
      constants are not determined), or a value that is not positive and finite.
  """
  columns = [np.asarray(x, np.float64) for x in (num_params, num_tokens, losses)]
  if columns[0].ndim != 1 or len({x.shape for x in columns}) != 1:
    raise ValueError(
      "Model sizes, token counts and losses must be vectors of one length, but their shapes are "
      f"{', '.join(str(x.shape) for x in columns)}."
    )
  num_points = len(columns[0])
  if num_points < 5:
    raise ValueError(
      f"A scaling law has 5 constants and cannot be fitted to {num_points} points; "
      "measure at least 5, better 20 or more."
    )
  for name, x in zip(("model size", "token count", "loss"), columns):
    if not np.all(np.isfinite(x) & (x > 0)):
      bad = int(np.argmin(np.isfinite(x) & (x > 0)))
      raise ValueError(f"The {name} of point {bad} is {x[bad]}, not positive and finite.")
    if name != "loss" and len(np.unique(x)) < 3:
      raise ValueError(
        f"A scaling law needs 3 or more different values of the {name}, but there are "
        f"{len(np.unique(x))}."
      )
  if delta <= 0:
    raise ValueError(f"delta={delta} is not positive.")

  log_n, log_d, log_loss = map(np.log, columns)
  centre = (log_n.mean(), log_d.mean())
  data = (log_n - centre[0], log_d - centre[1], log_loss)
  best = _minimise(_starts(data, delta), data, delta)
  predicted = _log_sum_exp(_terms(best, data[0], data[1]))

  rng = np.random.default_rng(seed)
  samples = []
  while len(samples) < num_bootstrap:
    rows = rng.integers(num_points, size=num_points)
    drawn = [x[rows] for x in data]
    if len(np.unique(rows)) >= 5 and all(len(np.unique(x)) >= 3 for x in drawn[:2]):
      samples.append(_constants(_minimise([best], drawn, delta), centre))
  return ScalingFit(
    *_constants(best, centre), predicted - log_loss, np.array(samples).reshape(-1, 5)
  )


def _loss(constants, num_params, num_tokens):
  e, a, b, alpha, beta = constants
  return e + a / np.asarray(num_params, float) ** alpha + b / np.asarray(num_tokens, float) ** beta


def _constants(theta, centre) -> tuple[float, ...]:
  a, b, e, alpha, beta = theta
  return tuple(
    float(x)
    for x in (np.exp(e), np.exp(a + alpha * centre[0]), np.exp(b + beta * centre[1]), alpha, beta)
  )


def _terms(theta, log_n, log_d):
  a, b, e, alpha, beta = theta
  return np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])


def _log_sum_exp(terms):
  largest = terms.max(0)
  return largest + np.log(np.exp(terms - largest).sum(0))


def _objective(theta, data, delta):
  """Huber penalty over delta^2, and its gradient with respect to (a, b, e, alpha, beta)."""
  log_n, log_d, log_loss = data
  terms = _terms(theta, log_n, log_d)
  predicted = _log_sum_exp(terms)
  z = (predicted - log_loss) / delta
  slope = np.clip(z, -1, 1)
  value = np.sum(np.where(np.abs(z) <= 1, z * z / 2, np.abs(z) - 0.5))
  share_n, share_d, share_e = np.exp(terms - predicted) * slope / delta
  gradient = np.array(
    [share_n.sum(), share_d.sum(), share_e.sum(), -(share_n @ log_n), -(share_d @ log_d)]
  )
  return value, gradient


def _starts(data, delta, num_starts: int = 10) -> list[np.ndarray]:
  """The best starts of a grid over the share of each term at the centre, and both exponents."""
  level = np.log(np.median(np.exp(data[2])))
  shares = (0.02, 0.1, 0.25, 0.5, 0.75)
  exponents = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2)
  grid = [
    np.array([level + np.log(n), level + np.log(d), level + np.log(1 - n - d), alpha, beta])
    for n, d, alpha, beta in itertools.product(shares, shares, exponents, exponents)
    if n + d < 0.99
  ]
  # A wide penalty ranks starts by how near they are, not by how many points they hit by chance.
  grid.sort(key=lambda theta: _objective(theta, data, max(delta, 0.3))[0])
  return grid[:num_starts]


def _minimise(starts, data, delta) -> np.ndarray:
  """The best minimum found from `starts`, under a penalty that narrows to `delta`.

  With delta = 1e-3 at once, a start far away sees a constant slope at every point. The wide penalty
  is nearly a least-squares problem, so that most starts meet in one place and few remain to refine.
  """
  rough = [_lbfgs(start, data, max(delta, 0.1), 1e-10) for start in starts]
  rough.sort(key=lambda found: found.fun)
  kept = []
  for found in rough:
    if all(np.abs(found.x - other).max() > 0.05 for other in kept) and len(kept) < 4:
      kept.append(found.x)
  fine = []
  for theta in kept:
    theta = _lbfgs(theta, data, max(delta, 0.01), 1e-10).x
    fine.append(_lbfgs(theta, data, delta, 1e-15))
  return min(fine, key=lambda found: found.fun).x


def _lbfgs(start, data, delta, tolerance):
  return optimize.minimize(
    _objective,
    start,
    args=(data, delta),
    jac=True,
    method="L-BFGS-B",
    bounds=[(None, None)] * 3 + [(0, 10)] * 2,
    options={"maxiter": 2000, "maxfun": 4000, "ftol": tolerance, "gtol": 1e-7, "maxcor": 20},
  )
