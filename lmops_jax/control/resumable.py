"""The PMP solve in segments, with every intermediate state handed to a store.

Without a store `solve` is one compiled program; a solve of hours needs to survive an interruption.
This driver cuts the T steps into segments: the forward pass keeps the state at each segment's start
in host memory, the reverse pass recomputes one segment's states at a time. After each segment of
either pass the driver saves what that segment made; a later call with the same store goes on from
there, with the same compiled programs on the same bits, so the result is bitwise that of an
undisturbed run on the same mesh, and that of another mesh up to rounding. A solve that diverges
stops at the end of the segment in which it does, with the step in the message.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.control import checks, piecewise
from lmops_jax.control import trajectory as trajectories
from lmops_jax.control.dynamics import init_state
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.problem import Problem, tree_norm
from lmops_jax.control.result import PmpResult, check_steps, make_result
from lmops_jax.control.training_run import TrainingRun, shardings_of
from lmops_jax.mesh import processes

_STATIC = ("options", "shardings")  # arguments of every compiled part


class Store(Protocol):
  """Where a solve is kept, such as `mesh.checkpoints.CheckpointStore`.

  Step s of the store, 1 <= s <= 2 n for n segments, is written when s segments, counted over
  both passes, are done. Steps below n are needed until the solve has ended, others until a later
  one is written.
  """

  def latest_step(self) -> int | None:
    """The newest step that `save` has finished, None without any."""

  def save(self, step: int, arrays: Any, extra: dict[str, Any]) -> None:
    """Starts to write a dict from names to arrays, and some JSON."""

  def extra(self, step: int) -> dict[str, Any]:
    """The JSON of a step."""

  def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays of a step in the types and places of `abstract`, and its JSON."""


def solve_in_segments(
    run: TrainingRun, target_loss: Callable, proxy: Any, options: SolveOptions, store: Store,
    progress: Callable[[int, int], None] | None, log: Callable[[str], None] | None) -> PmpResult:
  """What `pmp.solve` does when it is given a store, on arguments that `prepare` has made.

  The store gets the arrays of each segment when it is done: in the forward pass the state that the
  next one starts from, in the reverse pass the carry and all outputs so far.
  """
  for name in ("latest_step", "save", "extra", "restore"):
    checks.function(getattr(store, name, None), f"store.{name}")
  options = dataclasses.replace(options, surrogate=piecewise.check_optimizer(
    run.optimizer, run.params, options.surrogate))
  num_steps, segment_steps = run.num_steps, options.segment_steps
  starts = range(0, num_steps, segment_steps)
  static = dict(options=options, shardings=shardings_of(run.params))
  first_state = _first_state(run, **static)
  if not np.isfinite(norm := float(_params_norm(first_state))):
    raise ValueError(f"params has norm {norm}; a run must start from finite parameters.")
  fingerprint = _fingerprint(
    (sorted(options.changed().items()), segment_steps, str(jax.tree.structure(first_state))),
    (first_state, run.batches, run.weights, proxy))
  # The states hold the parameters from here on.
  data = dataclasses.replace(run, params=None), target_loss, proxy

  def steps_of(i):
    return jnp.arange(starts[i], min(starts[i] + segment_steps, num_steps))

  num_segments = len(starts)

  def template(done):
    """What the store holds at a step, as arrays of the right types and places."""
    if done < num_segments:
      return {"state": first_state}
    carry, final_target = first_carry(data, first_state, **static)
    segment = functools.partial(reverse_segment, **static)
    outs = [jax.eval_shape(segment, data, first_state, carry, steps_of(i))[1]
            for i in range(2 * num_segments - done, num_segments)]
    return _Reverse(first_state.params, final_target, carry, outs)._asdict()

  # Outputs that a resumed run reads back go, whole, to all of its devices.
  place = jax.tree.leaves(first_state.params)[0].sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PartitionSpec())

  def restored(step):
    like = template(step)
    return _unpack(store.restore(step, _abstract(like, place))[0], like)

  def keep(arrays):
    store.save(done, _pack(arrays), {"fingerprint": fingerprint})
    if progress is not None:
      progress(done, 2 * num_segments)

  def restored_state(step):
    return _moved(restored(step)["state"], jax.memory.Space.Host)

  done = store.latest_step() or 0
  if done and store.extra(done) != {"fingerprint": fingerprint}:
    raise ValueError(
      "The saved solve belongs to other arguments (settings, parameters, batches, weights or "
      "proxies); start without it, or restore the arguments it was made with.")
  # The starts of the segments that the reverse pass still needs.
  states = [_moved(first_state, jax.memory.Space.Host)] + [
    restored_state(i) for i in range(1, min(done + 1, 2 * num_segments - done, num_segments))]
  reverse = _parked(_Reverse(**restored(done))) if done >= num_segments else None
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first_state)
  first_state = None  # frees the device's copy
  state = _place(states[-1], like) if reverse is None else None
  while done < num_segments:
    state = _place(forward_segment(data, state, steps_of(done), **static), like)
    norm = float(_params_norm(state))
    if not np.isfinite(norm):
      last = int(steps_of(done)[-1])
      raise FloatingPointError(
        f"The parameters of the inner run have norm {norm} after step {last} of {num_steps}, and "
        f"were finite before step {starts[done]}; lower the learning rate or check the data.")
    done += 1
    if done < num_segments:
      states.append(_moved(state, jax.memory.Space.Host))
      keep({"state": state})
    else:
      carry, final_target = first_carry(data, state, **static)
      reverse = _parked(_Reverse(state.params, final_target, carry, []))
      del carry, state
      keep(reverse._asdict())
  while done < 2 * num_segments:
    i = 2 * num_segments - 1 - done
    start = _place(states.pop(), like)
    carry, outs = reverse_segment(data, start, reverse.carry, steps_of(i), **static)
    reverse = reverse._replace(carry=_place(carry, reverse.carry), outs=[outs, *reverse.outs])
    _check_segment(reverse, starts[i], num_steps, log)
    done += 1
    keep(reverse._asdict())
  outs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reverse.outs)
  final_params = _place(reverse.final_params, like.params)
  return make_result(outs, reverse.final_target, reverse.carry.proxy_scores, final_params)


