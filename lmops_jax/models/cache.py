"""Keys and values of earlier positions, so that decoding computes each position once.

A cache has M slots a row. Each call of `Transformer.extend` fills the next ones, the same for all
rows. Rows of unequal prompts are padded, on either side; padded slots are marked and never seen.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.partitioning import constrain


class KVCache(NamedTuple):
  """Keys, values and what each slot holds.

  Attributes:
    keys: for each of the L layers `[B,K,M,E]`, heads first as attention reads them.
    values: like `keys`.
    positions: `[B,M] int32`, position of the token in each slot.
    valid: `[B,M] bool`, False for padding and for slots not yet written.
    branch: `[B,M] int32`; a slot of branch 0 is seen by all later tokens, others by their own
      branch only.
    length: `[] int32`, number of slots written.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  positions: jax.Array
  valid: jax.Array
  branch: jax.Array
  length: jax.Array

  @property
  def num_slots(self) -> int:
    """M."""
    return self.valid.shape[1]


class Adaptive(NamedTuple):
  """How much texts that were read apart count (arXiv 2502.05431, APE).

  Their scores are divided by the temperature, and the logarithm of the sum of their exponentials is
  multiplied before their part is joined with that of the front and a row's own tokens.

  Attributes:
    keys: the front, which stood before every text: for each layer `[1,K,f,E]`, or those of one.
    values: like `keys`.
    positions: `[1,f] int32` of the front.
    temperature: `[] float32`, T.
    power: `[] float32`, the factor of the logarithm, S T.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  positions: jax.Array
  temperature: jax.Array
  power: jax.Array


class Prefix(NamedTuple):
  """Keys and values that stand in front of every row of a batch, held once.

  Attributes:
    cache: a cache of one row; its slots may hold several texts that have not seen each other.
    end: `[] int32`, the position at which the rows go on.
    own_weight: `[] float32`, natural logarithm of the weight of a row's own tokens in the softmax,
      the prefix's being 1 (arXiv 2212.06713, equation 3: the number of texts); 0 is ordinary.
    adaptive: what weighs the cache's texts beside a front that is not in the cache; None is 1.
  """

  cache: KVCache
  end: jax.Array
  own_weight: jax.Array
  adaptive: Adaptive | None = None


class Readout(NamedTuple):
  """Attention's results at chosen positions.

  Attributes:
    attention: `[L,B,R,D]`, output of the attention part before the residual sum.
    queries: `[L,B,R,H,E]`, as the scores read them; scores are `E ** -0.5` times their products
      with the cache's keys, plus ALiBi's bias.
  """

  attention: jax.Array
  queries: jax.Array


def empty_cache(config: TransformerConfig, batch_size: int, max_slots: int, dtype=None) -> KVCache:
  """A cache without tokens.

  Args:
    config: the model's.
    batch_size: B.
    max_slots: M, slots for prompt and generated tokens together.
    dtype: type of keys and values; None is `config.dtype`.
  """
  shape = (batch_size, config.key_heads, max_slots, config.head_width)

  def zeros():
    return tuple(jnp.zeros(shape, dtype or config.dtype) for _ in range(config.num_layers))

  integers = jnp.zeros((batch_size, max_slots), jnp.int32)
  return KVCache(
    zeros(), zeros(), integers, jnp.zeros((batch_size, max_slots), bool), integers,
    jnp.zeros((), jnp.int32),
  )


def constrain_heads(x: jax.Array) -> jax.Array:
  """Keys or values `[B,K,M,E]`, rows over the mesh's batch axes and heads over its tensor axis."""
  return constrain(x, ("batch", "kv_heads", "sequence", "head_dim"))


def with_slots(cache: KVCache, positions, valid, branch) -> KVCache:
  """Marks the next S slots, each argument `[B,S]`; keys, values and `length` stay as they are."""

  def put(old, new):
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, axis=1)

  return cache._replace(
    positions=put(cache.positions, positions), valid=put(cache.valid, valid),
    branch=put(cache.branch, branch),
  )


def visible(cache: KVCache, num_new: int, window: int | None) -> tuple[jax.Array, jax.Array]:
  """The slots that the newest `num_new` ones see, after `with_slots`.

  Returns:
    mask `[B,S,M] bool` and distance `[B,S,M] int32`, key position minus query position.
  """
  slots = jnp.arange(cache.num_slots)
  own = cache.length + jnp.arange(num_new)

  def newest(x):
    return jax.lax.dynamic_slice_in_dim(x, cache.length, num_new, axis=1)

  distance = cache.positions[:, None, :] - newest(cache.positions)[:, :, None]
  branch = cache.branch[:, None, :]
  mask = (slots[None, :] <= own[:, None])[None] & cache.valid[:, None, :]
  mask = mask & ((branch == 0) | (branch == newest(cache.branch)[:, :, None]))
  if window is not None:
    mask = mask & (-distance < window)
  return mask, distance
