"""The autoencoder between pictures and the latents that diffusion works on (arXiv:2112.10752).

It is a variational one: a picture becomes means and log-variances of its latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import NonEmpty, Positive, Size, component
from lmops_jax.models.attention import ATTENTION_KINDS
from lmops_jax.models.config import DTYPES, REMAT_POLICIES
from lmops_jax.models.diffusion.parts import (
  Convolution,
  GroupNorm,
  ResidualBlock,
  check_groups,
  products,
  projection,
  rematerialised,
)
from lmops_jax.models.layers import Attention
from lmops_jax.models.layers import Sequence as Row

NORM_EPS = 1e-6
_LOG_VARIANCES = (-30.0, 20.0)  # others are clipped


@component(module="models")
@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """Shape of an `Autoencoder`; the defaults are Stable Diffusion's.

  Attributes:
    image_channels: channels of the pictures.
    latent_channels: channels of the latents.
    sample_size: side of the pictures that it is trained on; others may be given.
    widths: channels of each level; each level but the last halves the size.
    num_residuals: residual blocks of a level of the encoder; in the decoder it is one more.
    norm_groups: groups of channels in a norm, a divisor of every width.
    scaling_factor: factor of the latents that diffusion sees, which makes their deviation about 1;
      `encode` and `decode` do not apply it, see `to_latents` and `from_latents`.
    attention: one of `attention.ATTENTION_KINDS`, for more positions than `attention_chunk`.
    attention_chunk: queries in a block, for "chunked".
    remat: what the backward pass recomputes in each block, one of `config.REMAT_POLICIES`.
    dtype: type of activations and products. Norms, softmax and results are float32.
    param_dtype: type of parameters.

  Raises:
    ValueError: for values that do not make a model; it names the field.
  """

  image_channels: Size = 3
  latent_channels: Size = 4
  sample_size: Size = 512
  widths: Annotated[Sequence[Size], NonEmpty] = (128, 256, 512, 512)
  num_residuals: Size = 2
  norm_groups: Size = 32
  scaling_factor: Positive = 0.18215
  attention: Literal[ATTENTION_KINDS] = "chunked"
  attention_chunk: Size = 256
  remat: Literal[REMAT_POLICIES] = "none"
  dtype: Literal[DTYPES] = "float32"
  param_dtype: Literal[DTYPES] = "float32"

  def __post_init__(self):
    object.__setattr__(self, "widths", tuple(self.widths))  # gin and JSON give lists
    check_groups("models.AutoencoderConfig", self.widths, self.norm_groups)

  @property
  def reduction(self) -> int:
    """Pixels of a side of a picture for one of its latents."""
    return 2 ** (len(self.widths) - 1)


class Autoencoder(nn.Module):
  """Pictures to latents, and back.

  Parameters: `encoder`, `moments`, `latents` (products after the encoder and before the decoder)
  and `decoder`. Each of `encode` and `decode` needs only its own two.
  """

  config: AutoencoderConfig

  def setup(self):
    c = self.config
    moments = 2 * c.latent_channels
    self.encoder = Encoder(c)
    self.moments = projection(c, (moments,), moments, (None, None))
    self.latents = projection(c, (c.latent_channels,), c.latent_channels, (None, None))
    self.decoder = Decoder(c)

  def __call__(self, images: jax.Array) -> jax.Array:
    """The pictures that the means of `[B,H,W,image_channels]` pictures decode to."""
    return self.decode(self.encode(images)[0])

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means and log-variances of the latents, unscaled.

    Args:
      images: `[B,H,W,image_channels] float32`, from -1 to 1; sides are multiples of
        `config.reduction`.

    Returns:
      Twice `[B,h,w,latent_channels] float32`; log-variances are clipped to -30 to 20.

    Raises:
      ValueError: for images of another shape.
    """
    c = self.config
    if images.ndim != 4 or images.shape[3] != c.image_channels or any(
      not side or side % c.reduction for side in images.shape[1:3]
    ):
      raise ValueError(
        f"The images are {list(images.shape)} and models.AutoencoderConfig wants [batch, height, "
        f"width, {c.image_channels}] with sides that are multiples of {c.reduction}; resize them."
      )
    moments = self.moments(self.encoder(images.astype(c.dtype)))
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCES)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Pictures of unscaled latents.

    Args:
      latents: `[B,h,w,latent_channels]`.

    Returns:
      `[B,H,W,image_channels] float32`, about -1 to 1, not clipped.

    Raises:
      ValueError: for latents of another shape.
    """
    c = self.config
    if latents.ndim != 4 or latents.shape[3] != c.latent_channels:
      raise ValueError(
        f"The latents are {list(latents.shape)} and models.AutoencoderConfig wants [batch, height, "
        f"width, {c.latent_channels}], channels last."
      )
    return self.decoder(self.latents(latents.astype(c.dtype))).astype(jnp.float32)


class Encoder(nn.Module):
  """`[B,H,W,image_channels]` to `[B,h,w,2 latent_channels]`."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    residual = rematerialised(ResidualBlock, c)
    x = Convolution(c, c.widths[0], (None, "embed"), name="convolution_in")(x)
    for i, width in enumerate(c.widths):
      for j in range(c.num_residuals):
        x = residual(c, width, NORM_EPS, name=f"down_{i}_residual_{j}")(x)
      if i < len(c.widths) - 1:
        x = Convolution(
          c, width, ("embed", None), stride=2, padding=(0, 1), name=f"down_{i}_halving")(x)
    x = _middle(c, x)
    x = nn.silu(GroupNorm(c, NORM_EPS, name="norm_out")(x))
    return Convolution(c, 2 * c.latent_channels, ("embed", None), name="convolution_out")(x)


