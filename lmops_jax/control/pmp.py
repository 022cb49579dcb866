"""Exact PMP data scores: the gradient of a training run's target loss with respect to data weights.

"Data Selection via Optimal Control for Language Models", arXiv 2410.07064: theorem 2.1 (state,
costate and control conditions of Pontryagin's maximum principle) and algorithm 1, for any optimizer
instead of plain gradient descent. The objective is the area under the target loss,
`A = sum_{t=1..T} J(params_t)` (or its last term), and the score of an example at a step is
`-dA/dweights[t, n]`: positive means that more weight there lowers the target loss.

What is left out on purpose: the argmax over the simplex (see `outer.solve_weights`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lmops_jax.control import checks, piecewise
from lmops_jax.control import trajectory as trajectories
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import State, init_state, strong
from lmops_jax.control.problem import Outputs, Problem, Settings, Target
from lmops_jax.mesh.micro_batches import DeviceRows

# The costate grows like T times the target gradient; beyond this factor the adjoint has diverged.
_MAX_GROWTH = 1e4


class PmpResult(NamedTuple):
  """Scores and the logs of both passes.

  Index t of `costate_norms`, `target_grad_norms` and `costates` belongs to `params_{t+1}`.
  """
  scores: jax.Array  # [T, B] -dA/dweights[t, n], positive = helpful
  proxy_scores: jax.Array | None  # [M] summed over the scored steps
  target_losses: jax.Array  # [T + 1] J(params_0 .. params_T)
  params: Any  # params_T
  costate_norms: jax.Array  # [T] |lambda_1| .. |lambda_T|
  target_grad_norms: jax.Array  # [T] |grad J| at params_1 .. params_T, 0 outside A
  step_losses: jax.Array  # [T] weighted training loss before each step
  costates: Any  # leaves [T, ...] lambda_1 .. lambda_T, or None
  monitors: Any = None  # leaves [T + 1, ...] at params_0 .. params_T, or None


def pmp_scores(
    example_losses: Callable,
    target_loss: Callable,
    optimizer: Any,
    params: Any,
    batches: Any,
    weights: Any,
    objective: str = "area",
    trajectory: str | int = "all",
    proxy: Any = None,
    every_k: int = 1,
    groups: int | None = None,
    *,
    hessian: bool = True,
    hvp_mode: str = "jvp_of_grad",
    micro_batch_size: int | None = None,
    proxy_batch_size: int | None = None,
    keep_costates: bool = False,
    proxy_samples: int | None = None,
    sample_seed: int = 0,
    device_rows: DeviceRows | None = None,
    surrogate: str | None = None) -> PmpResult:
  """Trains for T steps, then runs the costate recursion back and scores every example.

  Everything is traceable: call it directly (it is jitted once for each set of functions and shapes;
  pass the same function objects again to reuse the compiled program), or inside `jax.jit`, under
  `jax.enable_x64`, with sharded params and batches. Arrays that a loss reads besides its arguments
  are best handed over in a `jax.tree_util.Partial`, whose leaves are traced rather than compiled in
  (`mean_target_loss` makes one).

  Args:
    example_losses: `(params, batch) -> [B]` losses, for any per-example loss.
    target_loss: `params -> []`, the downstream loss J.
    optimizer: any `optax.GradientTransformation`; it is run on the raw gradient of each step's
      weighted loss, starting from `optimizer.init(params)`.
    params: pytree of floating-point leaves of any shape.
    batches: pytree with leaves `[T, B, ...]`.
    weights: `[T, B]`, finite and >= 0; the loss of step t is `sum_n weights[t, n] * l_n`. None
      means `1 / B` everywhere.
    objective: "area", `sum_{t=1..T} J(params_t)`, or "terminal", `J(params_T)`.
    trajectory: "all", "sqrt", "host", or the largest number of states to store (see `trajectory`).
    proxy: pytree with leaves `[M, ...]`: examples that are scored but not trained on. The score of
      one is `-dA/de` when `e` times its loss is added at each scored step.
    every_k: proxies are scored at the steps t with `t % every_k == 0`.
    groups: instead, split the T steps into this many contiguous groups and score each group once,
      along the sum of its cotangents at its mean parameters, weighted by the cotangents' norms.
      `groups=T` is `every_k=1`; every step enters whatever the number of groups.
    hessian: False drops the Hessian term of the recursion (an ablation: no longer the gradient).
    hvp_mode: "jvp_of_grad", or "vjp_of_grad" for losses without forward-mode rules.
    micro_batch_size: examples differentiated at once, a divisor of B.
    proxy_batch_size: proxies scored at once; by default `micro_batch_size` or `max(B, 32)`.
    keep_costates: also return all costates (T times the parameters).
    proxy_samples: instead of `every_k` or `groups`, score each proxy at this many random steps (its
      own, drawn by `sample_seed`) with weight `T / proxy_samples`: unbiased for `every_k=1` at the
      price of so many passes over the proxies.
    device_rows: on a mesh, sums over each device's rows first, so that gradients are added over the
      mesh once a step (see `micro_batches`); B and M are multiples of its shards. None leaves it
      to the partitioner. `mean_target_loss` has its own.
    surrogate: "clipped_straight_through" gives a sign in the update of the optimizer a derivative
      that is not 0 (see `surrogates`), where a parameter has no other: the update of Lion, sign SGD
      or Rprop is piecewise constant, and all its exact scores are 0. The run itself stays as it is,
      and so do the derivatives of every other optimizer, which are exact.
  Returns:
    A `PmpResult`. `check_result` raises if the recursion diverged.
  Raises:
    ValueError: for arguments that do not fit together, in one sentence, before compilation; also
      for an optimizer under which every score is 0, without a surrogate.
  """
  params, batches, proxy, weights, settings = prepare(
    example_losses, target_loss, optimizer, params, batches, weights, proxy,
    Settings(objective, trajectory, every_k, groups, hessian, hvp_mode, micro_batch_size,
             proxy_batch_size, keep_costates, proxy_samples, sample_seed, surrogate), device_rows)
  return _solve(
    as_pytree(example_losses), as_pytree(target_loss), as_pytree(optimizer.init),
    as_pytree(optimizer.update), params, batches, weights, proxy, settings, shardings_of(params),
    device_rows)


@functools.partial(jax.jit, static_argnames=("settings", "shardings", "device_rows"))
def _solve(example_losses, target_loss, init, update, params, batches, weights, proxy, settings,
           shardings, device_rows):
  problem = Problem(
    example_losses, target_loss, update, batch_getter(batches), weights, proxy, settings,
    functools.partial(constrain, shardings), device_rows=device_rows)
  return solve(problem, init_state(init, update, params))


def solve(problem: Problem, state: State) -> PmpResult:
  """Both passes of `problem` from `state` (traceable core of `pmp_scores`)."""
  settings = problem.settings
  surrogate = piecewise.used_surrogate(problem.update, state, settings.surrogate)
  problem = dataclasses.replace(problem, settings=settings._replace(surrogate=surrogate))
  carry, outs, final_target, last = trajectories.run(
    problem.forward, problem.reverse, problem.first_carry, problem.constrain_state(state),
    jnp.arange(problem.num_steps), problem.settings.trajectory)
  return make_result(outs, final_target, carry.proxy_scores, problem.constrain(last.params))


def make_result(outs: Outputs, final_target: Target, proxy_scores: Any,
                final_params: Any) -> PmpResult:
  """Puts the stacked outputs of the reverse pass together."""
  target = jax.tree.map(lambda x, last: jnp.append(x, last.astype(x.dtype)), outs.target,
                        final_target)
  return PmpResult(
    scores=outs.scores, proxy_scores=proxy_scores, target_losses=target.loss, params=final_params,
    costate_norms=outs.costate_norm, target_grad_norms=target.grad_norm[1:],
    step_losses=outs.step_loss, costates=outs.costate, monitors=target.monitor)


def check_result(result: PmpResult) -> PmpResult:
  """Returns `result`, or raises if the forward or the adjoint recursion diverged (host side).

  Raises:
    FloatingPointError: naming the first step at which a loss is not finite, or the step at which
      the costate is not finite or exceeds `1e4 * T * max |grad J|`: the adjoint explodes when the
      learning rate is above 2 / (largest Hessian eigenvalue), even where training looks fine.
    ValueError: every score is 0, with the likely reason.
  """
  num_steps = len(result.step_losses)
  check_steps(result.step_losses, result.target_losses, result.costate_norms, result.scores,
              np.max(np.asarray(result.target_grad_norms, np.float64)), num_steps)
  if result.proxy_scores is not None and not np.isfinite(np.asarray(result.proxy_scores)).all():
    raise FloatingPointError("A proxy score is not finite although the costates are; check the "
                             "proxy examples.")
  check_not_all_zero(result.scores, result.target_grad_norms, result.proxy_scores)
  return result


def check_not_all_zero(scores: Any, target_grad_norms: Any, proxy_scores: Any = None) -> None:
  """Refuses scores that are all 0, which rank nothing (waits for them).

  Raises:
    ValueError: with the likely reason.
  """
  if not jnp.any(scores):
    reason = "is the learning rate 0, or are fewer steps taken than the optimizer accumulates?"
    if not jnp.any(target_grad_norms):
      reason = "the gradient of the target loss is 0 at every parameter of the run."
    raise ValueError(f"Every score is 0, so the scores rank nothing: {reason}")
  if proxy_scores is not None and not jnp.any(proxy_scores):
    raise ValueError(
      "Every proxy score is 0 although those of the examples trained on are not: does the loss of "
      "a proxy depend on the parameters?")


def check_steps(step_losses, target_losses, costate_norms, scores, target_grad_norm: float,
                num_steps: int, start: int = 0) -> None:
  """`check_result` for the steps from `start` on; `target_grad_norm` is the largest known."""
  for name, values in (("training loss", step_losses), ("target loss", target_losses)):
    values = np.asarray(values, np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      raise FloatingPointError(
        f"The {name} is {values[bad[0]]} at step {start + bad[0]} of {num_steps}; lower the "
        "learning rate or check the data.")
  norms = np.asarray(costate_norms, np.float64)
  bound = _MAX_GROWTH * num_steps * target_grad_norm
  for i in range(len(norms) - 1, -1, -1):  # in the order of the recursion
    if not np.isfinite(norms[i]) or norms[i] > bound:
      raise FloatingPointError(
        f"The costate diverged: its norm is {norms[i]:.3g} at step {start + i + 1} of {num_steps} "
        f"(bound {bound:.3g}); lower the learning rate below 2 / (largest Hessian eigenvalue).")
  bad = np.argwhere(~np.isfinite(np.asarray(scores)))
  if bad.size:
    raise FloatingPointError(f"A score is not finite at step {start + bad[0][0]} of {num_steps}.")


def prepare(example_losses, target_loss, optimizer, params, batches, weights, proxy, settings,
            device_rows):
  """Checks the arguments of a solve and puts arrays into the types that it uses."""
  checks.optimizer(optimizer)
  checks.parameters(params)
  num_steps, batch_size = checks.leading_axes(batches, "batches", 2, "T, B")
  params, batches = strong(params), checks.arrays(batches, "batches")
  if weights is None:
    weights = jnp.full((num_steps, batch_size), 1 / batch_size)
  weights = checks.array(weights, "weights")
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    weights = weights.astype(jnp.result_type(float))
  weights = strong(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)))
  checks.step_weights(weights, num_steps, batch_size)
  checks.losses(example_losses, params, jax.tree.map(lambda x: x[0], batches), batch_size,
                "a batch")
  checks.target(target_loss, params)
  checks.device_rows(device_rows, batches=batch_size)
  if proxy is not None:
    num_proxies, = checks.leading_axes(proxy, "proxy", 1, "M")
    proxy = checks.arrays(proxy, "proxy")
    checks.losses(example_losses, params, proxy, num_proxies, "proxy")
    checks.device_rows(device_rows, proxy=num_proxies)
  return params, batches, proxy, weights, check_settings(settings, num_steps, batch_size)


def check_settings(settings: Settings, num_steps: int, batch_size: int) -> Settings:
  """Normalised settings, or a ValueError."""
  checks.one_of(settings.objective, "objective", checks.OBJECTIVES)
  every_k = checks.integer(settings.every_k, "every_k", 1)
  groups = settings.groups
  if groups is not None:
    groups = checks.integer(groups, f"groups (of the T={num_steps} steps)", 1, num_steps)
    if every_k != 1:
      raise ValueError(
        f"every_k={every_k} and groups={groups} both choose when proxies are scored; set one.")
  proxy_samples, sample_seed = settings.proxy_samples, settings.sample_seed
  if proxy_samples is not None:
    proxy_samples = checks.integer(
      proxy_samples, f"proxy_samples (of the T={num_steps} steps)", 1, num_steps)
    sample_seed = checks.integer(sample_seed, "sample_seed", 0, 2**32 - 1)
    if every_k != 1 or groups is not None:
      raise ValueError(
        f"proxy_samples={proxy_samples} and every_k={every_k} or groups={groups} both choose when "
        "proxies are scored; set one.")
  micro_batch_size = checks.micro_batch(settings.micro_batch_size, "micro_batch_size", batch_size)
  proxy_batch_size = settings.proxy_batch_size
  if proxy_batch_size is None:
    proxy_batch_size = micro_batch_size or max(batch_size, 32)
  return settings._replace(
    trajectory=checks.trajectory(settings.trajectory), every_k=every_k, groups=groups,
    hessian=checks.flag(settings.hessian, "hessian"), hvp_mode=checks.hvp_mode(settings.hvp_mode),
    micro_batch_size=micro_batch_size,
    proxy_batch_size=checks.integer(proxy_batch_size, "proxy_batch_size", 1),
    keep_costates=checks.flag(settings.keep_costates, "keep_costates"), proxy_samples=proxy_samples,
    sample_seed=sample_seed, surrogate=checks.surrogate(settings.surrogate))


def batch_getter(batches: Any) -> Callable:
  """`t -> batch` over leaves `[T, B, ...]`."""
  return lambda t: jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, t, keepdims=False), batches)


def shardings_of(tree: Any) -> tuple:
  """Each leaf's NamedSharding where it is an array over several devices, else None."""
  def sharding(x):
    found = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) and found.mesh.size > 1 else None
  return tuple(map(sharding, jax.tree.leaves(tree)))


def constrain(shardings: tuple, tree: Any) -> Any:
  """`tree` with leaves pinned to `shardings` (None leaves it to the partitioner)."""
  leaves, treedef = jax.tree.flatten(tree)
  pinned = [x if s is None else jax.lax.with_sharding_constraint(x, s)
            for x, s in zip(leaves, shardings, strict=True)]
  return treedef.unflatten(pinned)
