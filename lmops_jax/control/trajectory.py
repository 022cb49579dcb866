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
  """Where the forward pass stores states, and the table of actions of the reverse pass.

  An action first loads a slot into the working state, then stores the working state into a slot,
  then either advances it by one step or runs the adjoint of the step from it. The working state is
  `S_{T-1}` at first.
  """
  first_store: np.ndarray  # [T] int32: slot for the state before step t of the forward pass, or -1
  step: np.ndarray  # [A] int32: index t of the working state after the load
  is_reverse: np.ndarray  # [A] bool
  load: np.ndarray  # [A] int32 slot, or -1
  store: np.ndarray  # [A] int32 slot, or -1


def num_slots(policy: Policy, num_steps: int) -> int:
  """The number of stored states that a policy allows for `num_steps` steps."""
  if policy in ("all", "host"):
    return num_steps
  return min(num_steps, math.ceil(math.sqrt(2 * num_steps)) if policy == "sqrt" else int(policy))


def run(forward: Callable, reverse: Callable, first_carry: Callable, state: Any, steps: jax.Array,
        policy: Policy):
  """Forward pass from `state`, then the adjoint recursion from the last step to the first.

  Args:
    forward: `(state, t) -> state` after step t.
    reverse: `(carry, state_t, t) -> (carry, outputs)`.
    first_carry: `(last_state) -> (carry, final)` before the first reverse step.
    state: the state before the first step.
    steps: `[T] int32`, the consecutive values of t, T >= 1.
    policy: see the module docstring.
  Returns:
    `(carry, outputs, final, last_state)` with the outputs of all steps stacked, `[T, ...]`, in step
    order.
  """
  num_steps = steps.shape[0]
  if num_slots(policy, num_steps) >= num_steps:
    last, states = _store_states(forward, state, steps, policy == "host")
    carry, final = first_carry(last)
    carry, outs = _reverse_stored(reverse, carry, states, steps, policy == "host")
    return carry, outs, final, last
  schedule = make_schedule(num_steps, num_slots(policy, num_steps))
  return _run_schedule(forward, reverse, first_carry, state, steps, schedule)


def _move(tree, space, on_host):
  """Scalars and vectors stay on the device: a TPU v4 cannot copy one row of their stack."""
  if not on_host:
    return tree
  return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim > 1 else x, tree)


def _store_states(forward, state, steps, on_host):
  return jax.lax.scan(
    lambda s, t: (forward(s, t), _move(s, jax.memory.Space.Host, on_host)), state, steps)


def _reverse_stored(reverse, carry, states, steps, on_host):
  def go_back(carry, xs):
    state, t = xs
    return reverse(carry, _move(state, jax.memory.Space.Device, on_host), t)

  return jax.lax.scan(go_back, carry, (states, steps), reverse=True)


def _choose(pred, new, old):
  return jax.tree.map(lambda a, b: jnp.where(pred, a, b), new, old)


def _read(slots, i):
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), slots)


def _write(slots, tree, i):
  """`slots` with `tree` in slot `i`, or as they are if `i` is -1."""
  slot = jnp.maximum(i, 0)
  tree = _choose(i >= 0, tree, _read(slots, slot))
  return jax.tree.map(
    lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, slot, axis=0), slots, tree)


def _run_schedule(forward, reverse, first_carry, state, steps, schedule):
  num_used = 1 + max(int(schedule.first_store.max()), int(schedule.store.max()))
  slots = jax.tree.map(lambda x: jnp.zeros((num_used, *x.shape), x.dtype), state)

  def sweep(loop, xs):
    (state, _), slots = loop
    t, slot = xs
    return ((forward(state, t), state), _write(slots, state, slot)), None

  (((last, working), slots), _) = jax.lax.scan(
    sweep, ((state, state), slots), (steps, jnp.asarray(schedule.first_store)))
  carry, final = first_carry(last)
  out_shapes = jax.eval_shape(reverse, carry, working, jnp.zeros((), jnp.int32))[1]

  def go_back(carry, state, t):
    carry, outs = reverse(carry, state, t)
    return carry, state, outs

  def advance(carry, state, t):
    return carry, forward(state, t), jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), out_shapes)

  def act(loop, action):
    carry, state, slots = loop
    t, is_reverse, load, store = action
    state = _choose(load >= 0, _read(slots, jnp.maximum(load, 0)), state)
    slots = _write(slots, state, store)
    carry, state, outs = jax.lax.cond(is_reverse, go_back, advance, carry, state, t)
    return (carry, state, slots), outs

  (carry, _, _), outs = jax.lax.scan(
    act, (carry, working, slots),
    (steps[schedule.step], *map(jnp.asarray, schedule[2:])))
  rows = np.flatnonzero(schedule.is_reverse)[::-1]  # reverse actions run from T-1 to 0
  return carry, jax.tree.map(lambda x: x[rows], outs), final, last


@functools.lru_cache(maxsize=64)
def make_schedule(num_steps: int, slots: int) -> Schedule:
  """The schedule with the fewest recomputed steps that stores at most `slots` states.

  Args:
    num_steps: T >= 1. slots: >= 1; slot 0 holds the first state throughout.
  """
  split = _best_splits(num_steps, slots)
  first_store = np.full(num_steps, -1, np.int32)
  first_store[0] = 0
  actions = []
  pending = {"load": -1, "store": -1}
  position = num_steps - 1  # where the forward pass leaves the working state

  def emit(is_reverse):
    actions.append((position, is_reverse, pending["load"], pending["store"]))
    pending.update(load=-1, store=-1)

  def advance(start, slot, stop):
    nonlocal position
    if position != start:
      pending["load"], position = slot, start
    while position < stop:
      emit(False)
      position += 1

  # Intervals [start, stop) whose first state is in `slot`; slots above it are free. A stack instead
  # of recursion: T may exceed Python's recursion limit. Until the first adjoint step, the forward
  # pass does the advancing.
  stack = [(0, num_steps, 0)]
  while stack:
    start, stop, slot = stack.pop()
    if stop - start == 1 or slot == slots - 1:  # the last step of the interval, from its start
      if stop - start > 1:
        stack.append((start, stop - 1, slot))
      if actions:
        advance(start, slot, stop - 1)
      emit(True)
      position = -1  # behind the adjoint now: load before the next action
    else:
      middle = start + int(split[slots - 1 - slot, stop - start])
      if actions:
        advance(start, slot, middle)
        pending["store"] = slot + 1
      else:
        first_store[middle] = slot + 1
      stack.append((start, middle, slot))
      stack.append((middle, stop, slot + 1))
  step, is_reverse, load, store = zip(*actions)
  return Schedule(first_store, np.array(step, np.int32), np.array(is_reverse, bool),
                  np.array(load, np.int32), np.array(store, np.int32))


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
