"""Filters of next-token scores and the choice among them, pure functions.

Scores are `[R,V] float32`, logits or log-probabilities; a forbidden token has `-inf`. `history
[R,M] int32` holds a row's prompt and generated tokens from index 0 on, without padding between
them; `lengths [R] int32` counts them. The rules are those of transformers' logits processors. If
scores are level at the edge of a set (top-k, top-p), all of them stay in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def repetition_penalty(scores, history, lengths, penalty) -> jax.Array:
  """Scores of tokens in the history divided by `penalty` if positive, else multiplied by it."""

  def one(scores, ids):
    old = scores.at[ids].get(mode="fill", fill_value=0.0)
    new = jnp.where(old < 0, old * penalty, old / penalty)
    return scores.at[ids].set(new, mode="drop")

  return jax.vmap(one)(scores, _or_outside(_filled(history, lengths), history, scores))


def no_repeat_ngram(scores, history, lengths, size: int) -> jax.Array:
  """Forbids tokens that would complete an n-gram of `size` that the history already holds."""
  slots = history.shape[1]
  last = jnp.arange(slots)[None]  # index of a window's last token
  match = (last >= size - 1) & _filled(history, lengths)
  for back in range(1, size):
    wanted = jnp.take_along_axis(history, lengths[:, None] - back, axis=1, mode="clip")
    match = match & (jnp.roll(history, back, axis=1) == wanted)
  return forbid(scores, _or_outside(match, history, scores))


def forbid(scores, ids) -> jax.Array:
  """`-inf` at `ids [R,n] int32`; ids of V and more are ignored."""
  return jax.vmap(lambda row, i: row.at[i].set(-jnp.inf, mode="drop"))(scores, ids)


def forbid_while(scores, ids: tuple[int, ...], early) -> jax.Array:
  """`-inf` at the same few ids in all rows for which `early [R] bool` is True."""
  chosen = jnp.isin(jnp.arange(scores.shape[-1]), jnp.asarray(ids, jnp.int32))
  return jnp.where(early[:, None] & chosen[None], -jnp.inf, scores)


def top_k(scores, k: int) -> jax.Array:
  """Keeps the k best tokens of each row."""
  k = min(k, scores.shape[-1])
  return jnp.where(scores < jax.lax.top_k(scores, k)[0][:, -1:], -jnp.inf, scores)


def top_p(scores, p) -> jax.Array:
  """Keeps the smallest set of best tokens with probability `p` together, at least one."""
  probabilities = jax.nn.softmax(scores, axis=-1)
  # The least probability in the set, by bisection over the bits of a float, which order as the
  # floats do: 31 sums, some twenty times faster on a CPU than sorting the vocabulary.
  bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

  def halve(i, edge):
    higher = edge | (jnp.int32(1) << (30 - i))
    mass = jnp.sum(jnp.where(bits >= higher, probabilities, 0.0), axis=-1, keepdims=True)
    return jnp.where(mass >= p, higher, edge)

  edge = jax.lax.fori_loop(0, 31, halve, jnp.zeros_like(bits[:, :1]))
  return jnp.where(bits < edge, -jnp.inf, scores)


def min_p(scores, p) -> jax.Array:
  """Keeps tokens with at least the fraction `p` of the best token's probability."""
  best = jnp.max(scores, axis=-1, keepdims=True)
  return jnp.where(scores < best + jnp.log(p), -jnp.inf, scores)


def best(scores) -> jax.Array:
  """The first of the best tokens, `[R] int32`; V if the row has NaN."""
  # XLA on a CPU is fifteen times slower with argmax, which carries value and index.
  index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
  top = jnp.max(scores, axis=-1, keepdims=True)
  return jnp.min(jnp.where(scores == top, index, scores.shape[-1]), axis=-1)


def sample(keys, scores) -> jax.Array:
  """One token `[R] int32` a row from `softmax(scores)`, by the Gumbel-max method.

  Args:
    keys: `[R]`, one a row, so that a row's token does not depend on the other rows.
    scores: `[R,V]`.
  """
  noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], scores.dtype))(keys)
  return best(scores + noise)


def token_log_probs(logits, tokens) -> jax.Array:
  """`[R]` log-probabilities of `tokens [R]` under `softmax(logits)`."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1, mode="fill")[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def _filled(history, lengths):
  return jnp.arange(history.shape[1])[None] < lengths[:, None]


def _or_outside(mask, history, scores):
  """The history where `mask`, else V, which scatters drop."""
  return jnp.where(mask, history, scores.shape[-1])
