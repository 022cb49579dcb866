"""The PMP solve in segments, with every intermediate state handed to a store.

`pmp_scores` is one compiled program; a solve of hours needs to survive an interruption. This driver
cuts the T steps into segments: the forward pass keeps the state at each segment's start in host
memory, the reverse pass recomputes one segment's states at a time. After each segment of either
pass the driver saves what that segment made; a later call with the same store goes on from there,
with the same compiled programs on the same bits, so the result is bitwise that of an undisturbed
run on the same mesh, and that of another mesh up to rounding. A solve that diverges stops at the
end of the segment in which it does, with the step in the message.
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
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import init_state
from lmops_jax.control.pmp import (
  PmpResult,
  batch_getter,
  check_steps,
  constrain,
  make_result,
  prepare,
  shardings_of,
)
from lmops_jax.control.problem import Problem, Settings, tree_norm
from lmops_jax.mesh import processes
from lmops_jax.mesh.micro_batches import DeviceRows

_STATIC = ("settings", "shardings", "device_rows")  # arguments of every compiled part


class Store(Protocol):
  """Where a solve is kept, such as `mesh.checkpoints.CheckpointStore`.

  Step s of the store, 1 <= s <= 2 n for n segments, is written when s segments of both passes are
  done. Steps below n are needed until the solve has ended, others until a later one is written.
  """

  def latest_step(self) -> int | None:
    """The newest step that `save` has finished, None without any."""

  def save(self, step: int, arrays: Any, extra: dict[str, Any]) -> None:
    """Starts to write a dict from names to arrays, and some JSON."""

  def extra(self, step: int) -> dict[str, Any]:
    """The JSON of a step."""

  def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays of a step in the types and places of `abstract`, and its JSON."""


def pmp_scores_resumable(
    example_losses: Callable,
    target_loss: Callable,
    optimizer: Any,
    params: Any,
    batches: Any,
    weights: Any,
    objective: str = "area",
    proxy: Any = None,
    every_k: int = 1,
    groups: int | None = None,
    *,
    segment_steps: int,
    store: Store,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] | None = None,
    hessian: bool = True,
    hvp_mode: str = "jvp_of_grad",
    micro_batch_size: int | None = None,
    proxy_batch_size: int | None = None,
    trajectory: str | int = "all",
    keep_costates: bool = False,
    proxy_samples: int | None = None,
    sample_seed: int = 0,
    device_rows: DeviceRows | None = None,
    surrogate: str | None = None) -> PmpResult:
  """`pmp_scores`, resumable. Arguments not listed here are those of `pmp_scores`.

  Args:
    segment_steps: steps in a segment; about sqrt(T) keeps memory lowest.
    store: gets the arrays of each segment when it is done: in the forward pass the state that the
      next one starts from, in the reverse pass the carry and all outputs so far.
    progress: called with (segments done, segments in both passes), after the save; what it raises
      ends the solve, which then continues from that segment.
    log: called with a line on the norms of costate and target gradient after each segment of the
      reverse pass.
    trajectory: for the states inside one segment.
  Raises:
    ValueError: also if the store holds another solve (other settings, parameters, batches or
      weights).
    FloatingPointError: naming the step, where the run or its adjoint diverges (see `check_result`).
      The segment is not saved: what was saved is sound.
  """
  for name in ("latest_step", "save", "extra", "restore"):
    checks.function(getattr(store, name, None), f"store.{name}")
  for name, fn in (("progress", progress), ("log", log)):
    if fn is not None:
      checks.function(fn, f"{name} (or None)")
  params, batches, proxy, weights, settings = prepare(
    example_losses, target_loss, optimizer, params, batches, weights, proxy,
    Settings(objective, trajectory, every_k, groups, hessian, hvp_mode, micro_batch_size,
             proxy_batch_size, keep_costates, proxy_samples, sample_seed, surrogate), device_rows)
  settings = settings._replace(
    surrogate=piecewise.check_optimizer(optimizer, params, settings.surrogate))
  num_steps = weights.shape[0]
  segment_steps = min(checks.integer(segment_steps, "segment_steps", 1), num_steps)
  starts = range(0, num_steps, segment_steps)
  static = dict(settings=settings, shardings=shardings_of(params), device_rows=device_rows)
  data = _Data(as_pytree(example_losses), as_pytree(target_loss), as_pytree(optimizer.update),
               batches, weights, proxy)
  init = as_pytree(optimizer.init)
  first_state = _first_state(init, data, params, **static)
  if not np.isfinite(norm := float(_params_norm(first_state))):
    raise ValueError(f"params has norm {norm}; a run must start from finite parameters.")
  fingerprint = _fingerprint((settings, segment_steps, str(jax.tree.structure(first_state))),
                             (first_state, batches, weights, proxy))

  def steps_of(i):
    return jnp.arange(starts[i], min(starts[i] + segment_steps, num_steps))

  num_segments = len(starts)

  def template(done):
    """What the store holds at a step, as arrays of the right types and places."""
    if done < num_segments:
      return {"state": first_state}
    carry, final_target = _first_carry(data, first_state, **static)
    reverse = functools.partial(_reverse_segment, **static)
    outs = [jax.eval_shape(reverse, data, first_state, carry, steps_of(i))[1]
            for i in range(2 * num_segments - done, num_segments)]
    return _Reverse(first_state.params, final_target, carry, outs)._asdict()

  # Of outputs that a resumed run reads back: on all devices of the run, whole.
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
  run = _parked(_Reverse(**restored(done))) if done >= num_segments else None
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first_state)
  first_state = None  # frees the device's copy
  state = _place(states[-1], like) if run is None else None
  while done < num_segments:
    state = _place(_forward_segment(data, state, steps_of(done), **static), like)
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
      carry, final_target = _first_carry(data, state, **static)
      run = _parked(_Reverse(state.params, final_target, carry, []))
      del carry, state
      keep(run._asdict())
  while done < 2 * num_segments:
    i = 2 * num_segments - 1 - done
    start = _place(states.pop(), like)
    carry, outs = _reverse_segment(data, start, run.carry, steps_of(i), **static)
    run = run._replace(carry=_place(carry, run.carry), outs=[outs, *run.outs])
    _check_segment(run, starts[i], num_steps, log)
    done += 1
    keep(run._asdict())
  outs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *run.outs)
  final_params = _place(run.final_params, like.params)
  return make_result(outs, run.final_target, run.carry.proxy_scores, final_params)


