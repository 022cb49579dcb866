"""Operations of the networks of Stable Diffusion against XLA's count and published figures."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion import convolutions
from lmops_jax.models.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from lmops_jax.models.diffusion.unet import UNet, UNetConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.sizing import diffusion, hlo

SMALL = UNetConfig(
  widths=(16, 32), with_attention=(False, True), num_heads=(1, 4), num_residuals=1, num_blocks=2,
  context_width=24, norm_groups=8, attention="xla")


def _products(module, *shapes, method=None):
  """What XLA counts of a program that is traced but neither compiled nor run."""
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  params = unboxed(jax.eval_shape(module.init, jax.random.key(0), *shapes))
  lowered = jax.jit(lambda params, *given: module.apply(params, *given, method=method)).lower(
    params, *shapes)
  return hlo.count(lowered.as_text("hlo")).product_flops


@pytest.mark.parametrize("sides, tells_mean", [((8, 12), False), ((7, 5), False), ((7, 5), True)])
def test_small_unet_is_what_xla_counts(sides, tells_mean):
  config = dataclasses.replace(SMALL, tells_mean=tells_mean)
  counted = _products(UNet(config), (1, *sides, 4), (1,), (1, 5, 24))
  assert diffusion.unet_flops(config, *sides, 5, published=False) == counted


def test_small_autoencoder_is_what_xla_counts():
  config = AutoencoderConfig(
    widths=(8, 16, 24), norm_groups=4, num_residuals=1, latent_channels=3, attention="xla")
  _autoencoder_is_what_xla_counts(config, 5, 3)


def _autoencoder_is_what_xla_counts(config, height, width):
  images = (1, height * config.reduction, width * config.reduction, config.image_channels)
  encoded = _products(Autoencoder(config), images, method="encode")
  assert diffusion.encoder_flops(config, height, width, published=False) == encoded
  both = _products(Autoencoder(config), images)
  assert diffusion.decoder_flops(config, height, width, published=False) == both - encoded


CLIP = TransformerConfig(
  num_layers=12, width=768, num_heads=12, mlp_width=3072, vocab_size=49408, max_length=77,
  positions="learned", gated_mlp=False)


def test_a_published_picture_takes_what_is_known():
  """34.8e12 operations for 20 guided steps, of which CLIP's look at the picture is 0.162e12."""
  draw = lambda *args, **kwargs: diffusion.drawing_flops(  # noqa: E731
    CLIP, UNetConfig(), AutoencoderConfig(), 64, 64, *args, **kwargs)
  assert abs(draw(20) / 34.64e12 - 1) < 1e-3
  assert draw(20) - draw(20, guided=False) == 20 * diffusion.unet_flops(UNetConfig(), 64, 64, 77)


def test_published_networks_are_as_large_as_published():
  assert abs(diffusion.unet_flops(UNetConfig(), 64, 64, 77) / 0.803e12 - 1) < 1e-3
  assert abs(diffusion.decoder_flops(AutoencoderConfig(), 64, 64) / 2.515e12 - 1) < 1e-3


@pytest.mark.slow
def test_published_networks_are_what_xla_counts(monkeypatch):
  monkeypatch.setattr(convolutions, "platform_in_use", lambda: "tpu")  # a CPU's are fewer
  config = UNetConfig(attention="xla")
  counted = _products(UNet(config), (1, 64, 64, 4), (1,), (1, 77, 768))
  assert diffusion.unet_flops(config, 64, 64, 77, published=False) == counted
  _autoencoder_is_what_xla_counts(AutoencoderConfig(attention="xla"), 64, 64)
