"""Prototypes in an encoder's space, and what they say of an input (arXiv:2211.13638, eqs. 1, 7, 8).

A class is told by a mixture: each prototype has a distribution over classes, and weighs by how
close the input is to it. Arrays have room for `K` prototypes, of which a mask tells the ones in
use, so that the number of prototypes changes without a new program. Everything is float32, whatever
the encoder computes in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize


class Prototypes(NamedTuple):
  """What is trained, besides the encoder. Slots that are not in use hold any finite numbers.

  Attributes:
    centers: `[K,D] float32`.
    logits: `[K,C] float32`, unnormalised log-probabilities of the classes; for targets that are
      numbers `[K,1]`, the value that the prototype stands for.
    log_variance: `[] float32` shared by all, or `[K]`.
  """

  centers: jax.Array
  logits: jax.Array
  log_variance: jax.Array


def squared_distances(features: jax.Array, centers: jax.Array) -> jax.Array:
  """`[B,K] float32` of `[B,D]` and `[K,D]`.

  By products, which take a fraction of the time of differences; what they get wrong is about 1e-7
  of the squared lengths.
  """
  features, centers = features.astype(jnp.float32), centers.astype(jnp.float32)
  lengths = jnp.sum(jnp.square(features), axis=1)[:, None] + jnp.sum(jnp.square(centers), axis=1)
  return jnp.maximum(lengths - 2 * jnp.matmul(features, centers.T, precision="highest"), 0)


def log_importance(prototypes: Prototypes, active: jax.Array, features: jax.Array) -> jax.Array:
  """Log of the weight of each prototype for each input (eq. 8), isotropic Gaussians.

  Args:
    active: `[K] bool`, at least one True.
    features: `[B,D]`.

  Returns:
    `[B,K] float32`, -inf for slots that are not in use.
  """
  log_variance = prototypes.log_variance
  distances = squared_distances(features, prototypes.centers)
  score = -distances / (2 * jnp.exp(log_variance))
  if log_variance.ndim:  # one variance for all cancels
    score -= features.shape[-1] / 2 * log_variance
  return jax.nn.log_softmax(jnp.where(active, score, -jnp.inf), axis=-1)


def log_probabilities(log_weights: jax.Array, logits: jax.Array) -> jax.Array:
  """`[B,C] float32`, log P(class | input) (eq. 1), of `log_importance` and `logits [K,C]`."""
  of_class = jax.nn.log_softmax(logits, axis=-1)
  return jax.nn.logsumexp(log_weights[:, :, None] + of_class[None], axis=1)


def log_probability(log_weights: jax.Array, logits: jax.Array, label: jax.Array) -> jax.Array:
  """`[B] float32`, what `log_probabilities` has for the class `label [B]` of each input."""
  own = jax.nn.one_hot(label, logits.shape[1])
  of_label = jnp.matmul(own, jax.nn.log_softmax(logits, axis=-1).T, precision="highest")
  return jax.nn.logsumexp(log_weights + of_label, axis=1)


def values(log_weights: jax.Array, logits: jax.Array) -> jax.Array:
  """`[B] float32`, the expected value of an input whose target is a number."""
  return jnp.exp(log_weights) @ logits[:, 0]


def threshold(variance: jax.Array, spread: jax.Array, alpha: float, width: int) -> jax.Array:
  """The squared distance beyond which a point opens a prototype (eq. 6, its lost sign put back).

  In a mixture with a Chinese-restaurant prior of concentration `alpha`, clusters of variance s and
  a base distribution of variance r, a point at squared distance x of a cluster has the density
  (2 pi s)^(-D/2) exp(-x / 2s) there and, leaving out its distance to the base mean,
  alpha (2 pi (s + r))^(-D/2) in a new one. The new one is larger if

    x > 2 s ln(1/alpha) + D s ln(1 + r/s).

  Args:
    variance: s > 0. spread: r >= 0, see `spread_of`. alpha: in (0, 1]. width: D.
  """
  return 2 * variance * math.log(1 / alpha) + width * variance * jnp.log1p(spread / variance)


def spread_of(centers: jax.Array, active: jax.Array) -> jax.Array:
  """`[] float32`: mean over dimensions of the unbiased variance of the prototypes in use.

  One prototype alone has no spread, 0.
  """
  squares = jnp.sum(jnp.square(centers - _mean(centers, active)), axis=1)
  mean_square = jnp.sum(jnp.where(active, squares, 0)) / centers.shape[1]
  return mean_square / jnp.maximum(jnp.sum(active) - 1, 1)


def _mean(centers, active):
  """`[D]`, of those in use, of which there is at least one."""
  return jnp.sum(jnp.where(active[:, None], centers, 0), axis=0) / jnp.sum(active)


def variance_of(log_variance: jax.Array, active: jax.Array) -> jax.Array:
  """`[] float32`: the shared variance, or the mean of those in use."""
  variance = jnp.exp(log_variance)
  if not variance.ndim:
    return variance
  return jnp.sum(jnp.where(active, variance, 0)) / jnp.maximum(jnp.sum(active), 1)


def diversity(
  centers: jax.Array, active: jax.Array, threshold: jax.Array, squared: bool
) -> jax.Array:
  """Penalty of prototypes that stand close together (eq. 10), `[] float32`.

  The paper subtracts a distance from the threshold, which is a squared one, so that its hinge is
  always open.

  Args:
    threshold: see `threshold`; no gradient goes to it.
    squared: True subtracts from the threshold as printed; False from its square root.
  """
  limit = jax.lax.stop_gradient(threshold if squared else jnp.sqrt(threshold))
  # By products, which take a hundredth of the time of differences. A floor of what products get
  # wrong keeps the slope of near centres from growing beyond their accuracy.
  centers = centers - jax.lax.stop_gradient(_mean(centers, active))
  norms = jnp.sum(jnp.square(centers), axis=1)
  # Each pair comes twice, and each time the slope is that of its first centre: together the slope
  # of pairs that come once, for one product less.
  others, their_norms = jax.lax.stop_gradient((centers, norms))
  sums = norms[:, None] + their_norms
  squares = jnp.maximum(sums - 2 * jnp.matmul(centers, others.T, precision="highest"), 0)
  distances = jnp.sqrt(squares + 1e-6 * jax.lax.stop_gradient(sums) + 1e-12)
  pairs = active[:, None] & active & ~jnp.eye(len(centers), dtype=bool)
  twice = jnp.sum(jnp.where(pairs, jnp.square(jnp.maximum(limit - distances, 0)), 0))
  return twice - jax.lax.stop_gradient(twice) / 2


def with_signs(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`logits [K,C]` clipped so that a prototype never speaks against its own class `labels [K]`."""
  own = labels[:, None] == jnp.arange(logits.shape[1])
  return jnp.where(own, jnp.maximum(logits, 0), jnp.minimum(logits, 0))


