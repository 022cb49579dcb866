"""DataRater: the metagradient of a model that rates data, through a window of training.

arXiv 2505.17895, algorithm 1. A step of the inner training weighs the examples of its batch by the
softmax over the batch of their ratings; the rater descends the target loss behind a window of T
such steps. Ratings act through the weights alone, so the metagradient is the exact gradient in the
weights, which the reverse pass of `pmp` gives for any optimizer, pulled back through softmax and
rater:

  dJ(params_T)/drater = sum_t sum_n dJ/dweights[t, n] * dweights[t, n]/drater.

Nothing is differentiated twice but the inner losses, along one direction a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import State, gradient, init_state
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.pmp import run_passes_and_go_on
from lmops_jax.control.problem import Problem
from lmops_jax.control.training_run import TrainingRun, prepare, shardings_of
from lmops_jax.mesh.micro_batches import sum_over_micro_batches


class Window(NamedTuple):
  """What a window of training tells a rater.

  Attributes:
    grads: of the target loss behind the window, like the rater's parameters.
    state: the inner training's, behind the window.
    target_loss: `[]`, J behind the window.
    weights: `[T,B]`, the softmax of the ratings.
  """

  grads: Any
  state: State
  target_loss: jax.Array
  weights: jax.Array


def rated_window(
  ratings: Callable, rater_params: Any, run: TrainingRun, target_loss: Callable, *,
  opt_state: Any = None, micro_batch_size: int | None = None,
) -> Window:
  """Trains through a window, and differentiates the target loss behind it in the rater.

  Args:
    ratings: `(rater_params, batch) -> [B]`.
    run: the window, without weights; a batch holds what losses and ratings read.
    target_loss: `params -> []`, J.
    opt_state: the optimizer's before the window; None: a new one.
    micro_batch_size: examples of a step that are differentiated at once, a divisor of B; None: all.

  Raises:
    ValueError: as `solve` does, and for a run with weights.
  """
  if run.weights is not None:
    raise ValueError(
      "the weights of a rated window are those that its ratings give; set run.weights to None.")
  options = SolveOptions(objective="terminal", micro_batch_size=micro_batch_size)
  shardings = shardings_of(run.params)
  run, target_loss, _, options = prepare(run, target_loss, None, options)
  return _rated_window(
    as_pytree(ratings), rater_params, run, opt_state, target_loss, options, shardings)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _rated_window(ratings, rater_params, run, opt_state, target_loss, options, shardings):
  num_steps, batch_size = run.weights.shape
  in_parts = {"micro_batch_size": options.micro_batch_size, "device_rows": run.device_rows}

  def rated(t):
    def part(whole, batch, _):
      ratings, params = whole
      return (), ratings(params, batch)
    return sum_over_micro_batches(
      part, (ratings, rater_params), run.batch_at(t), jnp.ones(batch_size),
      options.micro_batch_size, run.device_rows)[1]

  weights, pull = jax.vjp(
    jax.nn.softmax, jax.lax.map(rated, jnp.arange(num_steps)).astype(run.weights.dtype))
  problem = Problem.of(
    dataclasses.replace(run, weights=weights), target_loss, None, options, shardings)
  state = init_state(*run.optimizer, run.params)
  if opt_state is not None:
    state = State(state.params, opt_state)
  result, state = run_passes_and_go_on(problem, state)
  of_ratings, = pull(-result.scores)

  def add(total, t):  # the ratings are computed again, so that one batch's are held at a time
    grads = gradient(ratings, rater_params, run.batch_at(t), of_ratings[t], **in_parts)
    return jax.tree.map(jnp.add, total, grads), None

  grads, _ = jax.lax.scan(
    add, jax.tree.map(jnp.zeros_like, rater_params), jnp.arange(num_steps))
  return Window(grads, state, result.target_losses[-1], weights)
