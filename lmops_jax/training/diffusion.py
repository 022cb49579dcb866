"""Losses of diffusion models: of a network that tells noise, and of the autoencoder below it.

Both are for `learner.supervised(keyed=True)`: what is drawn for an example is a function of its own
key, so it depends neither on the micro-batches nor on the mesh. Make one object a run; a learner
compiles once for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.diffusion import noise as noise_lib
from lmops_jax.models.diffusion.noise import NoiseSchedule


@dataclasses.dataclass(frozen=True, eq=False)
class DenoisingLosses:
  """The mean squared error of what a network says of noised pictures, at random times (DDPM,
  arXiv:2006.11239, equation 14).

  Attributes:
    predict: `(params, noised [B,...], times [B] int32, condition [B,...]) -> [B,...]`: the network,
      and whatever turns the condition into what it reads.
    schedule: the noise, and what the network is to say.
    drop: share of examples that lose their condition, so that the network can be guided later
      (arXiv:2207.12598, algorithm 1).
    empty: what such an example has instead, like one row of `condition`, such as the tokens of the
      empty text; needed where `drop` is not 0.

  Raises:
    ValueError: for a share outside of 0 .. 1, or dropping without something instead.
  """

  predict: Callable[..., jax.Array]
  schedule: NoiseSchedule
  drop: float = 0.0
  empty: np.ndarray | None = None

  def __post_init__(self):
    if not 0 <= self.drop < 1:
      raise ValueError(
        f"drop={self.drop} is the share of examples without condition; take one from 0 to below 1.")
    if self.drop and self.empty is None:
      raise ValueError(
        f"drop={self.drop} takes the condition from examples and there is no empty one; give what "
        "the empty text is."
      )

  def __call__(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Losses `[B] float32`.

    Args:
      params: the network's.
      batch: `clean [B,...] float32`, latents or pixels; `condition [B,...]`; `key [B]`.
    """
    clean = jnp.asarray(batch["clean"], jnp.float32)
    drawn = jax.vmap(self._drawn, (None, 0))(clean.shape[1:], batch["key"])
    times, noise, dropped = drawn
    alpha, sigma = (
      _beside(jnp.asarray(of_times, jnp.float32)[times], clean)
      for of_times in (self.schedule.alphas, self.schedule.sigmas))
    condition = jnp.asarray(batch["condition"])
    if self.drop:
      empty = jnp.asarray(self.empty, condition.dtype)
      condition = jnp.where(_beside(dropped, condition), empty, condition)
    noised = noise_lib.noised(clean, noise, alpha, sigma)
    said = self.predict(params, noised, times, condition).astype(jnp.float32)
    wanted = noise_lib.target(self.schedule.prediction, clean, noise, alpha, sigma)
    return _mean(jnp.square(said - wanted))

  def _drawn(self, shape: tuple[int, ...], key: jax.Array):
    """An example's time, its noise, and whether it loses its condition."""
    of_time, of_noise, of_drop = jax.random.split(key, 3)
    return (jax.random.randint(of_time, (), 0, self.schedule.num_times),
            jax.random.normal(of_noise, shape, jnp.float32),
            jax.random.bernoulli(of_drop, self.drop))


@dataclasses.dataclass(frozen=True, eq=False)
class AutoencoderLosses:
  """Squared error of a picture through its latents, and what the latents tell beyond a standard
  normal (the variational bound of arXiv:1312.6114, equation 10), both per number of the picture.

  Published autoencoders are also trained against a network that tells their pictures from real
  ones, and by distances between features of another one; neither is done here.

  Attributes:
    encode: `(params, images [B,H,W,3]) -> (mean, log_variance) [B,h,w,C]`.
    decode: `(params, latents [B,h,w,C]) -> [B,H,W,3]`.
    kl_weight: weight of the second part; latent diffusion takes 1e-6 of the divergence's sum over
      all latents beside an error that is summed too (arXiv:2112.10752, appendix G).

  Raises:
    ValueError: for a negative weight.
  """

  encode: Callable[..., tuple[jax.Array, jax.Array]]
  decode: Callable[..., jax.Array]
  kl_weight: float = 1e-6

  def __post_init__(self):
    if not self.kl_weight >= 0:
      raise ValueError(f"kl_weight={self.kl_weight} must be 0 or more.")

  def __call__(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Losses `[B] float32`.

    Args:
      params: of both networks.
      batch: `images [B,H,W,3] uint8`; `key [B]`.

    Raises:
      ValueError: for images that are not uint8.
    """
    images = batch["images"]
    if images.dtype != jnp.uint8:
      raise ValueError(f"The images are {images.dtype}; give pixels as uint8, from 0 to 255.")
    images = images.astype(jnp.float32) / 127.5 - 1
    mean, log_variance = self.encode(params, images)
    draw = lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32)  # noqa: E731
    latents = mean + jnp.exp(log_variance / 2) * jax.vmap(draw)(batch["key"])
    error = _mean(jnp.square(self.decode(params, latents) - images))
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    each = divergence.reshape(len(images), -1).sum(axis=1) / (images.size // len(images))
    return error + self.kl_weight * each


def _beside(of_rows: jax.Array, array: jax.Array) -> jax.Array:
  """`[B]` with axes of 1, to broadcast against `[B,...]`."""
  return of_rows.reshape(-1, *(1,) * (array.ndim - 1))


def _mean(of_numbers: jax.Array) -> jax.Array:
  """Means `[B]` over all axes but the first."""
  return of_numbers.reshape(len(of_numbers), -1).mean(axis=1)