def first_logits(labels: jax.Array, num_classes: int) -> jax.Array:
  """`[n,C] float32`: +b for the own class and -b for others, b such that the own one has 0.9."""
  size = 0.5 * math.log(9 * (num_classes - 1))
  own = labels[:, None] == jnp.arange(num_classes)
  return jnp.where(own, size, -size).astype(jnp.float32)


def calibrated_variance(
  distances, spread: float, alpha: float, width: int, quantile: float
) -> float:
  """The variance whose threshold is a quantile of the distances of rows to their own prototype.

  Args:
    distances: `[N]`, squared, not all 0.

  Raises:
    ValueError: if no variance within [1e-4, 1e3] of the mean distance per dimension does that.
  """
  distances = np.asarray(distances, np.float64)
  wanted = float(np.quantile(distances, quantile))
  unit = float(distances.mean()) / width

  def excess(log_variance):
    variance = math.exp(log_variance)
    return (2 * variance * math.log(1 / alpha)
            + width * variance * math.log1p(spread / variance) - wanted)

  low, high = math.log(1e-4 * unit) if unit > 0 else 0.0, math.log(1e3 * unit) if unit > 0 else 0.0
  if unit <= 0 or excess(low) > 0 or excess(high) < 0:
    raise ValueError(
      f"the rows are at squared distances of {float(distances.mean()):.3g} on average from their "
      f"classes' prototypes, for which no variance puts the threshold at the quantile {quantile}; "
      "give prototypes.Growth.variance, or check that the encoder tells the rows apart."
    )
  return math.exp(optimize.brentq(excess, low, high, xtol=1e-12))
