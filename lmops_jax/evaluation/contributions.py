"""How alike the examples' contributions are, and which examples get no weight.

The statistics of arXiv 2402.17759, sections 3.2 and 4.3. A contribution is
`CT_n = <grad L(params_t), grad l_n(params_t)>`, paired with the weights of the step that starts at
`params_t`. Everything here belongs to one step and runs inside a compiled scan, so that nothing of
size T x N has to be kept; the functions from `series` on then read the stacked results.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LEARNED_LOSS = 1e-6  # nats; below it an example counts as perfectly learned
NUM_BINS = 20  # of weight / largest weight


class Similarity(NamedTuple):
  """One step's contributions under its weights, over the examples with weight."""
  mean: jax.Array  # [] sum_n gamma_n CT_n
  deviation: jax.Array  # [] root of sum_n (CT_n - mean)^2 / (active - 1)
  num_active: jax.Array  # [] examples with weight


class Exclusion(NamedTuple):
  """One step's counts of examples that do not help, and of those without weight among them."""
  num_harmful: jax.Array  # [] examples with CT <= 0
  num_excluded: jax.Array  # [] of these, those with weight 0


def similarity(weights: jax.Array, contributions: jax.Array) -> Similarity:
  """Mean and spread of `[N]` contributions under `[N]` weights (equation 8 of the paper)."""
  active = weights > 0
  count = jnp.sum(active)
  mean = jnp.sum(weights * contributions)
  square = jnp.sum(jnp.where(active, jnp.square(contributions - mean), 0))
  return Similarity(mean, jnp.sqrt(square / jnp.maximum(count - 1, 1)), count)


def exclusion(weights: jax.Array, contributions: jax.Array, mask: jax.Array | None = None):
  """Counts over `[N]` examples; `mask` is False for rows that are no examples."""
  harmful = contributions <= 0
  if mask is not None:
    harmful = harmful & mask
  return Exclusion(jnp.sum(harmful), jnp.sum(harmful & (weights == 0)))


def learned_histogram(
  weights: jax.Array, losses: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """`[NUM_BINS]` counts of perfectly learned examples by weight over the step's largest weight.

  Args:
    weights, losses: `[N]`. mask: False for rows that are no examples.
  """
  share = weights / jnp.max(weights)
  place = jnp.minimum((share * NUM_BINS).astype(jnp.int32), NUM_BINS - 1)
  learned = losses < LEARNED_LOSS
  if mask is not None:
    learned = learned & mask
  return jnp.zeros(NUM_BINS, jnp.int32).at[place].add(learned.astype(jnp.int32))


def series(found: Similarity) -> np.ndarray:
  """SIM_t `[T]`, mean over deviation; +inf if one example has all weight or none differ."""
  mean, deviation, active = (np.asarray(x, np.float64) for x in found)
  alone = (active <= 1) | (deviation == 0)
  return np.where(alone, np.inf, mean / np.where(alone, 1, deviation))


def mean_similarity(found: Similarity) -> tuple[float | None, int]:
  """SIM, the mean of the finite SIM_t (None if there are none), and how many steps are left out."""
  values = series(found)
  finite = values[np.isfinite(values)]
  return (float(finite.mean()) if len(finite) else None), len(values) - len(finite)


def excluded_share(found: Exclusion) -> float | None:
  """Share without weight of all pairs (step, example) with CT <= 0; None if there are none."""
  # On the host: jax would sum in float32, which counts to 2^24.
  harmful, excluded = (float(np.asarray(x).sum(dtype=np.float64)) for x in found)
  return excluded / harmful if harmful else None


def learned_share_below(histogram, threshold: float = 0.2) -> float | None:
  """Share of the perfectly learned with a weight below `threshold` times the largest; None if none.

  Args:
    histogram: `[..., NUM_BINS]`, summed over steps. threshold: a multiple of 1 / NUM_BINS.

  Raises:
    ValueError: for another threshold.
  """
  num_below = round(threshold * NUM_BINS)
  if abs(num_below - threshold * NUM_BINS) > 1e-9 or not 0 <= num_below <= NUM_BINS:
    raise ValueError(f"threshold={threshold} is not a multiple of 1/{NUM_BINS} in [0, 1].")
  counts = np.asarray(histogram, np.float64).reshape(-1, NUM_BINS).sum(axis=0)
  return float(counts[:num_below].sum() / counts.sum()) if counts.sum() else None
