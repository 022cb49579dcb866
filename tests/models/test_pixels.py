"""Bytes to floats with CLIP's constants, against float64; other sizes, against Pillow."""

import jax
import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import images
from lmops_jax.models.pixels import normalise, resized_middle


def test_normalised_pixels_have_clips_mean_and_deviation():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
  share = levels.astype(np.float64) / 255
  want = (share - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
  for function in (normalise, jax.jit(normalise)):
    got = function(levels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1.2e-7, rtol=0)
  np.testing.assert_allclose(got[0, 0], [-1.7922625, -1.7520971, -1.4802198], rtol=1e-6)
  for wrong in (levels.astype(np.float32), levels[..., :1]):
    with pytest.raises(ValueError, match="normalise wants uint8"):
      normalise(wrong)


def painted(kind, height, width):
  if kind == "noise":
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  y, x = np.mgrid[:height, :width]
  if kind == "edge":  # beside which the filter overshoots both ends of the range
    return np.where((x > width // 3) ^ (y > height // 3), 255, 0)[..., None].repeat(3, 2).astype(
      np.uint8)
  return np.stack(
    [127 + 120 * np.sin(x / 23 + y / 31), 127 + 127 * np.cos(x / 50), y * 255 / height], -1
  ).astype(np.uint8)


@pytest.mark.parametrize("height, width, size, levels", [
  (512, 512, 224, 1), (350, 513, 224, 1), (224, 301, 224, 0), (64, 48, 56, 2)])
def test_resized_pictures_are_pillows(height, width, size, levels):
  kinds = ("noise", "edge", "smooth")
  pictures = np.stack([painted(kind, height, width) for kind in kinds])
  want = np.stack([images.crop(Image.fromarray(x), size) for x in pictures]).astype(int)
  got = jax.jit(resized_middle, static_argnums=1)(pictures, size)
  assert got.shape == (3, size, size, 3) and got.dtype == np.uint8
  apart = np.abs(np.asarray(got, int) - want)
  assert apart.max() <= levels and np.mean(apart > 0) < 0.03
  assert want[1].min() == 0 and want[1].max() == 255


def test_resizing_wants_bytes():
  with pytest.raises(ValueError, match="resized_middle wants uint8"):
    resized_middle(np.zeros((8, 8, 3), np.float32), 4)
