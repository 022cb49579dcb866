"""What a solve computes, counted in forward passes: for the accounting of its cost.

Over the same examples a gradient is worth 3 forward passes, a forward-mode derivative of the losses
3, and a Hessian-vector product with the slopes that come with it 8 (tests/control/test_cost.py
measures them). Rematerialisation inside a model is not counted.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from lmops_jax.control import adjoint, checks, jaxprs, plan
from lmops_jax.control.dynamics import init_state
from lmops_jax.control.pmp import check_settings
from lmops_jax.control.problem import Settings

GRADIENT = 3
SLOPES = 3
HESSIAN_AND_SLOPES = 8
NUM_PROBES = 8  # of the mean eigenvalue
POWER_STEPS = 20  # of the largest eigenvalue


class Passes(NamedTuple):
  """Forward passes' worth of arithmetic over the examples of each kind."""
  batch: int  # over one step's batch
  target: int  # over the target's rows
  proxy: int  # over the proxies


def solve_passes(
    optimizer: Any,
    params: Any,
    num_steps: int,
    *,
    segment_steps: int | None = None,
    trajectory: str | int = "all",
    objective: str = "area",
    every_k: int = 1,
    groups: int | None = None,
    hessian: bool = True,
    proxy_samples: int | None = None,
    surrogate: str | None = None) -> Passes:
  """What `pmp_scores`, or `pmp_scores_resumable` with `segment_steps`, computes over T steps.

  Args:
    optimizer: decides whether the reverse pass needs the gradient again: clipping, Adam and sums
      with a traced learning rate do, plain SGD with momentum and decay does not.
    params: of its state, arrays or shapes.
    num_steps: T. The other arguments are those of the solve.
  """
  checks.optimizer(optimizer)
  checks.integer(num_steps, "num_steps", 1)
  if segment_steps is not None:
    checks.integer(segment_steps, "segment_steps", 1)
  check_settings(Settings(
    objective, trajectory, every_k, groups, hessian, proxy_samples=proxy_samples,
    surrogate=surrogate), num_steps, 1)
  num_gradients = _trajectory_gradients(num_steps, segment_steps, trajectory)
  if _reverse_reads_gradient(optimizer, params, surrogate):
    num_gradients += num_steps
  reverse = HESSIAN_AND_SLOPES if hessian else SLOPES
  # J and its gradient at params_T; then at params_{T-1} .. params_1, and J alone at params_0.
  target = GRADIENT * num_steps + 1 if objective == "area" else GRADIENT + num_steps
  scored = num_scored(num_steps, every_k, groups, proxy_samples)
  return Passes(GRADIENT * num_gradients + reverse * num_steps, target, SLOPES * scored)


def num_scored(num_steps: int, every_k: int, groups: int | None, proxy_samples: int | None) -> int:
  """Times that a solve scores all proxies."""
  return proxy_samples or groups or -(-num_steps // every_k)


def segment_passes(
    optimizer: Any,
    params: Any,
    num_steps: int,
    *,
    is_reverse: bool,
    num_scored: float,
    trajectory: str | int = "all",
    objective: str = "area",
    hessian: bool = True,
    surrogate: str | None = None) -> Passes:
  """What one segment of `pmp_scores_resumable` computes, in either pass.

  Args:
    num_steps: of the segment. num_scored: times that it scores all proxies, on average.
  """
  if not is_reverse:
    return Passes(GRADIENT * num_steps, 0, 0)
  num_gradients = _run_gradients(num_steps, trajectory)
  if _reverse_reads_gradient(optimizer, params, surrogate):
    num_gradients += num_steps
  reverse = HESSIAN_AND_SLOPES if hessian else SLOPES
  target = (GRADIENT if objective == "area" else 1) * num_steps
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
  checks.one_of(method, "method", checks.INFLUENCE_METHODS)
  checks.one_of(curvature, "curvature", checks.CURVATURES)
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
  return num_steps + plan.num_recomputed(policy, num_steps)


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
