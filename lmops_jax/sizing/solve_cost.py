"""What a solve computes, counted in forward passes: for the accounting of its cost.

Over the same examples a gradient is worth 3 forward passes, a forward-mode derivative of the losses
3, and a Hessian-vector product with the slopes that come with it 8 (tests/control/test_cost.py
measures them). Rematerialisation inside a model is not counted.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from lmops_jax.control import adjoint, checks, jaxprs
from lmops_jax.control.dynamics import init_state
from lmops_jax.control.influence import CURVATURES, METHODS, NUM_PROBES, POWER_STEPS
from lmops_jax.control.options import SolveOptions
from lmops_jax.sizing import solve_plan

GRADIENT = 3
SLOPES = 3
HESSIAN_AND_SLOPES = 8


class Passes(NamedTuple):
  """Forward passes' worth of arithmetic over the examples of each kind."""
  batch: int  # over one step's batch
  target: int  # over the target's rows
  proxy: int  # over the proxies


def solve_passes(
    optimizer: Any,
    params: Any,
    num_steps: int,
    options: SolveOptions | None = None,
    *,
    in_segments: bool = False) -> Passes:
  """What a solve computes over T steps.

  Args:
    optimizer: decides whether the reverse pass needs the gradient again: clipping, Adam and sums
      with a traced learning rate do, plain SGD with momentum and decay does not.
    params: the run's parameters, arrays or shapes.
    num_steps: T. options: the solve's. in_segments: whether it has a store.
  """
  checks.optimizer(optimizer)
  checks.integer(num_steps, "num_steps", 1)
  options = options or SolveOptions()
  options.check_sizes(num_steps)
  segment_steps = options.segment_steps if in_segments else None
  num_gradients = _trajectory_gradients(num_steps, segment_steps, options.trajectory)
  if _reverse_reads_gradient(optimizer, params, options.surrogate):
    num_gradients += num_steps
  reverse = HESSIAN_AND_SLOPES if options.hessian else SLOPES
  # J and its gradient at params_T; then at params_{T-1} .. params_1, and J alone at params_0.
  target = GRADIENT * num_steps + 1 if options.objective == "area" else GRADIENT + num_steps
  return Passes(GRADIENT * num_gradients + reverse * num_steps, target,
                SLOPES * num_scored(num_steps, options))


def num_scored(num_steps: int, options: SolveOptions) -> int:
  """How many times a solve scores all proxies."""
  return options.proxy_samples or options.groups or -(-num_steps // options.every_k)


def segment_passes(
    optimizer: Any,
    params: Any,
    num_steps: int,
    options: SolveOptions,
    *,
    is_reverse: bool,
    num_scored: float) -> Passes:
  """What one segment of a solve with a store computes, in either pass.

  Args:
    num_steps: steps of the segment. num_scored: how often it scores all proxies, on average.
  """
  if not is_reverse:
    return Passes(GRADIENT * num_steps, 0, 0)
  num_gradients = _run_gradients(num_steps, options.trajectory)
  if _reverse_reads_gradient(optimizer, params, options.surrogate):
    num_gradients += num_steps
  reverse = HESSIAN_AND_SLOPES if options.hessian else SLOPES
  target = (GRADIENT if options.objective == "area" else 1) * num_steps
  return Passes(GRADIENT * num_gradients + reverse * num_steps, target, SLOPES * num_scored)


def influence_passes(
    method: str,
    iterations: int,
    *,
    curvature: str,
    damping: float | None = None,
    scale: float | None = None,
    num_batches: int = 1) -> int:
  """Forward passes over one batch in `influence_direction`; for "cg" the most that it takes."""
  checks.one_of(method, "method", METHODS)
  checks.one_of(curvature, "curvature", CURVATURES)
  checks.integer(iterations, "iterations", 1)
  product = HESSIAN_AND_SLOPES if curvature == "hessian" else SLOPES + GRADIENT
  whole = 1 + (NUM_PROBES if damping is None else 0)  # products with all batches: the residual last
  single = 0
  if method == "cg":
    whole += iterations + 1  # the first residual
  else:
    single += iterations + (POWER_STEPS if scale is None else 0)
  return product * (whole * num_batches + single)


def _trajectory_gradients(num_steps: int, segment_steps: int | None, policy: str | int) -> int:
  """Training gradients that advance the state, in both passes together."""
  if segment_steps is None:
    return _run_gradients(num_steps, policy)
  sizes = [min(segment_steps, num_steps - i) for i in range(0, num_steps, segment_steps)]
  return num_steps + sum(_run_gradients(size, policy) for size in sizes)


def _run_gradients(num_steps: int, policy: str | int) -> int:
  return num_steps + solve_plan.num_recomputed(policy, num_steps)


def _reverse_reads_gradient(optimizer: Any, params: Any, surrogate: str | None) -> bool:
  """Whether any cotangent of the update depends on the gradient; if none does, XLA drops it."""
  def start(params):
    state = init_state(optimizer.init, optimizer.update, params)
    return state, adjoint.float_leaves(state.opt_state)

  state, floats = jax.eval_shape(start, params)

  def pull(state, grads, costate, opt_cotangent):
    return adjoint.update_pullback(
      optimizer.update, state, grads, costate, opt_cotangent, surrogate)

  jaxpr = jax.make_jaxpr(pull)(state, state.params, state.params, floats).jaxpr
  num = [len(jax.tree.leaves(tree)) for tree in (state, state.params, state.params, floats)]
  of_gradient = np.repeat([0, 1, 0, 0], num).tolist()
  return any(jaxprs.dependence(jaxpr, of_gradient))
