"""Sampling of a diffusion model as a plan that is made on the host and one loop on the device.

Every deterministic sampler here is a linear multistep method: the next sample is a weighted sum of
a sample, of what the network says now and of what it said in earlier steps. The weights depend on
the times alone. So a plan is their table, made in float64, and one `lax.scan` follows any plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.diffusion.noise import NoiseSchedule, clean_and_noise

Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Plan(NamedTuple):
  """N evaluations of a network, each followed by a step.

  Attributes:
    prediction: what the network says, one of `models.diffusion.noise.PREDICTIONS`.
    remembers: whether the weights are those of predicted pictures ("clean") or noises ("noise").
    timesteps: `[N] int32`, the times that the network is told.
    alphas, sigmas: `[N] float64`, of the samples that it sees.
    goes_back: `[N] bool`, whether the step starts from the sample that the step before started
      from, which it then takes anew, and not from the sample that the network sees. What the
      network says is then not remembered.
    sample_weights: `[N] float64`, of the sample that the step starts from.
    weights: `[N,K] float64`, of what the network says now, and of the K - 1 latest remembered
      predictions, the newest first; 0 of those that are not there yet.
  """

  prediction: str
  remembers: Literal["clean", "noise"]
  timesteps: np.ndarray
  alphas: np.ndarray
  sigmas: np.ndarray
  goes_back: np.ndarray
  sample_weights: np.ndarray
  weights: np.ndarray

  @property
  def num_evaluations(self) -> int:
    """N."""
    return len(self.timesteps)


class Sampler(Protocol):
  """What makes plans; its fields are settings."""

  def plan(self, schedule: NoiseSchedule) -> Plan:
    """The plan for models with this schedule.

    Raises:
      ValueError: for a number of steps that the schedule has no times for.
    """


def follow(plan: Plan, predict: Predict, x: jax.Array) -> jax.Array:
  """The sample at a plan's end.

  Args:
    plan: of a `Sampler`.
    predict: `(samples [B,...], times [B] int32) -> [B,...]`, the network.
    x: `[B,...]` noise, float32 (or float64), in which all arithmetic but the network's is done.
  """
  body = lambda state, row: (_step(plan, predict, state, row), None)  # noqa: E731
  return jax.lax.scan(body, _start(plan, x), _rows(plan, x.dtype))[0].x


def trajectory(plan: Plan, predict: Predict, x: jax.Array) -> jax.Array:
  """As `follow`, the samples after each step, `[N,B,...]`."""

  def body(state, row):
    state = _step(plan, predict, state, row)
    return state, state.x

  return jax.lax.scan(body, _start(plan, x), _rows(plan, x.dtype))[1]


class _State(NamedTuple):
  """Between two steps.

  Attributes:
    x: the sample `[B,...]`. before: what the step before started from.
    remembered: `[K-1,B,...]` predictions, the newest first.
  """

  x: jax.Array
  before: jax.Array
  remembered: jax.Array


class _Row(NamedTuple):
  """A row of a plan on the device."""

  timestep: jax.Array
  alpha: jax.Array
  sigma: jax.Array
  goes_back: jax.Array
  sample_weight: jax.Array
  weights: jax.Array


def _start(plan: Plan, x: jax.Array) -> _State:
  # The weights of what is not remembered yet are 0, so any finite values do.
  return _State(x, x, jnp.broadcast_to(x, (plan.weights.shape[1] - 1, *x.shape)))


def _rows(plan: Plan, dtype) -> _Row:
  of = lambda array: jnp.asarray(array, dtype)  # noqa: E731
  return _Row(
    jnp.asarray(plan.timesteps, jnp.int32), of(plan.alphas), of(plan.sigmas),
    jnp.asarray(plan.goes_back), of(plan.sample_weights), of(plan.weights))


def _step(plan: Plan, predict: Predict, state: _State, row: _Row) -> _State:
  times = jnp.broadcast_to(row.timestep, state.x.shape[:1])
  output = predict(state.x, times).astype(state.x.dtype)
  clean, noise = clean_and_noise(plan.prediction, state.x, output, row.alpha, row.sigma)
  said = clean if plan.remembers == "clean" else noise
  start = jnp.where(row.goes_back, state.before, state.x)
  known = jnp.concatenate([said[None], state.remembered])
  x = row.sample_weight * start + jnp.tensordot(
    row.weights, known, axes=1, precision=jax.lax.Precision.HIGHEST)
  remembered = jnp.where(row.goes_back, state.remembered, known[:-1])
  return _State(x, start, remembered)