class Decoder(nn.Module):
  """`[B,h,w,latent_channels]` to `[B,H,W,image_channels]`."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    residual, last = rematerialised(ResidualBlock, c), len(c.widths) - 1
    x = Convolution(c, c.widths[-1], (None, "embed"), name="convolution_in")(x)
    x = _middle(c, x)
    for i, width in enumerate(reversed(c.widths)):
      for j in range(c.num_residuals + 1):
        x = residual(c, width, NORM_EPS, name=f"up_{i}_residual_{j}")(x)
      if i < last:
        x = Convolution(c, width, ("embed", None), doubling=True, name=f"up_{i}_doubling")(x)
    x = nn.silu(GroupNorm(c, NORM_EPS, name="norm_out")(x))
    return Convolution(c, c.image_channels, ("embed", None), name="convolution_out")(x)


def _middle(c: AutoencoderConfig, x: jax.Array) -> jax.Array:
  """The lowest level's residual blocks with attention between them, parts of the calling module."""
  residual, attention = (rematerialised(m, c) for m in (ResidualBlock, SpatialAttention))
  x = residual(c, c.widths[-1], NORM_EPS, name="middle_residual_0")(x)
  x = attention(c, name="middle_attention")(x)
  return residual(c, c.widths[-1], NORM_EPS, name="middle_residual_1")(x)


class SpatialAttention(nn.Module):
  """Attention with one head over all positions, beside a straight path, `[B,h,w,C]` to same."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, width = self.config, x.shape[-1]
    heads = products(c, width, length=math.prod(x.shape[1:3]))
    heads = dataclasses.replace(heads, qkv_bias=True)
    y = GroupNorm(c, NORM_EPS, name="norm")(x).reshape(x.shape[0], -1, width)
    return x + Attention(heads, name="attention")(y, Row()).reshape(x.shape)


def to_latents(
  config: AutoencoderConfig, mean: jax.Array, log_variance: jax.Array | None = None,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Latents as diffusion sees them: scaled means, or scaled samples.

  Args:
    config: gives the scale.
    mean, log_variance: what `Autoencoder.encode` gives.
    noise: like `mean`, standard normal, for a sample; None takes the mean.
  """
  if noise is not None:
    mean = mean + jnp.exp(0.5 * log_variance) * noise
  return mean * config.scaling_factor


def from_latents(config: AutoencoderConfig, latents: jax.Array) -> jax.Array:
  """What `Autoencoder.decode` wants, of latents as diffusion sees them."""
  return latents / config.scaling_factor


def to_images(pixels: jax.Array) -> jax.Array:
  """`round(255 clip(x / 2 + 1/2, 0, 1))` of what `Autoencoder.decode` gives, uint8."""
  return jnp.round(255 * jnp.clip(pixels / 2 + 0.5, 0, 1)).astype(jnp.uint8)
