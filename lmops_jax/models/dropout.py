"""Dropout (Srivastava et al. 2014) whose draws belong to examples.

Every example has a key of its own, from which the keys of layers and of places in them are folded.
An example's draws therefore depend on its key and its own shape alone: not on the rows beside it,
on micro-batches, on the mesh, or on how the layers or the scores are computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def folded(keys: jax.Array | None, number) -> jax.Array | None:
  """Keys of the same shape, others for each number; None for None."""
  return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropped(x: jax.Array, keys: jax.Array | None, rate: float) -> jax.Array:
  """`x [B,...]` with a share `rate` of its numbers 0 and the others divided by `1 - rate`.

  Args:
    x: `[B,...]`.
    keys: `[B]` typed keys, or None, which leaves `x` as it is.
    rate: the share, in [0, 1); 0 leaves `x` as it is.
  """
  if keys is None or rate == 0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
  return _scaled(x, keep, rate)


def dropped_probabilities(
  probabilities: jax.Array, keys: jax.Array | None, rate: float, query_index: jax.Array,
  num_keys: int, first_head: jax.Array | int = 0,
) -> jax.Array:
  """`dropped` for attention: a query draws the same whichever queries are computed beside it.

  Args:
    probabilities: `[B,K,G,s,M]` of some queries over the first M positions.
    keys: `[B]`, or None.
    rate: the share, in [0, 1).
    query_index: `[s] int32`, positions of the queries.
    num_keys: positions of the whole sequence, at least M.
    first_head: number of the first of these heads; a head draws the same whichever are with it.
  """
  if keys is None or rate == 0:
    return probabilities
  _, kv_heads, group, _, seen = probabilities.shape
  heads = first_head + jnp.arange(kv_heads * group).reshape(kv_heads, group, 1)
  numbers = heads * num_keys + query_index

  def kept(key, number):
    return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, (num_keys,))[:seen]

  for _ in numbers.shape:
    kept = jax.vmap(kept, (None, 0))
  return _scaled(probabilities, jax.vmap(kept, (0, None))(keys, numbers), rate)


def _scaled(x, keep, rate):
  return jnp.where(keep, x / (1 - rate), 0)
