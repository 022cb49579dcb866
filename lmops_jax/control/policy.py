"""Learning policies: data weights gamma[t, n] that change with the step, and their improvement.

"Towards Optimal Learning of Language Models", arXiv 2402.17759: full-batch training under a policy
with rows on the simplex, the area under a desired loss as objective, its exact gradient in every
weight by the reverse recursion of `problem`, and a step on all rows at once. One improvement
(forward pass, reverse pass, line search, projection of every row) is one compiled program; examples
may be sharded over a mesh, since nothing but sums and maxima crosses them.

The paper trains by plain gradient descent; here any optax transformation takes the weighted
gradient, with the general adjoint.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.control import adjoint, checks
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import init_state, strong
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.pmp import run_passes
from lmops_jax.control.problem import Problem
from lmops_jax.control.result import PmpResult
from lmops_jax.control.rules import check_rule
from lmops_jax.control.simplex import stationarity_gap
from lmops_jax.control.training_run import constrain, shardings_of
from lmops_jax.mesh.micro_batches import sum_over_micro_batches

_ARMIJO = 1e-4
_MAX_HALVINGS = 40


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ControlledRun:
  """A training run of T full-batch steps whose data weights are to be chosen; see `controlled_run`.

  A pytree, so that it is an argument of compiled functions: data and parameters are traced.
  """
  example_losses: Callable
  target_loss: Callable
  init: Callable
  update: Callable
  params: Any
  data: Any  # leaves [N, ...]
  mask: jax.Array | None  # [N] bool, False for rows that are no examples
  monitor: Callable | None
  num_steps: int = dataclasses.field(metadata={"static": True})
  num_examples: int = dataclasses.field(metadata={"static": True})
  options: SolveOptions = dataclasses.field(metadata={"static": True})
  shardings: tuple = dataclasses.field(metadata={"static": True})

  def problem(self, weights: jax.Array | None) -> Problem:
    """The control problem under `[T, N]` weights."""
    return Problem(
      self.example_losses, self.target_loss, self.update, lambda t: self.data, weights, None,
      self.options, functools.partial(constrain, self.shardings), self.monitor)

  def first_state(self):
    return init_state(self.init, self.update, self.params)

  def uniform(self) -> jax.Array:
    """The policy of conventional training, `[T, N]`."""
    is_example = jnp.ones(self.num_examples) if self.mask is None else self.mask
    row = is_example / jnp.sum(is_example)
    row = row.astype(jnp.result_type(float))
    return jnp.broadcast_to(row, (self.num_steps, self.num_examples))


def controlled_run(
    example_losses: Callable,
    target_loss: Callable,
    optimizer: Any,
    params: Any,
    data: Any,
    num_steps: int,
    *,
    mask: Any = None,
    monitor: Callable | None = None,
    options: SolveOptions | None = None) -> ControlledRun:
  """Checks and bundles what a policy controls.

  Args:
    example_losses: `(params, batch) -> [B]`.
    target_loss: `params -> []`, the desired loss L (`mean_target_loss` makes one).
    optimizer: any `optax.GradientTransformation`.
    params: the parameters before the first step.
    data: leaves `[N, ...]`; every step takes all rows.
    num_steps: T.
    mask: `[N] bool`; False marks rows that only fill the data up to a size that a mesh divides.
    monitor: `params -> pytree` recorded at every params_t, such as losses on held-out data.
    options: for both passes. The objective is the area, its gradient the exact one; there are no
      proxies and no store.
  Raises:
    ValueError: for arguments that do not fit together, in one sentence, before compilation.
  """
  checks.optimizer(optimizer)
  checks.parameters(params)
  num_examples, = checks.leading_axes(data, "data", 1, "N")
  num_steps = checks.integer(num_steps, "num_steps", 1)
  params, data = strong(params), checks.arrays(data, "data")
  if mask is not None:
    mask = checks.array(mask, "mask")
    if mask.dtype != bool:
      raise ValueError(f"mask has dtype {mask.dtype}; expected bool.")
    if mask.shape != (num_examples,) or (checks.is_concrete(mask) and not np.asarray(mask).any()):
      raise ValueError(
        f"mask has shape {mask.shape}; expected one flag for each of the {num_examples} rows, at "
        "least one of them True.")
  checks.losses(example_losses, params, data, num_examples, "data")
  checks.target(target_loss, params)
  if monitor is not None:
    if not callable(monitor):
      raise ValueError(f"monitor must be a function of params or None, got {monitor!r}.")
    with checks.failing("monitor fails on params"):
      jax.eval_shape(monitor, params)
  options = (options or SolveOptions()).checked(num_steps, num_examples)
  if options.objective != "area" or not options.hessian:
    raise ValueError(
      f"a policy is improved along the exact gradient of the area, not with objective="
      f"{options.objective!r} and hessian={options.hessian}; leave both at their defaults.")
  return ControlledRun(
    as_pytree(example_losses), as_pytree(target_loss), as_pytree(optimizer.init),
    as_pytree(optimizer.update), params, data, mask,
    None if monitor is None else as_pytree(monitor), num_steps, num_examples, options,
    shardings_of(params))


def check_policy(run: ControlledRun, gamma: Any) -> jax.Array:
  """`gamma` as an array; a ValueError names a wrong shape or the first row off the simplex."""
  gamma = _shaped(run, gamma)
  if checks.is_concrete(gamma):
    values = np.asarray(gamma, np.float64)
    bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
      t, n = bad[0]
      raise ValueError(
        f"the policy has the weight {values[t, n]} at step {t}, example {n}; weights must be "
        "finite and >= 0.")
    sums = values.sum(axis=1)
    t = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[t] - 1) > 1e-4:
      raise ValueError(
        f"the policy's row of step {t} sums to {sums[t]:.6g}, not 1; project it with "
        "control.project_simplex.")
    if run.mask is not None and (values[:, ~np.asarray(run.mask)] > 0).any():
      raise ValueError("the policy gives weight to rows that the mask says are no examples.")
  return gamma


def _check_run(run: Any) -> None:
  if not isinstance(run, ControlledRun):
    raise ValueError(f"run must be what controlled_run makes, got {run!r}.")


def _shaped(run: ControlledRun, gamma: Any) -> jax.Array:
  """`gamma` as floating-point numbers, or a ValueError if it is not `[T, N]`."""
  _check_run(run)
  gamma = checks.array(gamma, "the policy")
  wanted = (run.num_steps, run.num_examples)
  if gamma.shape != wanted:
    raise ValueError(
      f"the policy has shape {gamma.shape}; expected [T, N] = {wanted}, one row for each step and "
      "one weight for each training example.")
  if not jnp.issubdtype(gamma.dtype, jnp.floating):
    gamma = gamma.astype(jnp.result_type(float))
  return gamma


# -------------------------------------------------------------------------- training under a policy


class Simulation(NamedTuple):
  """A run under a policy: index t belongs to params_t."""
  params: Any  # params_T
  target_losses: jax.Array  # [T + 1]
  monitors: Any  # leaves [T + 1, ...], or None
  step_losses: jax.Array  # [T] weighted training loss before each step
  weights: jax.Array  # [T, N]
  statistics: Any  # leaves [T, ...]: what `observe` returned


class Signals(NamedTuple):
  """What a policy that reads local signals, or an observer, sees before a step."""
  step: jax.Array  # [] t
  losses: jax.Array  # [N] training losses at params_t
  contributions: Any  # {name: [N]} <grad L(params_t), grad l_n(params_t)>
  weights: jax.Array | None = None  # [N] of the step, for an observer


def simulate(run: ControlledRun, policy: Any = None, *,
             directions: dict[str, Callable] | None = None,
             observe: Callable | None = None) -> Simulation:
  """Trains under a policy.

  Args:
    policy: `[T, N]`; None is uniform; or a function `Signals -> [N]` that chooses each step's
      weights as training goes: on the simplex, and 0 for rows that are no examples.
    directions: losses `params -> []` by name; `Signals.contributions` holds the derivatives along
      their gradients under the same names.
    observe: `Signals -> pytree`, recorded at every step (reduce there what is too large to keep).
  Raises:
    ValueError: if `check_policy` refuses the policy, or a function does not return one weight for
      each example.
  """
  _check_run(run)
  if not isinstance(directions, Mapping | None):
    raise ValueError(f"directions must be a dict from names to losses, got {directions!r}.")
  for name, fn in (directions or {}).items():
    checks.target(fn, run.params, f"directions[{name!r}]")
  if observe is not None:
    checks.function(observe, "observe (or None)")
  directions = {name: as_pytree(fn) for name, fn in (directions or {}).items()}
  observe = None if observe is None else as_pytree(observe)
  if callable(policy):
    return _simulate_online(run, as_pytree(policy), directions, observe)
  gamma = run.uniform() if policy is None else check_policy(run, policy)
  return _simulate(run, gamma, directions, observe)


@jax.jit
def _simulate(run, gamma, directions, observe):
  return _train(run, lambda signals: gamma[signals.step], directions, observe)


@jax.jit
def _simulate_online(run, choose, directions, observe):
  return _train(run, choose, directions, observe)


def _train(run, choose, directions, observe):
  problem = run.problem(None)
  wide = functools.partial(jnp.asarray, dtype=jnp.result_type(float))

  def losses_of(params, batch):
    losses = run.example_losses(params, batch)
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))

  def signals_at(params, t):
    _, losses = sum_over_micro_batches(
      lambda params, batch, _: ((), losses_of(params, batch)), params, run.data,
      jnp.ones(run.num_examples), run.options.micro_batch_size)
    found = {}
    for name, loss in directions.items():
      found[name], losses = adjoint.directional_derivatives(
        run.example_losses, params, jax.grad(loss)(params), run.data,
        mode=run.options.hvp_mode, micro_batch_size=run.options.micro_batch_size)
    return Signals(t, losses, found)

  def step(state, t):
    target, monitor = problem.target_loss(state.params), problem.monitored(state.params)
    signals = signals_at(state.params, t)
    with checks.failing("the policy fails on the signals of a step"):
      weights = wide(choose(signals))
    if weights.shape != (run.num_examples,):
      raise ValueError(
        f"the policy returned weights of shape {weights.shape} for a step; expected one for each "
        f"of the {run.num_examples} training examples.")
    seen = None if observe is None else observe(signals._replace(weights=weights))
    new = dataclasses.replace(problem, weights=weights[None]).forward(state, 0)
    loss = jnp.sum(weights * signals.losses)
    return new, (target, monitor, loss, weights, seen)

  state = problem.constrain_state(run.first_state())
  last, (targets, monitors, losses, weights, seen) = jax.lax.scan(
    step, state, jnp.arange(run.num_steps))
  end = problem.target_loss(last.params), problem.monitored(last.params)
  targets, monitors = jax.tree.map(
    lambda x, y: jnp.concatenate([x, y[None].astype(x.dtype)]), (targets, monitors), end)
  return Simulation(last.params, targets, monitors, losses, weights, seen)


def policy_gradient(run: ControlledRun, gamma: jax.Array) -> PmpResult:
  """Both passes under `[T, N]` weights; `scores` are -dJ/dgamma of `J = sum_{t=1..T} L`.

  Divided by the learning rate of plain gradient descent they are the adjoint contributions
  `<costate_{t+1}, grad l_n(params_t)>`.
  """
  return _policy_gradient(run, _shaped(run, gamma))


@jax.jit
def _policy_gradient(run, gamma):
  return run_passes(run.problem(gamma), run.first_state())


# ------------------------------------------------------------------------------- improving a policy


class Improvement(NamedTuple):
  """One step on a policy, with what was seen under the policy before it."""
  gamma: jax.Array  # [T, N] after the step
  objective: jax.Array  # [] J = sum_{t=1..T} L(params_t), before the step
  gap: jax.Array  # [T] Frank-Wolfe gap of each row, of J
  target_losses: jax.Array  # [T + 1]
  monitors: Any  # leaves [T + 1, ...], or None
  costate_norms: jax.Array  # [T]
  step_losses: jax.Array  # [T]
  target_grad_norms: jax.Array  # [T]
  rate: jax.Array  # [] the rate taken; 0 if no rate lowered the objective
  scores: jax.Array  # [T, N] -dJ/dgamma


def improve_policy(run: ControlledRun, gamma: jax.Array, rule: Any, rate: Any, *,
                   frozen_steps: int = 0, line_search: bool = False) -> Improvement:
  """Forward pass, reverse pass, and one step of `rule` on all rows, as one compiled program.

  Args:
    gamma: `[T, N]` on the simplex.
    rule: `ProjectedGradient()` or another of `rules`.
    rate: the step size for J, a sum over steps (for the mean over steps multiply by T); 0 leaves
      the policy as it is, bit for bit.
    frozen_steps: rows before this step stay as they are.
    line_search: halve the rate until J falls by a share of what its gradient promises (Armijo);
      without it the step is always taken.
  Raises:
    ValueError: if the policy is not `[T, N]` (its values are not looked at, see `check_policy`),
      the rate is negative or not finite, or the frozen steps are below 0 or above T.
  """
  gamma = _shaped(run, gamma)
  frozen_steps = checks.integer(frozen_steps, "frozen_steps", 0, run.num_steps)
  checks.number(rate, "rate")
  line_search = checks.flag(line_search, "line_search")
  check_rule(rule)
  rate = jnp.asarray(rate, jnp.result_type(float))  # one type for 0 and 0.0: compiled once
  return _improve(run, gamma, rate, rule, frozen_steps, line_search)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _improve(run, gamma, rate, rule, frozen_steps, line_search):
  is_free = (jnp.arange(run.num_steps) >= frozen_steps)[:, None]
  taken = jnp.minimum(rate, rule.max_rate)

  def candidate(gamma, scores, rate):
    new = rule.move(gamma, scores, rate, run.mask)
    return jnp.where(is_free & (rate > 0), new, gamma)

  result = run_passes(run.problem(gamma), run.first_state())
  scores = result.scores
  objective = jnp.sum(result.target_losses[1:])
  if line_search:
    taken = _search(run, gamma, scores, objective, taken, candidate)
  new = candidate(gamma, scores, taken)
  return Improvement(
    new, objective, stationarity_gap(gamma, scores, run.mask), result.target_losses,
    result.monitors, result.costate_norms, result.step_losses, result.target_grad_norms, taken,
    scores)


def _search(run, gamma, scores, objective, rate, candidate):
  """The first of rate, rate / 2, ... that satisfies Armijo's condition, or 0."""
  state = run.first_state()

  def area(gamma):
    problem = run.problem(gamma)
    def step(state, t):
      state = problem.forward(state, t)
      return state, problem.target_loss(state.params)
    return jnp.sum(jax.lax.scan(step, state, jnp.arange(run.num_steps))[1])

  def fails(rate):
    new = candidate(gamma, scores, rate)
    promised = jnp.sum(scores * (new - gamma))
    return ~(area(new) <= objective - _ARMIJO * promised)

  def body(carry):
    rate, tries, _ = carry
    rate = rate / 2
    return rate, tries + 1, fails(rate)

  rate, _, failed = jax.lax.while_loop(
    lambda carry: carry[2] & (carry[0] > 0) & (carry[1] < _MAX_HALVINGS), body,
    (rate, 0, fails(rate)))
  return jnp.where(failed, 0, rate)