class _Reverse(NamedTuple):
  """The reverse pass between two segments."""
  final_params: Any  # params_T, in host memory
  final_target: Any
  carry: Any
  outs: list[Any]  # of the segments reversed, in step order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Data:
  """The traced arguments of a segment."""
  example_losses: Callable
  target_loss: Callable
  update: Callable
  batches: Any
  weights: jax.Array
  proxy: Any


def _problem(data: _Data, settings: Settings, shardings: tuple,
             device_rows: DeviceRows | None) -> Problem:
  return Problem(data.example_losses, data.target_loss, data.update, batch_getter(data.batches),
                 data.weights, data.proxy, settings, functools.partial(constrain, shardings),
                 device_rows=device_rows)


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
def _first_state(init, data, params, *, settings, shardings, device_rows):
  problem = _problem(data, settings, shardings, device_rows)
  return problem.constrain_state(init_state(init, data.update, params))


@jax.jit
def _params_norm(state):
  return tree_norm(state.params)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _first_carry(data, state, *, settings, shardings, device_rows):
  return _problem(data, settings, shardings, device_rows).first_carry(state)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _forward_segment(data, state, steps, *, settings, shardings, device_rows):
  problem = _problem(data, settings, shardings, device_rows)
  state = problem.constrain_state(state)
  state, _ = jax.lax.scan(lambda s, t: (problem.forward(s, t), None), state, steps)
  return problem.constrain_state(state)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _reverse_segment(data, state, carry, steps, *, settings, shardings, device_rows):
  problem = _problem(data, settings, shardings, device_rows)
  return trajectories.run(problem.forward, problem.reverse, lambda _: (carry, None), state, steps,
                          settings.trajectory)[:2]


def _moved(tree: Any, space: jax.memory.Space) -> Any:
  return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _parked(run: _Reverse) -> _Reverse:
  """What no segment reads, in host memory."""
  return run._replace(final_params=_moved(run.final_params, jax.memory.Space.Host))


def _place(tree: Any, like: Any) -> Any:
  """`tree` in the placement of `like`, so that every segment runs the same compiled program."""
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)


def _pack(tree: dict[str, Any]) -> dict[str, Any]:
  """Names to arrays; random keys as their numbers."""
  flat = {}
  for name, part in tree.items():
    for i, leaf in enumerate(jax.tree.leaves(part)):
      flat[f"{name}/{i}"] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return flat


def _abstract(tree: dict[str, Any], elsewhere: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """What `_pack` makes of a tree, in its places; shapes without a place go to `elsewhere`."""
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
