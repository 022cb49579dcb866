"""The UNet that tells the noise in latents at a step of diffusion, guided by vectors of a text.

Residual blocks and transformers on the way down and up, with every state of the way down joined to
the way up at its size (arXiv:2112.10752; arXiv:2105.05233 for the blocks). A transformer's block is
self-attention over positions, attention to the text, and a gated MLP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import NonEmpty, Size, component
from lmops_jax.models.attention import ATTENTION_KINDS
from lmops_jax.models.attention_scores import heads_first, softmax_attention
from lmops_jax.models.config import DTYPES, REMAT_POLICIES, TransformerConfig
from lmops_jax.models.diffusion.convolutions import doubled
from lmops_jax.models.diffusion.parts import (
  Convolution,
  GroupNorm,
  ResidualBlock,
  check_groups,
  products,
  projection,
  rematerialised,
)
from lmops_jax.models.layers import MLP, Attention, Projection, norm
from lmops_jax.models.layers import Sequence as Row

RESIDUAL_EPS, TRANSFORMER_EPS = 1e-5, 1e-6  # of group norms
_LONGEST_PERIOD = 1e4


@component(module="models")
@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Shape of a `UNet`; the defaults are Stable Diffusion 1's.

  Attributes:
    in_channels, out_channels: channels of the latents (or pixels) and of the prediction.
    sample_size: side of the latents that it is trained on; others may be given.
    widths: channels of each level; each level but the last halves the size.
    with_attention: for each level, whether transformers follow its residual blocks. There is one in
      the middle in any case.
    num_heads: for each level, heads of its transformers; the middle has the last level's.
    num_residuals: residual blocks of a level on the way down; on the way up it is one more.
    num_blocks: blocks of a transformer.
    context_width: width of the text's vectors.
    tells_mean: add a product of the mean of the text's vectors to what tells the time, so that all
      residual blocks are told of the text at once; published models have none.
    norm_groups: groups of channels in a norm, a divisor of every width.
    linear_projections: the products around a transformer's blocks are matrices in published files
      (Stable Diffusion 2), not convolutions of 1 x 1. The function is the same.
    attention: one of `attention.ATTENTION_KINDS`, for self-attention of more positions than
      `attention_chunk`; shorter rows and attention to the text are "xla".
    attention_chunk: queries in a block, for "chunked".
    remat: what the backward pass recomputes in each block, one of `config.REMAT_POLICIES`.
    dtype: type of activations and products. Norms, softmax and the prediction are float32.
    param_dtype: type of parameters.

  Raises:
    ValueError: for values that do not make a model; it names the field.
  """

  in_channels: Size = 4
  out_channels: Size = 4
  sample_size: Size = 64
  widths: Annotated[Sequence[Size], NonEmpty] = (320, 640, 1280, 1280)
  with_attention: Sequence[bool] = (True, True, True, False)
  num_heads: Sequence[Size] = (8, 8, 8, 8)
  num_residuals: Size = 2
  num_blocks: Size = 1
  context_width: Size = 768
  tells_mean: bool = False
  norm_groups: Size = 32
  linear_projections: bool = False
  attention: Literal[ATTENTION_KINDS] = "chunked"
  attention_chunk: Size = 256
  remat: Literal[REMAT_POLICIES] = "none"
  dtype: Literal[DTYPES] = "float32"
  param_dtype: Literal[DTYPES] = "float32"

  def __post_init__(self):
    name = "models.UNetConfig"
    for field in ("widths", "with_attention", "num_heads"):
      values = tuple(getattr(self, field))
      object.__setattr__(self, field, values)  # gin and JSON give lists
      if len(values) != len(self.widths):
        raise ValueError(
          f"{name}.{field} has {len(values)} values for the {len(self.widths)} levels of widths; "
          "give one for each."
        )
    check_groups(name, self.widths, self.norm_groups)
    if self.widths[0] % 2:
      raise ValueError(
        f"{name}.widths begins with {self.widths[0]} and must begin with an even number: half of "
        "the numbers that tell the time are cosines."
      )
    for level, (width, heads) in enumerate(zip(self.widths, self.num_heads)):
      uses = self.with_attention[level] or level == len(self.widths) - 1
      if uses and width % heads:
        raise ValueError(
          f"{name}.widths[{level}]={width} is not a multiple of num_heads[{level}]={heads}; change "
          "one of them."
        )

  @property
  def time_width(self) -> int:
    """Width of the vectors that tell the time."""
    return 4 * self.widths[0]


