"""The simplex of data weights: exact projection of many rows, and how far from optimal a row is."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmops_jax.control import checks

METHODS = ("sort", "bisect")
_HALVINGS = 50  # of an interval of length 1; the last digits come from the closed form


def project_simplex(values: Any, mask: Any = None, method: str = "sort") -> jax.Array:
  """Euclidean projection of each row onto `{gamma >= 0, sum(gamma) = 1}`.

  Rows are first shifted to a maximum of 0. Entries of -1 or less, which are sure to become 0, are
  set to -2. The projection stays the same, sums stay small, so that values around 1e6 lose no
  digits, and rounding cannot give weight to entries that are masked or far behind.

  Args:
    values: `[..., N]`.
    mask: `bool`, broadcast against `values`; False pins a weight to 0. Each row needs a True.
    method: "sort" (optax's, N log N), or "bisect": a fixed number of halvings of the threshold and
      its closed form on the entries then known to stay. It takes sums and maxima only, so rows may
      be sharded over N.
  Returns:
    `[..., N]`, entries outside of the support exactly 0.
  Raises:
    ValueError: if `values` has no entries, or for a method that does not exist.
  """
  values = checks.array(values, "values")
  if values.ndim < 1 or values.shape[-1] < 1:
    raise ValueError(f"values has shape {values.shape}; expected a non-empty last axis.")
  if method not in METHODS:
    raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}.")
  if not jnp.issubdtype(values.dtype, jnp.floating):
    values = values.astype(jnp.result_type(float))
  if mask is not None:
    with checks.failing(f"mask does not broadcast against values of shape {values.shape}"):
      values = jnp.where(jnp.asarray(mask, bool), values, -jnp.inf)
  values = values - jnp.max(values, axis=-1, keepdims=True)
  values = jnp.where(values <= -1, -2, values)
  if method == "bisect":
    return _bisect(values)
  rows = values.reshape(-1, values.shape[-1])
  return jax.vmap(optax.projections.projection_simplex)(rows).reshape(values.shape)


def _bisect(values: jax.Array) -> jax.Array:
  """The projection of rows whose largest entry is 0: `max(v - tau, 0)` with tau in [-1, 0)."""
  shape = (*values.shape[:-1], 1)

  def halve(_, bounds):
    low, high = bounds  # the sum at `low` is at least 1, at `high` less
    middle = (low + high) / 2
    is_low = jnp.sum(jnp.maximum(values - middle, 0), axis=-1, keepdims=True) >= 1
    return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

  low, _ = jax.lax.fori_loop(
    0, _HALVINGS, halve, (jnp.full(shape, -1, values.dtype), jnp.zeros(shape, values.dtype)))
  stays = values > low
  count = jnp.sum(stays, axis=-1, keepdims=True)
  tau = (jnp.sum(jnp.where(stays, values, 0), axis=-1, keepdims=True) - 1) / jnp.maximum(count, 1)
  return jnp.maximum(values - tau, 0)


def stationarity_gap(gamma: jax.Array, scores: jax.Array, mask: Any = None) -> jax.Array:
  """How much the objective falls, to first order, from `gamma` to each row's best vertex.

  The Frank-Wolfe gap `max_n scores_n - sum_n gamma_n scores_n >= 0` of each row. All are 0
  if and only if the weights are first-order optimal.

  Args:
    gamma: `[..., N]` on the simplex. scores: the same shape, minus the objective's gradient.
    mask: `bool`, False for entries that are no examples.
  """
  if jnp.shape(gamma) != jnp.shape(scores):
    raise ValueError(
      f"gamma has shape {jnp.shape(gamma)} and scores {jnp.shape(scores)}; expected the same.")
  best = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
  # The differences first: a common shift of the scores then costs no digits.
  behind = jnp.max(best, axis=-1, keepdims=True) - scores
  return jnp.sum(gamma * behind, axis=-1)
