"""In-run data values: what each example of a training run changed in the target loss.

In-Run Data Shapley (arXiv 2406.11011). Of a step whose update is the sum of its examples' parts
`Delta_n`, the target loss changes by about `<grad J, Delta> + <Delta, H_J Delta> / 2`. Its Shapley
value for an example is `<grad J + H_J Delta / 2, Delta_n>`, and the values of a batch sum up to the
change. That is exact for SGD; for another optimizer, whose update is no sum, `Delta_n` is the
derivative of the update along the example's part of the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.control.adjoint import directional_derivatives, float_leaves, update_pullback
from lmops_jax.control.dynamics import apply_update, gradient, init_state
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.training_run import TrainingRun, prepare


class InRunValues(NamedTuple):
  """What a run tells of its data.

  Attributes:
    values: `[T,B] float32`, by how much each example of a step lowered the target loss.
    target_losses: `[T]`, J before each step.
    params: those behind the last step.
  """

  values: jax.Array
  target_losses: jax.Array
  params: Any


def in_run_values(
  run: TrainingRun, target_loss: Callable, *, second_order: bool = False,
  micro_batch_size: int | None = None,
) -> InRunValues:
  """Runs the training and values the examples of every step.

  Args:
    run: its optimizer is to be differentiable; weights are parts of the examples' gradients.
    target_loss: `params -> []`, J; with `second_order` twice differentiable, which
      `mean_target_loss` is without `batch_size` and `device_rows`.
    second_order: add the term with the Hessian of J.
    micro_batch_size: examples of a step that are differentiated at once, a divisor of B; None: all.

  Raises:
    ValueError: as `solve` does.
  """
  options = SolveOptions(micro_batch_size=micro_batch_size)
  run, target_loss, _, options = prepare(run, target_loss, None, options)
  return _values(run, target_loss, second_order, options.micro_batch_size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _values(run: TrainingRun, target_loss, second_order, micro_batch_size):
  update, losses = run.optimizer.update, run.example_losses
  in_parts = {"micro_batch_size": micro_batch_size, "device_rows": run.device_rows}

  def at(state, t):
    batch, weights = run.batch_at(t), run.weights[t]
    grads = gradient(losses, state.params, batch, weights, **in_parts)
    new = apply_update(update, state, grads)
    loss, cotangent = jax.value_and_grad(target_loss)(state.params)
    if second_order:
      change = jax.tree.map(jnp.subtract, new.params, state.params)
      curved = jax.jvp(jax.grad(target_loss), (state.params,), (change,))[1]
      cotangent = jax.tree.map(lambda g, h: g + h / 2, cotangent, curved)
    unread = [jnp.zeros_like(x) for x in float_leaves(state.opt_state)]
    of_gradient = update_pullback(update, state, grads, cotangent, unread)[2]
    slopes, _ = directional_derivatives(losses, state.params, of_gradient, batch, **in_parts)
    return new, (-weights * slopes, loss)

  start = init_state(run.optimizer.init, update, run.params)
  state, (values, target_losses) = jax.lax.scan(at, start, jnp.arange(run.num_steps))
  return InRunValues(values, target_losses, state.params)