class UNet(nn.Module):
  """Noise (or what a schedule predicts) in latents.

  Parameters: `time_in`, `time_out`, `mean_in` if asked for, `convolution_in`; for each level
  `down_<i>_residual_<j>`, `down_<i>_transformer_<j>` and `down_<i>_halving`; `middle_residual_0`,
  `middle_transformer`, `middle_residual_1`; for each level on the way up, the lowest being 0,
  `up_<i>_residual_<j>`, `up_<i>_transformer_<j>` and `up_<i>_doubling`; `norm_out`,
  `convolution_out`.
  """

  config: UNetConfig

  @nn.compact
  def __call__(self, latents: jax.Array, timesteps: jax.Array, context: jax.Array) -> jax.Array:
    """The prediction of each row of the batch.

    Args:
      latents: `[B,h,w,in_channels]`, of any height and width.
      timesteps: `[B]`, int32 or float32, of the steps 0 to 999 of diffusion.
      context: `[B,S,context_width]`, the text's vectors; all are seen.

    Returns:
      `[B,h,w,out_channels] float32`.

    Raises:
      ValueError: for inputs of other shapes.
    """
    c = self.config
    _check(c, latents, timesteps, context)
    dtype, last = jnp.dtype(c.dtype), len(c.widths) - 1
    residual, transformer = (rematerialised(m, c) for m in (ResidualBlock, SpatialTransformer))
    context = context.astype(dtype)
    time = sinusoids(timesteps, c.widths[0]).astype(dtype)
    time = projection(c, (c.widths[0],), c.time_width, (None, "mlp"), name="time_in")(time)
    time = projection(c, (c.time_width,), c.time_width, ("mlp", None), name="time_out")(
      nn.silu(time))
    if c.tells_mean:
      time += projection(c, (c.context_width,), c.time_width, (None, "mlp"), name="mean_in")(
        context.mean(axis=1))

    x = Convolution(c, c.widths[0], (None, "embed"), name="convolution_in")(latents.astype(dtype))
    passed = [x]
    for i, width in enumerate(c.widths):
      for j in range(c.num_residuals):
        x = residual(c, width, RESIDUAL_EPS, name=f"down_{i}_residual_{j}")(x, time)
        if c.with_attention[i]:
          x = transformer(c, c.num_heads[i], name=f"down_{i}_transformer_{j}")(x, context)
        passed.append(x)
      if i < last:
        x = Convolution(c, width, ("embed", None), stride=2, name=f"down_{i}_halving")(x)
        passed.append(x)

    x = residual(c, c.widths[-1], RESIDUAL_EPS, name="middle_residual_0")(x, time)
    x = transformer(c, c.num_heads[-1], name="middle_transformer")(x, context)
    x = residual(c, c.widths[-1], RESIDUAL_EPS, name="middle_residual_1")(x, time)

    for i, level in enumerate(reversed(range(len(c.widths)))):
      width = c.widths[level]
      for j in range(c.num_residuals + 1):
        x = jnp.concatenate([x, passed.pop()], axis=-1)
        x = residual(c, width, RESIDUAL_EPS, name=f"up_{i}_residual_{j}")(x, time)
        if c.with_attention[level]:
          x = transformer(c, c.num_heads[level], name=f"up_{i}_transformer_{j}")(x, context)
      if level:
        height, length = passed[-1].shape[1:3]  # an odd side was halved to the larger half
        doubling = (height, length) == (2 * x.shape[1], 2 * x.shape[2])
        if not doubling:
          x = doubled(x)[:, :height, :length]
        x = Convolution(
          c, width, ("embed", None), doubling=doubling, name=f"up_{i}_doubling")(x)
    x = nn.silu(GroupNorm(c, RESIDUAL_EPS, name="norm_out")(x))
    x = Convolution(c, c.out_channels, ("embed", None), name="convolution_out")(x)
    return x.astype(jnp.float32)


