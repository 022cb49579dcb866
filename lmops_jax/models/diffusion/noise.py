"""The noise of diffusion models: how much of it there is at each time, and what networks predict.

At time t a picture x0 has become `x_t = alpha_t x0 + sigma_t noise` (DDPM, arXiv:2006.11239, in the
notation of DPM-Solver, arXiv:2206.00927), where alpha_t^2 + sigma_t^2 = 1. Half the logarithm of
the signal-to-noise ratio, `lambda_t = log(alpha_t / sigma_t)`, falls with t.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from lmops_jax.config.setting_types import Part, PositiveInt, component

BETA_KINDS = ("scaled_linear", "linear")
PREDICTIONS = ("epsilon", "v_prediction")


@component(module="models")
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """The variances beta_t that noise adds at each of the training times. The defaults are those of
  Stable Diffusion 1.

  Attributes:
    beta_start, beta_end: the first and the last of them.
    kind: "linear" has equal steps between them, "scaled_linear" between their square roots.
    num_times: T, times are 0 .. T - 1.
    prediction: what a network says of a noised picture: its noise ("epsilon"), or
      `alpha noise - sigma x0` ("v_prediction", arXiv:2202.00512, section 4).

  Raises:
    ValueError: if the variances fall.
  """

  beta_start: Part = 0.00085
  beta_end: Part = 0.012
  kind: Literal[BETA_KINDS] = "scaled_linear"
  num_times: PositiveInt = 1000
  prediction: Literal[PREDICTIONS] = "epsilon"

  def __post_init__(self):
    if self.beta_end < self.beta_start:
      raise ValueError(
        f"models.NoiseSchedule.beta_end={self.beta_end} is less than beta_start={self.beta_start}; "
        "noise grows with time, so give the larger one as the end."
      )

  @functools.cached_property
  def signal(self) -> np.ndarray:
    """`[T] float64`, alpha_t^2: the product of 1 - beta up to each time.

    The factors have float32's precision, as where published models are run; lambda would else
    differ by 1e-5.
    """
    power = 1 if self.kind == "linear" else 2
    betas = _evenly(self.beta_start ** (1 / power), self.beta_end ** (1 / power), self.num_times)
    return np.cumprod(1 - betas**power, dtype=np.float64)

  @property
  def alphas(self) -> np.ndarray:
    """`[T] float64`, the share of the picture in x_t."""
    return np.sqrt(self.signal)

  @property
  def sigmas(self) -> np.ndarray:
    """`[T] float64`, the deviation of the noise in x_t."""
    return np.sqrt(1 - self.signal)

  @property
  def lambdas(self) -> np.ndarray:
    """`[T] float64`, log(alpha_t / sigma_t)."""
    return np.log(self.alphas) - np.log(self.sigmas)


def _evenly(start: float, end: float, num: int) -> np.ndarray:
  """`[num] float32` from one number to another as PyTorch steps: from both ends to the middle."""
  start, end = np.float32(start), np.float32(end)
  step = np.float64((end - start) / np.float32(max(num - 1, 1)))
  places = np.arange(num)
  rising, falling = start + step * places, end - step * (num - 1 - places)
  return np.where(places < num // 2, rising, falling).astype(np.float32)


def noised(clean: jax.Array, noise: jax.Array, alpha, sigma) -> jax.Array:
  """x_t of a picture and its noise; `alpha` and `sigma` broadcast against them."""
  return alpha * clean + sigma * noise


def target(prediction: str, clean: jax.Array, noise: jax.Array, alpha, sigma) -> jax.Array:
  """What a network is to say of `noised(clean, noise, alpha, sigma)`.

  Args:
    prediction: one of `PREDICTIONS`.
  """
  return noise if prediction == "epsilon" else alpha * noise - sigma * clean


def clean_and_noise(
  prediction: str, x: jax.Array, output: jax.Array, alpha, sigma
) -> tuple[jax.Array, jax.Array]:
  """The picture x0 and the noise in `x` according to what a network says of it.

  Args:
    prediction: one of `PREDICTIONS`.
    x: a noised picture. output: what the network says.
  """
  if prediction == "epsilon":
    return (x - sigma * output) / alpha, output
  return alpha * x - sigma * output, sigma * x + alpha * output
