"""Samplers of diffusion models: DPM-Solver++(2M), DDIM and PLMS, all without added noise.

As the published pipelines of Stable Diffusion 1 run them, down to the choice of times.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from lmops_jax.config.setting_types import Count, component
from lmops_jax.decoding.diffusion.plans import Plan
from lmops_jax.models.diffusion.noise import NoiseSchedule

FINALS = ("index0", "zero")
_FEW_STEPS = 15  # with fewer, the last step of DPM-Solver++ is of order 1
_Steps = Annotated[int, Ge(1), Le(1000)]


@component(module="decoding")
@dataclasses.dataclass(frozen=True)
class DpmSolver:
  """DPM-Solver++(2M), a multistep method for the predicted picture (arXiv:2211.01095, algorithm 2).

  Attributes:
    num_steps: steps, each with one evaluation of the network.
    final: where the last step ends: at the noise of time 0 ("index0", as the solver's authors have
      it), or without any ("zero", as diffusers has it by default).
    order: 2, or 1, which is DDIM on these times.
  """

  num_steps: _Steps = 20
  final: Literal[FINALS] = "index0"
  order: Literal[1, 2] = 2

  def plan(self, schedule: NoiseSchedule) -> Plan:
    """See `Sampler`. Times are equally far apart, from the last one to 0."""
    # Halves are rounded as published only if the numbers are made from 0 on.
    rising = np.linspace(0, schedule.num_times - 1, self.num_steps + 1).round()
    times = rising[::-1].astype(np.int32)
    if len(set(times.tolist())) < len(times):
      raise ValueError(
        f"decoding.DpmSolver.num_steps={self.num_steps} is more than there are times between the "
        f"{schedule.num_times} of models.NoiseSchedule.num_times; take at most "
        f"{schedule.num_times - 1}."
      )
    alphas, sigmas = schedule.alphas[times], schedule.sigmas[times]
    if self.final == "zero":
      alphas[-1], sigmas[-1] = 1.0, 0.0
    ends_low = self.final == "zero" or self.num_steps < _FEW_STEPS
    return solver_plan(times[:-1], alphas, sigmas, self.order, ends_low, schedule.prediction)


def solver_plan(
  timesteps: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray, order: int, ends_low: bool,
  prediction: str = "epsilon",
) -> Plan:
  """DPM-Solver++ of order 1 or 2 (2M) over given noise.

  Args:
    timesteps: `[N]`, what the network is told.
    alphas, sigmas: `[N+1] float64`, before each step and at the end, where sigma may be 0 if
      `ends_low`.
    order: 1 or 2; the first step is of order 1.
    ends_low: take the last step with order 1.
    prediction: what the network says.
  """
  num = len(timesteps)
  ratios = sigmas[1:] / sigmas[:-1]
  gains = alphas[1:] - ratios * alphas[:-1]  # alpha_t (1 - exp(-h)), h the step in lambda
  extrapolated = np.zeros(num)  # h / (2 h of the step before)
  if order == 2:
    high = slice(1, num - 1 if ends_low else num)
    lambdas = np.log(alphas[:num]) - np.log(sigmas[:num])
    lambdas = np.append(lambdas, np.log(alphas[num] / sigmas[num]) if sigmas[num] else np.nan)
    steps = np.diff(lambdas)
    extrapolated[high] = (steps[1:] / (2 * steps[:-1]))[: high.stop - 1]
  weights = gains[:, None] * np.stack([1 + extrapolated, -extrapolated], axis=1)
  return Plan(
    prediction, "clean", np.asarray(timesteps), alphas[:-1], sigmas[:-1], np.zeros(num, bool),
    ratios, weights[:, :order])


@component(module="decoding")
@dataclasses.dataclass(frozen=True)
class Ddim:
  """DDIM without noise, eta = 0 (arXiv:2010.02502, equation 12).

  Attributes:
    num_steps: steps, each with one evaluation of the network.
    offset: added to the times, which are multiples of one number.
  """

  num_steps: _Steps = 50
  offset: Count = 1

  def plan(self, schedule: NoiseSchedule) -> Plan:
    """See `Sampler`. The last step ends at the noise of time 0."""
    times, stride = _leading_times("Ddim", self.num_steps, self.offset, schedule)
    starts, ends = schedule.signal[times], _signal_at(schedule, times - stride)
    ones = np.ones((len(times), 1))
    return _noise_plan(schedule, times, np.zeros(len(times), bool), starts, ends, ones)


@component(module="decoding")
@dataclasses.dataclass(frozen=True)
class Plms:
  """PLMS, the pseudo linear multistep method of PNDM (arXiv:2202.09778, equation 12), begun without
  Runge-Kutta steps: the first step is taken twice, so the network is evaluated once more.

  A network that says v is read as noise at once, where diffusers adds up several v before.

  Attributes:
    num_steps: steps.
    offset: added to the times, which are multiples of one number.
  """

  num_steps: _Steps = 50
  offset: Count = 1

  def plan(self, schedule: NoiseSchedule) -> Plan:
    """See `Sampler`. The last step ends at the noise of time 0."""
    times, stride = _leading_times("Plms", self.num_steps, self.offset, schedule)
    twice = np.insert(times, 1, times[1]) if len(times) > 1 else times
    begins = np.insert(times, 1, times[0]) if len(times) > 1 else times
    starts, ends = schedule.signal[begins], _signal_at(schedule, begins - stride)
    mixes = np.zeros((len(twice), 4))
    first = ([1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0],
             [23 / 12, -16 / 12, 5 / 12, 0])
    mixes[:4] = first[: len(twice)]
    mixes[4:] = np.array([55, -59, 37, -9]) / 24
    return _noise_plan(schedule, twice, np.arange(len(twice)) == 1, starts, ends, mixes)


def _leading_times(
  name: str, num_steps: int, offset: int, schedule: NoiseSchedule
) -> tuple[np.ndarray, int]:
  """Multiples of one number and an offset, the latest first, and that number."""
  stride = schedule.num_times // num_steps
  last = (num_steps - 1) * stride + offset
  if not stride or last >= schedule.num_times:
    raise ValueError(
      f"decoding.{name} with num_steps={num_steps} and offset={offset} asks for the time {last}, "
      f"and models.NoiseSchedule.num_times={schedule.num_times} ends at {schedule.num_times - 1}; "
      "take fewer steps, or another offset."
    )
  return np.arange(num_steps, dtype=np.int32)[::-1] * stride + offset, stride


def _signal_at(schedule: NoiseSchedule, times: np.ndarray) -> np.ndarray:
  """alpha^2 at each time; before time 0 that of time 0."""
  return schedule.signal[np.maximum(times, 0)]


def _noise_plan(schedule, timesteps, goes_back, starts, ends, mixes) -> Plan:
  """Steps of DDIM with sums of predicted noises.

  Args:
    starts, ends: `[N]`, alpha^2 before and after each step. mixes: `[N,K]`, the sums' weights.
  """
  ratios = np.sqrt(ends / starts)
  gains = np.sqrt(1 - ends) - ratios * np.sqrt(1 - starts)
  return Plan(
    schedule.prediction, "noise", timesteps, schedule.alphas[timesteps],
    schedule.sigmas[timesteps], goes_back, ratios, gains[:, None] * mixes)