class _Reverse(NamedTuple):
  """The reverse pass between two segments."""
  final_params: Any  # params_T, in host memory
  final_target: Any
  carry: Any
  outs: list[Any]  # of the segments reversed, in step order


def _check_segment(run: _Reverse, start: int, num_steps: int, log: Callable | None) -> None:
  """Logs the norms of the segment reversed last, which begins at `start`; raises if it diverged."""
  outs = processes.fetch(run.outs[0]._replace(costate=None))
  norms = outs.costate_norm.astype(np.float64)
  # lambda_{t+1} sums over the gradients at later parameters only, all of them known by now.
  grads = np.concatenate(processes.fetch(
    [o.target.grad_norm for o in run.outs] + [run.final_target.grad_norm[None]]))
  if log is not None:
    log(f"steps {start + 1} to {start + len(norms)} of {num_steps}: |lambda| {norms[-1]:.4g} to "
        f"{norms[0]:.4g} backwards, largest |grad J| so far {grads.max():.4g}")
  check_steps(outs.step_loss, outs.target.loss, norms, outs.scores, grads.max(), num_steps, start)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _first_state(run, *, options, shardings):
  problem = Problem.of(run, None, None, options, shardings)
  return problem.constrain_state(init_state(*run.optimizer, run.params))


@jax.jit
def _params_norm(state):
  return tree_norm(state.params)


@functools.partial(jax.jit, static_argnames=_STATIC)
def first_carry(data, state, *, options, shardings):
  """The carry and the target at `params_T`, from the last state; arguments as `forward_segment`."""
  return Problem.of(*data, options, shardings).first_carry(state)


@functools.partial(jax.jit, static_argnames=_STATIC)
def forward_segment(data, state, steps, *, options, shardings):
  """The state after `steps`.

  Args:
    data: run (without parameters), target loss and proxies of the solve.
    state: the state before the first of the steps. steps: `[S] int32`, consecutive.
    options, shardings: those of the solve and of its parameters; static.
  """
  problem = Problem.of(*data, options, shardings)
  state = problem.constrain_state(state)
  state, _ = jax.lax.scan(lambda s, t: (problem.forward(s, t), None), state, steps)
  return problem.constrain_state(state)


@functools.partial(jax.jit, static_argnames=_STATIC)
def reverse_segment(data, state, carry, steps, *, options, shardings):
  """The carry before `steps` and their outputs, from the carry after; see `forward_segment`."""
  problem = Problem.of(*data, options, shardings)
  return trajectories.run(problem.forward, problem.reverse, lambda _: (carry, None), state, steps,
                          options.trajectory)[:2]


def _moved(tree: Any, space: jax.memory.Space) -> Any:
  return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _parked(run: _Reverse) -> _Reverse:
  """`run` with what no segment reads moved to host memory."""
  return run._replace(final_params=_moved(run.final_params, jax.memory.Space.Host))


def _place(tree: Any, like: Any) -> Any:
  """`tree` in the placement of `like`, so that every segment runs the same compiled program."""
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)


def _pack(tree: dict[str, Any]) -> dict[str, Any]:
  """A dict from names to arrays, in which random keys are their numbers."""
  flat = {}
  for name, part in tree.items():
    for i, leaf in enumerate(jax.tree.leaves(part)):
      flat[f"{name}/{i}"] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return flat


def _abstract(tree: dict[str, Any], elsewhere: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The types and places of what `_pack` makes; what has no place goes to `elsewhere`."""
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or elsewhere)
    for name, x in _pack(tree).items()}


def _unpack(flat: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
  """The tree that `_pack` flattened."""
  def leaf(name, x):
    saved = flat[name]
    if not _is_key(x):
      return saved
    return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(x))

  return {
    name: jax.tree.unflatten(jax.tree.structure(part), [
      leaf(f"{name}/{i}", x) for i, x in enumerate(jax.tree.leaves(part))])
    for name, part in like.items()}


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _fingerprint(description: Any, arrays: Any) -> str:
  """Changes with the settings and the bits of every array, and not with their places."""
  digest = hashlib.blake2b(repr(description).encode(), digest_size=16)
  leaves = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(arrays)]
  for x, checksum in zip(leaves, jax.device_get(_checksums(leaves))):
    digest.update(f"{x.dtype}{x.shape}{checksum}".encode())
  return digest.hexdigest()


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  """`[] uint32` of each array: a sum modulo 2^32, which is the same in any order and sharding."""
  def checksum(x):
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    bits = bits.astype(jnp.uint32)
    # Each element is mixed with its index, so that an exchange of two shows.
    index = sum(
      jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(math.prod(rest))
      for axis, rest in ((a, bits.shape[a + 1:]) for a in range(bits.ndim)))
    mixed = (bits + jnp.uint32(0x9E3779B9) * (index + jnp.uint32(1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)
  return [checksum(x) for x in leaves]
