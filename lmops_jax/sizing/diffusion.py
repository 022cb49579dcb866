"""Arithmetic of Stable Diffusion for one picture, analytic.

Each matrix is applied once at every position of its level, each kernel of 3 x 3 with all its nine
entries. Published figures count so. What is computed is less, `published=False`: XLA leaves out
products with the zeros around a picture, and doubled pictures are not written out
(`models.diffusion.convolutions`, which on a CPU takes still fewer). Norms and activations are not
counted.
"""

from __future__ import annotations

import math

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion import convolutions, parts
from lmops_jax.models.diffusion.autoencoder import AutoencoderConfig
from lmops_jax.models.diffusion.unet import UNetConfig
from lmops_jax.sizing import flops

Sides = tuple[int, int]


def drawing_flops(
  text: TransformerConfig, unet: UNetConfig, autoencoder: AutoencoderConfig | None, height: int,
  width: int, num_evaluations: int, *, guided: bool = True, published: bool = True,
) -> float:
  """Operations of drawing one picture from a text.

  Args:
    autoencoder: None for a UNet of pixels.
    height, width, published: see `unet_flops`.
    num_evaluations: of the UNet, see `decoding.diffusion.plans.Plan.num_evaluations`.
    guided: whether each is of two rows; the negative text is encoded once for many pictures and
      does not count.
  """
  length = text.max_length
  reading = length * flops.forward_flops_per_token(text, length, unembedding=False)
  step = (1 + guided) * unet_flops(unet, height, width, length, published=published)
  decoding = 0.0
  if autoencoder is not None:
    decoding = decoder_flops(autoencoder, height, width, published=published)
  return reading + num_evaluations * step + decoding


def unet_flops(
  config: UNetConfig, height: int, width: int, length: int, *, published: bool = True
) -> float:
  """Operations of the prediction for one picture; guidance takes two.

  Args:
    config: the UNet's.
    height, width: sides of the latents.
    length: vectors of the text.
    published: whether to count as published figures do, or what is computed.
  """
  c, sizes = config, _levels(height, width, len(config.widths))
  time, first = c.time_width, c.widths[0]

  def block(level: int, inputs: int, outputs: int) -> float:
    sides = sizes[level]
    total = _residual(sides, inputs, outputs, published) + 2.0 * time * outputs
    if c.with_attention[level]:
      total += _transformer(c, math.prod(sides), outputs, length)
    return total

  total = 2.0 * time * (first + time + c.tells_mean * c.context_width)
  total += _convolution(sizes[0], c.in_channels, first, published)
  channels, passed = first, [first]
  for level, new in enumerate(c.widths):
    for _ in range(c.num_residuals):
      total += block(level, channels, new)
      channels = new
      passed.append(new)
    if level < len(c.widths) - 1:
      total += _convolution(sizes[level], new, new, published, stride=2)
      passed.append(new)
  total += 2 * (_residual(sizes[-1], channels, channels, published) + 2.0 * time * channels)
  total += _transformer(c, math.prod(sizes[-1]), channels, length)
  for level in reversed(range(len(c.widths))):
    new = c.widths[level]
    for _ in range(c.num_residuals + 1):
      total += block(level, channels + passed.pop(), new)
      channels = new
    if level:
      total += _doubling(sizes[level], sizes[level - 1], new, published)
  return total + _convolution(sizes[0], channels, c.out_channels, published)


def decoder_flops(
  config: AutoencoderConfig, height: int, width: int, *, published: bool = True
) -> float:
  """Operations of decoding one picture from latents of these sides; see `unet_flops`."""
  c, lowest = config, len(config.widths) - 1
  sizes = _levels(height * c.reduction, width * c.reduction, lowest + 1)
  channels = c.widths[-1]
  total = 2.0 * math.prod(sizes[lowest]) * c.latent_channels**2
  total += _convolution(sizes[lowest], c.latent_channels, channels, published)
  total += _middle(sizes[lowest], channels, published)
  for level in reversed(range(lowest + 1)):
    for _ in range(c.num_residuals + 1):
      total += _residual(sizes[level], channels, c.widths[level], published)
      channels = c.widths[level]
    if level:
      total += _doubling(sizes[level], sizes[level - 1], channels, published)
  return total + _convolution(sizes[0], channels, c.image_channels, published)


def encoder_flops(
  config: AutoencoderConfig, height: int, width: int, *, published: bool = True
) -> float:
  """Operations of encoding one picture to latents of these sides; see `unet_flops`."""
  c, lowest, moments = config, len(config.widths) - 1, 2 * config.latent_channels
  sizes = _levels(height * c.reduction, width * c.reduction, lowest + 1)
  channels = c.widths[0]
  total = _convolution(sizes[0], c.image_channels, channels, published)
  for level, new in enumerate(c.widths):
    for _ in range(c.num_residuals):
      total += _residual(sizes[level], channels, new, published)
      channels = new
    if level < lowest:
      total += _convolution(sizes[level], new, new, published, stride=2)
  total += _middle(sizes[lowest], channels, published)
  total += _convolution(sizes[lowest], channels, moments, published)
  return total + 2.0 * math.prod(sizes[lowest]) * moments**2


def _levels(height: int, width: int, num: int) -> list[Sides]:
  """Sides at each level; an odd one is halved to the larger half."""
  return [(-(-height // 2**level), -(-width // 2**level)) for level in range(num)]


def _convolution(
  sides: Sides, inputs: int, outputs: int, published: bool, stride: int = 1
) -> float:
  """`sides` are those of what goes in."""
  taps = math.prod(_taps(side, stride, published) for side in sides)
  return 2.0 * inputs * outputs * taps


def _doubling(sides: Sides, doubled: Sides, width: int, published: bool) -> float:
  """From `sides` to twice these, or one less."""
  if published or doubled != tuple(2 * side for side in sides):
    return _convolution(doubled, width, width, published)
  return 2.0 * 4 * width**2 * math.prod(2 * side for side in sides)  # two entries in each direction


def _taps(side: int, stride: int, published: bool) -> int:
  """Pairs of a position that comes out and an entry of the kernel, along one side."""
  positions = -(-side // stride)
  outside = 2 if stride == 1 or side % 2 else 1  # both ends, or the only one that is reached
  return convolutions.SIDE * positions - (0 if published else outside)


def _residual(sides: Sides, inputs: int, outputs: int, published: bool) -> float:
  """A residual block, but for what it makes of the time."""
  total = _convolution(sides, inputs, outputs, published)
  total += _convolution(sides, outputs, outputs, published)
  if inputs != outputs:
    total += 2.0 * math.prod(sides) * inputs * outputs
  return total


def _middle(sides: Sides, width: int, published: bool) -> float:
  positions = math.prod(sides)
  attention = positions * (8.0 * width**2 + 4.0 * positions * width)
  return 2 * _residual(sides, width, width, published) + attention


def _transformer(c: UNetConfig, positions: int, width: int, length: int) -> float:
  own = positions * flops.forward_flops_per_token(
    parts.products(c, width), positions, unembedding=False)
  queries_and_out = 4.0 * positions * width**2
  keys_and_values = 4.0 * length * width * c.context_width
  cross = queries_and_out + keys_and_values + 4.0 * positions * length * width
  around = 4.0 * positions * width**2
  return around + c.num_blocks * (own + cross)
