"""The PMP solve in segments, with every intermediate state handed to the caller to keep.

`pmp_scores` is one compiled program; a solve of hours needs to survive an interruption. This driver
cuts the T steps into segments: the forward pass keeps the state at each segment's start, the
reverse pass recomputes one segment's states at a time. After each segment of either pass the driver
calls `save(tree)`; a later call whose `load()` returns that tree goes on from there, with the same
compiled programs on the same bits, so the result is bitwise that of an undisturbed run. A solve
that diverges stops at the end of the segment in which it does, with the step in the message.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.control import checks
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
    load: Callable[[], Any],
    save: Callable[[Any], None],
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] | None = None,
    hessian: bool = True,
    hvp_mode: str = "jvp_of_grad",
    micro_batch_size: int | None = None,
    proxy_batch_size: int | None = None,
    trajectory: str | int = "all",
    keep_costates: bool = False,
    proxy_samples: int | None = None,
    sample_seed: int = 0) -> PmpResult:
  """`pmp_scores`, resumable. Arguments not listed here are those of `pmp_scores`.

  Args:
    segment_steps: steps in a segment; about sqrt(T) keeps memory lowest.
    load: returns what `save` was last given (arrays may come back as NumPy arrays), or None.
    save: called after each segment with a flat dict from names to arrays (host or device arrays,
      also sharded ones): the segment starts still needed and, in the reverse pass, the carry.
    progress: called with (segments done, segments in both passes).
    log: called with a line on the norms of costate and target gradient after each segment of the
      reverse pass.
    trajectory: for the states inside one segment.
  Raises:
    ValueError: also if what `load` returns belongs to another solve (other settings, parameters,
      batches or weights).
    FloatingPointError: naming the step, where the run or its adjoint diverges (see `check_result`).
      The segment is not saved: what was saved is sound.
  """
  params, batches, proxy, weights, settings = prepare(
    example_losses, target_loss, optimizer, params, batches, weights, proxy,
    Settings(objective, trajectory, every_k, groups, hessian, hvp_mode, micro_batch_size,
             proxy_batch_size, keep_costates, proxy_samples, sample_seed))
  num_steps = weights.shape[0]
  segment_steps = min(checks.integer(segment_steps, "segment_steps", 1), num_steps)
  starts = range(0, num_steps, segment_steps)
  static = dict(settings=settings, shardings=shardings_of(params))
  data = _Data(as_pytree(example_losses), as_pytree(target_loss), as_pytree(optimizer.update),
               batches, weights, proxy)
  init = as_pytree(optimizer.init)
  first_state = jax.jit(init_state)(init, data.update, params)
  fingerprint = _fingerprint((settings, segment_steps, str(jax.tree.structure(first_state))),
                             (first_state, batches, weights, proxy))

  def steps_of(i):
    return jnp.arange(starts[i], min(starts[i] + segment_steps, num_steps))

  first_run = _Run(False, 0, [first_state], None, None, None, [])

  def templates(is_reverse, done):
    """A run as it would be after `done` segments of a pass, with arrays of the right types."""
    num_states = len(starts) - done if is_reverse else done + 1
    if not is_reverse:
      return _Run(is_reverse, done, [first_state] * num_states, None, None, None, [])
    carry, final_target = _first_carry(data, first_state, **static)
    reverse = functools.partial(_reverse_segment, **static)
    outs = [jax.eval_shape(reverse, data, first_state, carry, steps_of(i))[1]
            for i in range(len(starts) - done, len(starts))]
    return _Run(is_reverse, done, [first_state] * num_states, first_state.params, final_target,
                carry, outs)

  saved = load()
  run = first_run if saved is None else _unpack(saved, fingerprint, templates, len(starts))

  def keep():
    save(_pack(run, fingerprint))
    if progress is not None:
      progress(run.done + run.is_reverse * len(starts), 2 * len(starts))

  while not run.is_reverse:
    state = _place(_forward_segment(data, run.states[-1], steps_of(run.done), **static),
                   first_state)
    norm = float(_params_norm(state))
    if not np.isfinite(norm):
      last = int(steps_of(run.done)[-1])
      raise FloatingPointError(
        f"The parameters of the inner run have norm {norm} after step {last} of {num_steps}, and "
        f"were finite before step {starts[run.done]}; lower the learning rate or check the data.")
    if run.done + 1 < len(starts):
      run = dataclasses.replace(run, done=run.done + 1, states=[*run.states, state])
    else:
      carry, final_target = _first_carry(data, state, **static)
      run = dataclasses.replace(run, is_reverse=True, done=0, final_params=state.params,
                                final_target=final_target, carry=carry)
    keep()
  while run.done < len(starts):
    i = len(starts) - 1 - run.done
    carry, outs = _reverse_segment(data, run.states[-1], run.carry, steps_of(i), **static)
    run = dataclasses.replace(run, done=run.done + 1, states=run.states[:-1],
                              carry=_place(carry, run.carry), outs=[outs, *run.outs])
    _check_segment(run, starts[i], num_steps, log)
    keep()
  outs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *run.outs)
  return make_result(outs, run.final_target, run.carry.proxy_scores, run.final_params)


@dataclasses.dataclass(frozen=True)
class _Run:
  """How far a solve has come."""
  is_reverse: bool
  done: int  # segments of the current pass
  states: list[Any]  # at the starts of the segments that the reverse pass still needs
  final_params: Any  # params_T, once known
  final_target: Any
  carry: Any
  outs: list[Any]  # of the segments reversed, in step order

  def arrays(self) -> dict[str, Any]:
    """The parts that hold arrays, by name."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
            if f.name not in ("is_reverse", "done")}


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


