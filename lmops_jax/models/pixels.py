"""Pixels as vision towers take them: bytes to floats with CLIP's mean and deviation, on the device.

Pictures travel to the device as uint8, a quarter of the bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: jax.Array, mean=CLIP_MEAN, std=CLIP_STD) -> jax.Array:
  """Pixels as a share of 255, less the mean, over the deviation.

  Args:
    images: `[...,height,width,3] uint8`.
    mean, std: of each channel, red, green, blue.

  Returns:
    `[...,height,width,3] float32`.

  Raises:
    ValueError: for pixels that are not uint8, which may have been normalised before, or for another
      number of channels.
  """
  if images.dtype != jnp.uint8 or images.shape[-1:] != (3,):
    raise ValueError(
      f"The images are {images.dtype} {list(images.shape)} and normalise wants uint8 "
      "[..., height, width, 3]; give pixels as data.ImageSettings makes them."
    )
  scale = 1 / (255 * np.asarray(std, np.float64))
  shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
  x = images.astype(jnp.float32)
  # x * scale - shift loses up to 5e-7 by rounding. The leading bits of both are exact together.
  (coarse, fine), (shift_coarse, shift_fine) = map(_split, (scale, shift))
  return (x * coarse - shift_coarse) + (x * fine - shift_fine)


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """float32 multiples of 2^-16 and what is left of float64 values."""
  coarse = np.round(values * 2**16) / 2**16
  return coarse.astype(np.float32), (values - coarse).astype(np.float32)
