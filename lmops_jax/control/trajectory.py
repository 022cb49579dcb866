"""Running a recursion forward and its adjoint backward under a memory policy for the states.

The reverse pass needs the states `S_{T-1}, ..., S_0` of the forward pass. What is kept:

  "all"   every state on the device: no recomputation, T states;
  "host"  every state in host memory, fetched one at a time;
  "sqrt"  ceil(sqrt(2 T)) states, each step is recomputed about once;
  n       at most n states (1 <= n), recomputed by the schedule with the fewest steps for it
          (Griewank and Walther, "Algorithm 799: Revolve", ACM TOMS 26, 2000).

The state being advanced is not counted. All policies compute the same numbers from the same states.
Schedules are static tables that one `lax.scan` executes, so compile time does not grow with T.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Policy = str | int
POLICIES = ("all", "sqrt", "host")


class Schedule(NamedTuple):
  """A table of actions, one row each, as equal-length arrays.

  An action first loads a slot into the working state, then stores the working state into a slot,
  then either advances it by one step or runs the adjoint of the step from it.
  """
  step: np.ndarray  # [A] int32: index t of the working state after the load
  is_reverse: np.ndarray  # [A] bool
  is_last_step: np.ndarray  # [A] bool: the advance from T-1 to T, which leaves the state at T-1
  load: np.ndarray  # [A] int32 slot, or -1
  store: np.ndarray  # [A] int32 slot, or -1


def num_slots(policy: Policy, num_steps: int) -> int:
  """The number of stored states that a policy allows for `num_steps` steps."""
  if policy in ("all", "host"):
    return num_steps
  return min(num_steps, math.ceil(math.sqrt(2 * num_steps)) if policy == "sqrt" else int(policy))


def run(forward: Callable, reverse: Callable, first_carry: Callable, state: Any, num_steps: int,
        policy: Policy):
  """Forward pass from `state`, then the adjoint recursion from the last step to the first.

  Args:
    forward: `(state, t) -> state` after step t.
    reverse: `(carry, state_t, params_{t+1}, t) -> (carry, outputs)`, called for t = T-1 .. 0.
    first_carry: `(state) -> carry` before the first reverse step; uses shapes and dtypes only.
    state: `S_0`, with a field `params`. num_steps: T >= 1.
    policy: see the module docstring.
  Returns:
    `(carry, outputs, params_T)` with the outputs of all steps stacked, `[T, ...]`, in step order.
  """
  if num_slots(policy, num_steps) >= num_steps:
    return _run_stored(forward, reverse, first_carry, state, num_steps, policy == "host")
  return _run_schedule(forward, reverse, first_carry, state, num_steps,
                       make_schedule(num_steps, num_slots(policy, num_steps)))


def _run_stored(forward, reverse, first_carry, state, num_steps, on_host):
  steps = jnp.arange(num_steps)
  final, states = _store_states(forward, state, steps, on_host)
  carry, outs = _reverse_stored(reverse, first_carry(final), states, final.params, steps, on_host)
  return carry, outs, final.params


def run_segment(forward: Callable, reverse: Callable, state: Any, next_params: Any, carry: Any,
                steps: jax.Array, on_host: bool = False):
  """The adjoint of consecutive `steps` from the state before the first of them.

  Args:
    next_params: parameters after the last of the steps (kept, so that step is not run again).
    carry: what the reverse step after the last one returned.
  Returns:
    `(carry, outputs)` after the first of the steps, with outputs stacked in step order.
  """
  _, states = _store_states(forward, state, steps, on_host)
  return _reverse_stored(reverse, carry, states, next_params, steps, on_host)


def _move(tree, space, on_host):
  return jax.tree.map(lambda x: jax.device_put(x, space), tree) if on_host else tree


def _store_states(forward, state, steps, on_host):
  return jax.lax.scan(
    lambda s, t: (forward(s, t), _move(s, jax.memory.Space.Host, on_host)), state, steps)


def _reverse_stored(reverse, carry, states, next_params, steps, on_host):
  def go_back(loop, xs):
    carry, next_params = loop
    state, t = xs
    state = _move(state, jax.memory.Space.Device, on_host)
    carry, outs = reverse(carry, state, next_params, t)
    return (carry, state.params), outs

  (carry, _), outs = jax.lax.scan(go_back, (carry, next_params), (states, steps), reverse=True)
  return carry, outs


def _run_schedule(forward, reverse, first_carry, state, num_steps, schedule):
  slots = jax.tree.map(
    lambda x: jnp.zeros((int(schedule.store.max()) + 1, *x.shape), x.dtype), state)

  def choose(pred, new, old):
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), new, old)

  def read(slots, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), slots)

  def write(slots, tree, i):
    return jax.tree.map(
      lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, i, axis=0), slots, tree)

  def go_back(state, next_params, final_params, carry, action):
    carry, outs = reverse(carry, state, next_params, action.step)
    return (state, state.params, final_params, carry), outs

  out_shapes = jax.eval_shape(
    lambda s: reverse(first_carry(s), s, s.params, jnp.zeros((), jnp.int32))[1], state)

  def advance(state, next_params, final_params, carry, action):
    new = forward(state, action.step)
    final_params = choose(action.is_last_step, new.params, final_params)
    next_params = choose(action.is_last_step, new.params, next_params)
    state = choose(action.is_last_step, state, new)
    outs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shapes)
    return (state, next_params, final_params, carry), outs

  def act(loop, action):
    (state, next_params, final_params, carry), slots = loop
    state = choose(action.load >= 0, read(slots, jnp.maximum(action.load, 0)), state)
    slot = jnp.maximum(action.store, 0)
    slots = write(slots, choose(action.store >= 0, state, read(slots, slot)), slot)
    working, outs = jax.lax.cond(
      action.is_reverse, go_back, advance, state, next_params, final_params, carry, action)
    return (working, slots), outs

  working = (state, state.params, state.params, first_carry(state))
  (working, _), outs = jax.lax.scan(act, (working, slots), jax.tree.map(jnp.asarray, schedule))
  rows = np.flatnonzero(schedule.is_reverse)[::-1]  # reverse actions run from T-1 to 0
  _, _, final_params, carry = working
  return carry, jax.tree.map(lambda x: x[rows], outs), final_params


@functools.lru_cache(maxsize=64)
def make_schedule(num_steps: int, slots: int) -> Schedule:
  """The schedule with the fewest recomputed steps that stores at most `slots` states.

  Args:
    num_steps: T >= 1. slots: >= 1; slot 0 holds the first state throughout.
  """
  split = _best_splits(num_steps, slots)
  actions = []
  pending = {"load": -1, "store": 0}  # the first action stores S_0 in slot 0
  position = 0

  def emit(is_reverse, is_last_step=False):
    actions.append((position, is_reverse, is_last_step, pending["load"], pending["store"]))
    pending.update(load=-1, store=-1)

  def advance_to(start, slot, stop):
    nonlocal position
    if position != start:
      pending["load"], position = slot, start
    while position < stop:
      emit(False)
      position += 1

  # Intervals [start, stop) whose first state is in `slot`; slots above it are free. A stack instead
  # of recursion: T may exceed Python's recursion limit.
  stack = [(0, num_steps, 0)]
  first_sweep = True
  while stack:
    start, stop, slot = stack.pop()
    if stop - start == 1:
      advance_to(start, slot, start)
      if first_sweep:
        emit(False, is_last_step=True)
        first_sweep = False
      emit(True)
      position = -1  # the working state is behind the adjoint now: load before the next action
    elif slot == slots - 1:
      stack.append((start, stop - 1, slot))
      advance_to(start, slot, stop - 1)
      if first_sweep:
        emit(False, is_last_step=True)
        first_sweep = False
      emit(True)
      position = -1
    else:
      middle = start + int(split[slots - 1 - slot, stop - start])
      advance_to(start, slot, middle)
      pending["store"] = slot + 1
      stack.append((start, middle, slot))
      stack.append((middle, stop, slot + 1))
  columns = list(zip(*actions))
  return Schedule(np.array(columns[0], np.int32), np.array(columns[1], bool),
                  np.array(columns[2], bool), np.array(columns[3], np.int32),
                  np.array(columns[4], np.int32))


def _best_splits(num_steps: int, slots: int) -> np.ndarray:
  """`[slots, T + 1]`: where to store the next state, given free slots and interval length.

  Dynamic program over `cost[free, length]`, the number of advances: advance to `m`, store, reverse
  the right part with one slot less, then the left part with all of them.
  """
  cost = np.zeros((slots, num_steps + 1))
  split = np.zeros((slots, num_steps + 1), np.int64)
  lengths = np.arange(num_steps + 1)
  cost[0] = lengths * (lengths - 1) / 2
  for free in range(1, slots):
    for length in range(2, num_steps + 1):
      m = lengths[1:length]
      total = m + cost[free - 1, length - m] + cost[free, m]
      best = int(np.argmin(total))
      split[free, length], cost[free, length] = m[best], total[best]
  return split
