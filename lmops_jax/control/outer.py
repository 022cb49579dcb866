"""The outer loop of PDS: steps on the data weights along their scores (algorithm 1).

arXiv 2410.07064, algorithm 1: train under weights gamma, run the costates back, move gamma along
the scores, project onto the simplex, repeat. The paper writes the increment without the learning
rate, `alpha * sum_t lambda_{t+1} . grad l_n(params_t)`; here it is `outer_lr * (-dA/dgamma)`, which
is defined for every optimizer. With SGD at rate eta, `outer_lr = alpha / eta`.

The step is a rule of `rules`. Metagradient descent (arXiv 2503.13751) has the same loop: its
metagradient is `-scores` for the objective "terminal", and its step on data is `SignGradient`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.config.setting_types import NonNegative, PositiveInt, component
from lmops_jax.control import checks
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import init_state, strong
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.pmp import run_passes
from lmops_jax.control.problem import Problem
from lmops_jax.control.rules import ProjectedGradient, Rule, check_rule
from lmops_jax.control.training_run import constrain, shardings_of

_PROJECTED = ProjectedGradient("sort")


@component(module="control")
@dataclasses.dataclass(frozen=True)
class OuterLoop:
  """How often data weights are improved, and by which step.

  Attributes:
    rule: how the weights move, `@policy.ProjectedGradient()` or another of `rules`.
    rate: the rule's step size. 0 leaves the weights.
    epochs: training runs, each followed by a step.
  """

  rate: NonNegative
  epochs: PositiveInt = 1
  rule: Rule = _PROJECTED

  def moved(self, gamma: jax.Array, scores: jax.Array) -> jax.Array:
    """`[N]` weights on the simplex after a step along `scores [N]`."""
    return self.rule.move(gamma, scores, min(self.rate, self.rule.max_rate))


class WeightSolution(NamedTuple):
  """Data weights and the history of the outer loop (E = outer_epochs)."""
  gamma: jax.Array  # [N] on the simplex
  objective: jax.Array  # [E + 1] A before each outer step and after the last one
  gammas: jax.Array  # [E + 1, N]
  scores: jax.Array  # [E, N] -dA/dgamma at each outer step
  costate_norms: jax.Array  # [E, T]


def _area_or_last(target_losses: jax.Array, objective: str) -> jax.Array:
  """The objective from J at params_1 .. params_T."""
  return jnp.sum(target_losses) if objective == "area" else target_losses[-1]


def solve_weights(
    example_losses: Callable,
    target_loss: Callable,
    optimizer: Any,
    params: Any,
    data: Any,
    num_steps: int,
    *,
    outer_lr: float,
    outer_epochs: int = 1,
    rule: Rule = _PROJECTED,
    batch_indices: Any = None,
    gamma: Any = None,
    options: SolveOptions | None = None) -> WeightSolution:
  """Learns constant weights gamma on the simplex by ascent along the scores.

  Args:
    example_losses, optimizer, params: see `TrainingRun`.
    target_loss: `params -> []`, the downstream loss J.
    data: leaves `[N, ...]`.
    num_steps: T, inner steps in each outer epoch, always from `params`.
    outer_lr: step on gamma, >= 0. outer_epochs: outer steps, >= 1. rule: how gamma moves.
    batch_indices: `[T, B]` rows of `data` for each step; the step's loss is then
      `N / B * sum_b gamma[i_b] l_{i_b}`, unbiased for the full sum. None: all rows at every step,
      `sum_n gamma_n l_n`, as in the paper.
    gamma: `[N]` start on the simplex; uniform by default.
    options: for both passes; there are no proxies and no store.
  Raises:
    ValueError: for arguments that do not fit together.
  """
  checks.optimizer(optimizer)
  checks.parameters(params)
  num_examples, = checks.leading_axes(data, "data", 1, "N")
  num_steps = checks.integer(num_steps, "num_steps", 1)
  outer_epochs = checks.integer(outer_epochs, "outer_epochs", 1)
  checks.number(outer_lr, "outer_lr")
  check_rule(rule)
  params, data = strong(params), checks.arrays(data, "data")
  if batch_indices is None:
    batch_size = num_examples
  else:
    batch_indices = checks.array(batch_indices, "batch_indices")
    _check_indices(batch_indices, num_steps, num_examples)
    batch_size = batch_indices.shape[1]
  if gamma is None:
    gamma = jnp.full(num_examples, 1 / num_examples)
  gamma = checks.array(gamma, "gamma")
  checks.simplex(gamma, num_examples)
  gamma = strong(jnp.asarray(gamma, jnp.promote_types(jnp.result_type(gamma), jnp.float32)))
  checks.losses(example_losses, params, data, num_examples, "data")
  checks.target(target_loss, params)
  options = (options or SolveOptions()).checked(num_steps, batch_size)
  return _solve_weights(
    as_pytree(example_losses), as_pytree(target_loss), as_pytree(optimizer.init),
    as_pytree(optimizer.update), params, data, batch_indices, gamma, outer_lr, rule, num_steps,
    outer_epochs, options, shardings_of(params))


@functools.partial(
  jax.jit, static_argnames=("rule", "num_steps", "outer_epochs", "options", "shardings"))
def _solve_weights(example_losses, target_loss, init, update, params, data, batch_indices, gamma,
                   outer_lr, rule, num_steps, outer_epochs, options, shardings):
  num_examples = gamma.shape[0]
  if batch_indices is None:
    scale, rows = 1, jnp.broadcast_to(jnp.arange(num_examples), (num_steps, num_examples))
  else:
    scale, rows = num_examples / batch_indices.shape[1], batch_indices
  state = init_state(init, update, params)

  def batch_at(t):
    return data if batch_indices is None else jax.tree.map(lambda x: x[rows[t]], data)

  def problem_of(weights):
    return Problem(example_losses, target_loss, update, batch_at, weights, None, options,
                   functools.partial(constrain, shardings))

  def weights_of(gamma):
    return scale * gamma[rows]

  def outer_step(gamma, _):
    weights, pull = jax.vjp(weights_of, gamma)
    result = run_passes(problem_of(weights), state)
    scores, = pull(result.scores.astype(weights.dtype))
    value = _area_or_last(result.target_losses[1:], options.objective)
    rate = jnp.minimum(outer_lr, rule.max_rate)
    return rule.move(gamma, scores, rate), (value, gamma, scores, result.costate_norms)

  gamma, (values, gammas, scores, norms) = jax.lax.scan(outer_step, gamma, length=outer_epochs)
  problem = problem_of(weights_of(gamma))
  def train(state, t):
    state = problem.forward(state, t)
    return state, target_loss(state.params)
  _, target_losses = jax.lax.scan(train, state, jnp.arange(num_steps))
  return WeightSolution(
    gamma, jnp.append(values, _area_or_last(target_losses, options.objective)),
    jnp.concatenate([gammas, gamma[None]]), scores, norms)


def _check_indices(indices: jax.Array, num_steps: int, num_examples: int) -> None:
  if indices.ndim != 2 or indices.shape[0] != num_steps or indices.shape[1] < 1:
    raise ValueError(
      f"batch_indices has shape {indices.shape}; expected [T, B] with T={num_steps}, B >= 1.")
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise ValueError(f"batch_indices has dtype {indices.dtype}; expected integers.")
  if checks.is_concrete(indices):
    bad = np.argwhere((np.asarray(indices) < 0) | (np.asarray(indices) >= num_examples))
    if bad.size:
      t, b = bad[0]
      raise ValueError(
        f"batch_indices[{t}, {b}] is {int(indices[t, b])}; data has rows 0 to {num_examples - 1}.")
