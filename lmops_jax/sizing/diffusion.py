"""What drawing pictures with a latent diffusion model takes.

The text encoder's arithmetic is analytic, as in `flops`. The UNet and the autoencoder are many
convolutions of many sizes, so their products are counted in their own lowered programs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from lmops_jax.models.diffusion.unet import UNet, UNetConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.sizing import flops, hlo


def drawing_flops(
  text: TransformerConfig, unet: UNetConfig, autoencoder: AutoencoderConfig,
  latents: tuple[int, int], num_evaluations: int, *, guided: bool = True,
) -> float:
  """Operations of drawing a picture.

  Args:
    latents: height and width of its latents.
    num_evaluations: of the UNet, see `decoding.diffusion.plans.Plan.num_evaluations`.
    guided: whether each is of two rows; the negative text is encoded once a batch and not counted.
  """
  length = text.max_length
  return (
    length * flops.forward_flops_per_token(text, length, unembedding=False)
    + (1 + guided) * num_evaluations * unet_flops(unet, latents, length)
    + decoder_flops(autoencoder, latents))


@functools.lru_cache(maxsize=16)
def unet_flops(config: UNetConfig, latents: tuple[int, int], length: int = 77) -> float:
  """Operations of a UNet's forward pass for a row with a text of so many tokens."""
  inputs = (
    _shape(1, *latents, config.in_channels), _shape(1),
    _shape(1, length, config.context_width))
  return _forward_flops(UNet(_plain(config)), inputs, UNet.__call__)


@functools.lru_cache(maxsize=16)
def decoder_flops(config: AutoencoderConfig, latents: tuple[int, int]) -> float:
  """Operations of an autoencoder's decoder for a picture."""
  inputs = (_shape(1, *latents, config.latent_channels),)
  return _forward_flops(Autoencoder(_plain(config)), inputs, Autoencoder.decode)


def _plain(config):
  """The same function without the loops of chunked attention."""
  return dataclasses.replace(config, attention="xla")


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _forward_flops(module, inputs, method) -> float:
  init = functools.partial(module.init, method=method)
  params = unboxed(jax.eval_shape(init, jax.random.key(0), *inputs))
  lowered = jax.jit(functools.partial(module.apply, method=method)).lower(params, *inputs)
  return hlo.count(lowered.as_text("hlo")).product_flops
