"""The compiled programs of continuous batching: rows that come and go in one cache.

A slot is a `loop.State` of one row with its own length, step and options. All slots together are
one state whose leaves have a leading axis; a step is `loop.advance` mapped over it, so that a slot
computes what a row of `Generator` does. A prompt is read by `loop.prefill` and put into its slot.

Letters: T slots; M columns of each, for prompt and new tokens together. M is no part of a slot's
meaning: the caller resizes it to what the longest row needs, and what a step reads grows with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding import loop as loop_lib
from lmops_jax.decoding.loop import Knobs, Plan, Rows, State
from lmops_jax.models.cache import empty_cache


class Chosen(NamedTuple):
  """The newest token of every slot, `[T]` or, of a row alone, `[1]`.

  Attributes:
    token: int32.
    log_prob: float32, of that token under the model's own distribution; NaN if its logits are.
  """

  token: jax.Array
  log_prob: jax.Array


def empty(config, num_slots: int, size: int) -> State:
  """T free slots of M = `size` columns."""
  row = State(
    empty_cache(config, 1, size), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32),
    jnp.zeros(1, jnp.int32), jnp.zeros((), jnp.int32),
    Rows(
      jnp.zeros((1, size), jnp.int32), jnp.zeros((1, size), jnp.float32), jnp.zeros(1, jnp.int32),
      jnp.ones(1, bool)),
  )
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_slots, *x.shape)), row)


def joint_plan(plans: Iterable[Plan]) -> Plan:
  """One program for rows of several plans, which may differ in temperature and top_p alone."""
  plans = list(plans)
  if not any(plan.sampled for plan in plans):
    return plans[0]
  return plans[0]._replace(
    sampled=True, scaled=True, top_p=any(plan.top_p for plan in plans), mixed=True)


def stacked(knobs: Iterable[Knobs]) -> Knobs:
  """The options of all slots, leaves `[T]`."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *knobs)


def read(model, plan: Plan, params, knobs: Knobs, tokens, valid, row_id) -> tuple[State, Chosen]:
  """Reads one prompt and chooses its first token.

  Args:
    model, plan, params, knobs: as in `loop.prefill`, `plan` without copies and beams.
    tokens, valid: `[1,P]`, padded on the right.
    row_id: `[1] int32`.

  Returns:
    The row, whose padding the new tokens will overwrite, and its first token.
  """
  row = loop_lib.prefill(
    model, plan, 1, params, knobs, tokens, valid, row_id, jnp.ones(1, bool))
  row = row._replace(cache=row.cache._replace(length=row.prompt_length[0]))
  return row, Chosen(row.token, row.chosen.log_probs[:, 0])


def put(state: State, row: State, slot) -> State:
  """The slots with a row in one of them, nothing of whose last row is left.

  Args:
    state: donated.
    row: of `read`, with at most M columns.
    slot: `[] int32`.
  """
  row = resized(row, state.chosen.history.shape[-1])
  return jax.tree.map(lambda slots, one: slots.at[slot].set(one), state, row)


def step(model, plan: Plan, params, knobs: Knobs, state: State, free) -> tuple[State, Chosen]:
  """One token more in every slot that is in use.

  Args:
    model, plan, params: as in `loop.decode`; `plan` serves all slots, see `joint_plan`.
    knobs: leaves `[T]`.
    state: donated.
    free: `[T] bool`; what becomes of a free slot has no meaning.
  """

  def one(knobs, state, free):
    # A free slot reads token 0 at position 0 again and again: within every table.
    length = jnp.where(free, 0, state.cache.length)
    state = state._replace(
      token=jnp.where(free, 0, state.token), step=jnp.where(free, 0, state.step),
      prompt_length=jnp.where(free, 1, state.prompt_length),
      cache=state.cache._replace(length=length),
      chosen=state.chosen._replace(done=state.chosen.done | free))
    return loop_lib.advance(model, plan, params, knobs, state)

  state = jax.vmap(one)(knobs, state, free)
  newest = (state.step - 1)[:, None, None]
  log_prob = jnp.take_along_axis(state.chosen.log_probs, newest, axis=2, mode="clip")[:, 0, 0]
  return state, Chosen(state.token[:, 0], log_prob)


def resized(state: State, size: int) -> State:
  """The same rows with M = `size` columns, none of which must be needed beyond."""

  def fit(x, axis=-1):
    axis = x.ndim + axis
    if size <= x.shape[axis]:
      return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, (size - x.shape[i]) * (i == axis)) for i in range(x.ndim)])

  cache, chosen = state.cache, state.chosen
  cache = cache._replace(
    keys=tuple(fit(x, -2) for x in cache.keys), values=tuple(fit(x, -2) for x in cache.values),
    positions=fit(cache.positions), valid=fit(cache.valid), branch=fit(cache.branch))
  chosen = chosen._replace(history=fit(chosen.history), log_probs=fit(chosen.log_probs))
  return state._replace(cache=cache, chosen=chosen)