class SpatialTransformer(nn.Module):
  """Blocks over all positions of a picture, beside a straight path, `[B,h,w,C]` to same.

  Parameters: `norm`, `inside`, `block_<i>`, `outside`.
  """

  config: UNetConfig
  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """`context [B,S,context_width]` are the text's vectors."""
    c, width = self.config, x.shape[-1]
    trunk = products(c, width, self.num_heads, length=math.prod(x.shape[1:3]))
    y = GroupNorm(c, TRANSFORMER_EPS, name="norm")(x).reshape(x.shape[0], -1, width)
    y = projection(c, (width,), width, (None, "embed"), name="inside")(y)
    for i in range(c.num_blocks):
      y = TransformerBlock(trunk, c.context_width, name=f"block_{i}")(y, context)
    y = projection(c, (width,), width, ("embed", None), name="outside")(y)
    return x + y.reshape(x.shape)


class TransformerBlock(nn.Module):
  """Self-attention, attention to the text and an MLP, each behind a norm, `[B,N,D]` to same."""

  config: TransformerConfig
  context_width: int

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    c = self.config
    x = x + Attention(c, name="attention")(norm(c, "attention_norm")(x), Row())
    cross = CrossAttention(c, self.context_width, name="cross_attention")
    x = x + cross(norm(c, "cross_attention_norm")(x), context)
    return x + MLP(c, name="mlp")(norm(c, "mlp_norm")(x))


class CrossAttention(nn.Module):
  """Attention of `[B,N,D]` over vectors `[B,S,context_width]`, to `[B,N,D]`."""

  config: TransformerConfig
  context_width: int

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    c, heads = self.config, (self.config.num_heads, self.config.head_width)
    q = Projection(c, (c.width,), heads, ("embed", "heads", "head_dim"), name="query")(x)
    k, v = (
      Projection(c, (self.context_width,), heads, (None, "heads", "head_dim"), name=name)(context)
      for name in ("key", "value"))
    out = softmax_attention(*heads_first(q, k, v), True)
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    axes = ("heads", "head_dim", "embed")
    return Projection(c, heads, (c.width,), axes, c.out_bias, name="out")(out)


def sinusoids(timesteps: jax.Array, width: int) -> jax.Array:
  """`[B]` to `[B,width] float32`: cosines, then sines, of the time with falling frequencies."""
  half = width // 2
  frequencies = jnp.exp(-math.log(_LONGEST_PERIOD) / half * jnp.arange(half, dtype=jnp.float32))
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _check(c: UNetConfig, latents, timesteps, context) -> None:
  batch = latents.shape[0]
  if latents.ndim != 4 or latents.shape[3] != c.in_channels:
    raise ValueError(
      f"The latents are {list(latents.shape)} and models.UNetConfig wants [batch, height, width, "
      f"{c.in_channels}], channels last."
    )
  if timesteps.shape != (batch,):
    raise ValueError(
      f"The timesteps are {list(timesteps.shape)} for {batch} latents; give one for each."
    )
  if context.ndim != 3 or context.shape[::2] != (batch, c.context_width):
    raise ValueError(
      f"The context is {list(context.shape)} and models.UNetConfig wants [{batch}, length, "
      f"{c.context_width}]; take the states of the text encoder that it was trained with."
    )
