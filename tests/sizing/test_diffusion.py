"""Operations of drawing pictures, against sums by hand and published counts."""

import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.autoencoder import AutoencoderConfig
from lmops_jax.models.diffusion.unet import UNetConfig
from lmops_jax.sizing.diffusion import decoder_flops, drawing_flops, unet_flops

CLIP = TransformerConfig(
  num_layers=12, width=768, num_heads=12, mlp_width=3072, vocab_size=49408, max_length=77,
  positions="learned", gated_mlp=False)


def convolved(side, inputs, outputs):
  """A kernel of 3 x 3 with zeros around: at an edge a third of it meets nothing."""
  return 2 * (3 * side - 2) ** 2 * inputs * outputs


def test_a_decoder_is_the_sum_of_its_products():
  """One level of 8 channels over 4 x 4: its convolutions and the attention in the middle."""
  config = AutoencoderConfig(widths=(8,), num_residuals=1, norm_groups=4)
  residuals = 4 * 2 * convolved(4, 8, 8)  # two in the middle, two on the level
  attention = 4 * 2 * 16 * 8 * 8 + 2 * 2 * 16 * 16 * 8
  want = (2 * 16 * 4 * 4 + convolved(4, 4, 8) + residuals + attention + convolved(4, 8, 3))
  assert decoder_flops(config, (4, 4)) == want


def test_guidance_doubles_the_unet_and_evaluations_count():
  unet = UNetConfig(widths=(8,), with_attention=(False,), num_heads=(2,), num_residuals=1,
                    context_width=16, norm_groups=4)
  autoencoder = AutoencoderConfig(widths=(8,), num_residuals=1, norm_groups=4)
  count = lambda *args, **kwargs: drawing_flops(CLIP, unet, autoencoder, (4, 4), *args, **kwargs)  # noqa: E731
  one = unet_flops(unet, (4, 4), 77)
  assert count(21) - count(20) == pytest.approx(2 * one)
  assert count(20) - count(20, guided=False) == pytest.approx(20 * one)


@pytest.mark.slow
def test_stable_diffusion_takes_what_is_known_of_it():
  """Independent counts, which take zeros around a picture for work: at most 4 % more."""
  unet, decoder = unet_flops(UNetConfig(), (64, 64)), decoder_flops(AutoencoderConfig(), (64, 64))
  total = drawing_flops(CLIP, UNetConfig(), AutoencoderConfig(), (64, 64), 20)
  known = (0.803, 2.515, 34.8 - 0.162)  # the last less reading the picture with CLIP
  for found, wanted in zip((unet, decoder, total), known):
    assert 0.96 * wanted < found / 1e12 < wanted
