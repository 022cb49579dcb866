"""What the UNet and the autoencoder share: group norms, residual blocks, sizes.

Pictures are `[B,h,w,C]`. Statistics of norms are float32, whatever the computing type.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.convolutions import SIDE, convolved, doubled_convolved
from lmops_jax.models.layers import Projection, product_init
from lmops_jax.models.partitioning import constrain
from lmops_jax.models.products import remat_policy

_ACROSS = ("batch", None, None, None)


def check_groups(name: str, widths: Sequence[int], norm_groups: int) -> None:
  """Raises ValueError if a width has no such groups of channels; `name` is the configuration's."""
  for width in widths:
    if width % norm_groups:
      raise ValueError(
        f"{name}.widths has {width}, which is not a multiple of norm_groups={norm_groups}; change "
        "one of them."
      )


def products(config: Any, width: int, num_heads: int = 1, length: int = 0) -> TransformerConfig:
  """The configuration of the products, norms and attention that work on channels.

  Rows of at most `config.attention_chunk` positions have plain attention, whatever the kind: their
  scores are small, and fused kernels have no heads as wide as those of the lowest levels.

  Args:
    config: a `UNetConfig` or an `AutoencoderConfig`.
    width: channels.
    num_heads: heads of attention, a divisor of `width`.
    length: positions of a row.
  """
  is_long = length > config.attention_chunk
  return TransformerConfig(
    num_layers=1, width=width, num_heads=num_heads, mlp_width=4 * width, norm="layer",
    norm_eps=1e-5, positions="none", causal=False, activation="gelu", gated_mlp=True, mlp_bias=True,
    out_bias=True, initialization="fan_in", attention=config.attention if is_long else "xla",
    attention_chunk=config.attention_chunk, dtype=config.dtype, param_dtype=config.param_dtype,
  )


def rematerialised(module: type[nn.Module], config: Any) -> type[nn.Module]:
  """The module, whose backward pass recomputes what `config.remat` says."""
  if config.remat == "none":
    return module
  return nn.remat(module, policy=remat_policy(config.remat))


class GroupNorm(nn.Module):
  """Channels in groups, each less its mean and over its deviation (arXiv:1803.08494)."""

  config: Any
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, channels = self.config, x.shape[-1]
    scale, bias = (
      self.param(
        name, nn.with_logical_partitioning(init, (None,)), (channels,), jnp.dtype(c.param_dtype))
      for name, init in (
        ("scale", nn.initializers.ones_init()), ("bias", nn.initializers.zeros_init())))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide.reshape(x.shape[0], -1, c.norm_groups, channels // c.norm_groups)
    mean = functools.partial(jnp.mean, axis=(1, 3), keepdims=True)
    centred = wide - mean(wide)
    normed = centred * jax.lax.rsqrt(mean(jnp.square(centred)) + self.eps)
    return (normed.reshape(x.shape) * scale + bias).astype(c.dtype)


class Convolution(nn.Module):
  """A convolution with a kernel of 3 x 3 and a bias, `[B,h,w,C]` to `[B,h',w',width]`.

  Attributes:
    config: a `UNetConfig` or an `AutoencoderConfig`.
    width: channels that come out.
    axes: logical axes of the channels that go in and come out.
    stride: 1, or 2 for half the size.
    padding: zeros above and left, and below and right.
    doubling: convolve the picture with each pixel four times, at twice its size.
  """

  config: Any
  width: int
  axes: tuple[str | None, str | None]
  stride: int = 1
  padding: tuple[int, int] = (1, 1)
  doubling: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, channels = self.config, x.shape[-1]
    init = product_init(products(c, channels), SIDE * SIDE * channels, SIDE * SIDE * self.width)
    kernel = self.param(
      "kernel", nn.with_logical_partitioning(init, (None, None, *self.axes)),
      (SIDE, SIDE, channels, self.width), jnp.dtype(c.param_dtype))
    bias = self.param(
      "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
      (self.width,), jnp.dtype(c.param_dtype))
    if self.doubling:
      out = doubled_convolved(x, kernel)
    else:
      out = convolved(x, kernel.astype(c.dtype), self.stride, self.padding)
    return out + bias.astype(c.dtype)


class ResidualBlock(nn.Module):
  """Two convolutions beside a straight path, `[B,h,w,C]` to `[B,h,w,width]`.

  Attributes:
    config: a `UNetConfig` or an `AutoencoderConfig`.
    width: channels that come out.
    eps: that of the norms.

  Parameters: `norm_1`, `convolution_1`, `time` if there is one, `norm_2`, `convolution_2`, and
  `shortcut` if the channels change.
  """

  config: Any
  width: int
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """`time [B,T]` is a vector of the step of diffusion, or None."""
    c, channels = self.config, x.shape[-1]
    x = constrain(x, _ACROSS)
    y = nn.silu(GroupNorm(c, self.eps, name="norm_1")(x))
    y = Convolution(c, self.width, ("embed", "mlp"), name="convolution_1")(y)
    if time is not None:
      inputs = (time.shape[-1],)
      time = projection(c, inputs, self.width, (None, "mlp"), name="time")(nn.silu(time))
      y = y + time[:, None, None]
    y = nn.silu(GroupNorm(c, self.eps, name="norm_2")(y))
    y = Convolution(c, self.width, ("mlp", "embed"), name="convolution_2")(y)
    if channels != self.width:
      x = projection(c, (channels,), self.width, (None, "embed"), name="shortcut")(x)
    return constrain(x + y, _ACROSS)


def projection(
  config: Any, inputs: tuple[int, ...], width: int, axes: tuple[str | None, ...],
  name: str | None = None,
) -> Projection:
  """A product with a bias from the last axes to `width` numbers; also a convolution of 1 x 1."""
  return Projection(products(config, width), inputs, (width,), axes, True, name=name)
