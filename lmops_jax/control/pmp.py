"""Exact PMP data scores: the gradient of a training run's target loss with respect to data weights.

"Data Selection via Optimal Control for Language Models", arXiv 2410.07064: theorem 2.1 (state,
costate and control conditions of Pontryagin's maximum principle) and algorithm 1, for any optimizer
instead of plain gradient descent. The objective is the area under the target loss,
`A = sum_{t=1..T} J(params_t)` (or its last term), and the score of an example at a step is
`-dA/dweights[t, n]`: positive means that more weight there lowers the target loss.

What is left out on purpose: the argmax over the simplex (see `outer.solve_weights`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks, piecewise, resumable
from lmops_jax.control import trajectory as trajectories
from lmops_jax.control.dynamics import State, init_state
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.problem import Problem
from lmops_jax.control.result import PmpResult, make_result
from lmops_jax.control.training_run import TrainingRun, prepare, shardings_of
from lmops_jax.mesh.micro_batches import DeviceRows


def solve(
    run: TrainingRun,
    target_loss: Callable,
    options: SolveOptions | None = None,
    *,
    proxy: Any = None,
    store: resumable.Store | None = None,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] | None = None) -> PmpResult:
  """Trains for T steps, then runs the costate recursion back and scores every example.

  Without a store everything is traceable: call it directly (it is jitted once for each set of
  functions and shapes; pass the same function objects again to reuse the compiled program), or
  inside `jax.jit`, under `jax.enable_x64`, with sharded params and batches. Arrays that a loss
  reads besides its arguments are best handed over in a `jax.tree_util.Partial`, whose leaves are
  traced rather than compiled in (`mean_target_loss` makes one).

  Args:
    target_loss: `params -> []`, the downstream loss J.
    proxy: pytree with leaves `[M, ...]`: examples that are scored but not trained on. The score of
      one is `-dA/de` when `e` times its loss is added at each scored step. M is a multiple of the
      shards of `run.device_rows`.
    store: makes the solve resumable: it runs in segments of `options.segment_steps`, and a later
      call with the same arguments and store goes on from the last one (see `resumable`).
    progress: with a store, called with (segments done, segments in both passes) after each save;
      an error that it raises ends the solve, and the next call goes on from that segment.
    log: with a store, called with a line on the norms of costate and target gradient after each
      segment of the reverse pass.
  Returns:
    A `PmpResult`. `check_result` raises if the recursion diverged.
  Raises:
    ValueError: for arguments that do not fit together, in one sentence, before compilation; also
      for an optimizer under which every score is 0, without a surrogate, and for a store that holds
      another solve.
    FloatingPointError: with a store, naming the step, if the run or its adjoint diverges (see
      `check_result`). The segment is not saved: what was saved is sound.
  """
  if not isinstance(run, TrainingRun):
    raise ValueError(f"run must be a control.TrainingRun, got a {type(run).__name__}.")
  for name, fn in (("progress", progress), ("log", log)):
    if fn is not None:
      checks.function(fn, f"{name} (or None)")
      if store is None:
        raise ValueError(f"{name} is called after each segment of a solve; give it a store.")
  arguments = prepare(run, target_loss, proxy, options or SolveOptions())
  if store is not None:
    return resumable.solve_in_segments(*arguments, store, progress, log)
  return _solve(*arguments, shardings_of(arguments[0].params))


def pmp_scores(
    example_losses: Callable, target_loss: Callable, optimizer: Any, params: Any, batches: Any,
    weights: Any, objective: str = "area", trajectory: str | int = "all", proxy: Any = None,
    every_k: int = 1, groups: int | None = None, *, device_rows: DeviceRows | None = None,
    **options: Any) -> PmpResult:
  """`solve` without a store, its arguments one by one.

  Args:
    example_losses, optimizer, params, batches, weights, device_rows: see `TrainingRun`.
    target_loss, proxy: see `solve`.
    objective, trajectory, every_k, groups, **options: see `SolveOptions`.
  """
  run = TrainingRun(example_losses, optimizer, params, batches, weights, device_rows)
  return solve(run, target_loss, SolveOptions(
    objective, trajectory, every_k, groups, **options), proxy=proxy)


@functools.partial(jax.jit, static_argnames=("options", "shardings"))
def _solve(run, target_loss, proxy, options, shardings):
  problem = Problem.of(run, target_loss, proxy, options, shardings)
  return run_passes(problem, init_state(*run.optimizer, run.params))


def run_passes(problem: Problem, state: State) -> PmpResult:
  """Both passes of `problem` from `state` (traceable)."""
  return run_passes_and_go_on(problem, state)[0]


def run_passes_and_go_on(problem: Problem, state: State) -> tuple[PmpResult, State]:
  """Both passes, and the state behind the last step, from which training may go on."""
  problem = problem.with_surrogate(
    piecewise.used_surrogate(problem.update, state, problem.options.surrogate))
  carry, outs, final_target, last = trajectories.run(
    problem.forward, problem.reverse, problem.first_carry, problem.constrain_state(state),
    jnp.arange(problem.num_steps), problem.options.trajectory)
  result = make_result(outs, final_target, carry.proxy_scores, problem.constrain(last.params))
  return result, last