def _problem(data: _Data, settings: Settings, shardings: tuple) -> Problem:
  return Problem(data.example_losses, data.target_loss, data.update, batch_getter(data.batches),
                 data.weights, data.proxy, settings, functools.partial(constrain, shardings))


def _check_segment(run: _Run, start: int, num_steps: int, log: Callable | None) -> None:
  """Logs the norms of the segment reversed last, which begins at `start`; raises if it diverged."""
  outs = run.outs[0]
  norms = np.asarray(outs.costate_norm, np.float64)
  # lambda_{t+1} sums over the gradients at later parameters only, all of them known by now.
  grads = np.concatenate([np.asarray(o.target.grad_norm, np.float64) for o in run.outs]
                         + [np.asarray(run.final_target.grad_norm, np.float64)[None]])
  if log is not None:
    log(f"steps {start + 1} to {start + len(norms)} of {num_steps}: |lambda| {norms[-1]:.4g} to "
        f"{norms[0]:.4g} backwards, largest |grad J| so far {grads.max():.4g}")
  check_steps(outs.step_loss, outs.target.loss, norms, outs.scores, grads.max(), num_steps, start)


@jax.jit
def _params_norm(state):
  return tree_norm(state.params)


@functools.partial(jax.jit, static_argnames=("settings", "shardings"))
def _first_carry(data, state, *, settings, shardings):
  return _problem(data, settings, shardings).first_carry(state)


@functools.partial(jax.jit, static_argnames=("settings", "shardings"))
def _forward_segment(data, state, steps, *, settings, shardings):
  problem = _problem(data, settings, shardings)
  state = problem.constrain_state(state)
  state, _ = jax.lax.scan(lambda s, t: (problem.forward(s, t), None), state, steps)
  return problem.constrain_state(state)


@functools.partial(jax.jit, static_argnames=("settings", "shardings"))
def _reverse_segment(data, state, carry, steps, *, settings, shardings):
  problem = _problem(data, settings, shardings)
  return trajectories.run(problem.forward, problem.reverse, lambda _: (carry, None), state, steps,
                          settings.trajectory)[:2]


def _place(tree: Any, like: Any) -> Any:
  """`tree` in the placement of `like`, so that every segment runs the same compiled program."""
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)


def _pack(run: _Run, fingerprint: np.ndarray) -> dict[str, Any]:
  tree = {"fingerprint": fingerprint, "is_reverse": np.array(run.is_reverse),
          "done": np.array(run.done)}
  for name, part in run.arrays().items():
    for i, leaf in enumerate(jax.tree.leaves(part)):
      is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      tree[f"{name}/{i}"] = jax.random.key_data(leaf) if is_key else leaf
  return tree


def _unpack(tree: dict[str, Any], fingerprint: np.ndarray, templates: Callable,
            num_segments: int) -> _Run:
  if not np.array_equal(np.asarray(tree.get("fingerprint")), fingerprint):
    raise ValueError(
      "The saved solve belongs to other arguments (settings, parameters, batches, weights or "
      "proxies); start without it, or restore the arguments it was made with.")
  is_reverse, done = bool(tree["is_reverse"]), int(tree["done"])
  like = templates(is_reverse, min(done, num_segments))
  parts = {}
  for name, part in like.arrays().items():
    leaves, treedef = jax.tree.flatten(part)
    names = [f"{name}/{i}" for i in range(len(leaves))]
    missing = [n for n in names if n not in tree]
    if missing:
      raise ValueError(
        f"The saved solve is incomplete: it has no {missing[0]!r}; start without it.")
    parts[name] = treedef.unflatten(_restore(tree[n], x) for n, x in zip(names, leaves))
  return _Run(is_reverse, done, **parts)


def _restore(saved: Any, like: Any) -> jax.Array:
  """A saved leaf with the type and placement of `like`."""
  sharding = getattr(like, "sharding", None)
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    saved = jax.random.wrap_key_data(jnp.asarray(saved), impl=jax.random.key_impl(like))
  elif not isinstance(saved, jax.Array):
    saved = np.asarray(saved)
    if saved.dtype != like.dtype and saved.dtype.kind == "V":  # bfloat16 through an .npz file
      saved = saved.view(like.dtype)
  if saved.shape != like.shape or saved.dtype != like.dtype:
    raise ValueError(
      f"The saved solve holds an array of {saved.dtype}{list(saved.shape)} where "
      f"{like.dtype}{list(like.shape)} belongs; start without it.")
  return jax.device_put(saved, sharding) if sharding is not None else jnp.asarray(saved)


def _fingerprint(description: Any, arrays: Any) -> np.ndarray:
  """`[16] uint8` that changes with the settings and with every array this host can read."""
  digest = hashlib.blake2b(repr(description).encode(), digest_size=16)
  for x in jax.tree.leaves(arrays):
    digest.update(f"{x.dtype}{x.shape}".encode())
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    if x.is_fully_addressable:
      digest.update(np.ascontiguousarray(np.asarray(x)).tobytes())
  return np.frombuffer(digest.digest(), np.uint8)
