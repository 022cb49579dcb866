"""Pixels as vision towers take them, on the device: another size, then CLIP's mean and deviation.

Pictures travel to the device as uint8, a quarter of the bytes; those that a model has drawn there
are resized there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.crops import cropped

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resized_middle(images: jax.Array, size: int) -> jax.Array:
  """The middle square of pictures whose shorter side becomes `size`, as CLIP was trained.

  The filter is Pillow's: bicubic (a = -0.5) with antialiasing, first along rows, then along
  columns, 8-bit numbers in between. Shrinking differs from Pillow's by one level at most, in up to
  3 % of the values (ties of rounding); growing by two, in up to 2 %.

  Args:
    images: `[...,height,width,3] uint8`.
    size: side of the square in pixels.

  Returns:
    `[...,size,size,3] uint8`.

  Raises:
    ValueError: for pixels that are not uint8, or another number of channels.
  """
  _check(images, "resized_middle")
  height, width = images.shape[-3:-1]
  new_width, new_height, left, top = cropped(width, height, size)
  x = _stretched(_stretched(images, -2, new_width), -3, new_height)
  return x[..., top : top + size, left : left + size, :]


def _stretched(images: jax.Array, axis: int, size: int) -> jax.Array:
  """uint8 with one axis of another length, rounded and clipped as Pillow does between passes."""
  if images.shape[axis] == size:
    return images
  shape = list(images.shape)
  shape[axis] = size
  x = jax.image.resize(
    images.astype(jnp.float32), shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
  return jnp.clip(jnp.floor(x + 0.5), 0, 255).astype(jnp.uint8)


def normalise(images: jax.Array, mean=CLIP_MEAN, std=CLIP_STD) -> jax.Array:
  """Pixels as a share of 255, less the mean, over the deviation.

  Args:
    images: `[...,height,width,3] uint8`.
    mean, std: mean and deviation of each channel: red, green, blue.

  Returns:
    `[...,height,width,3] float32`.

  Raises:
    ValueError: for pixels that are not uint8, which may have been normalised before, or for another
      number of channels.
  """
  _check(images, "normalise")
  scale = 1 / (255 * np.asarray(std, np.float64))
  shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
  x = images.astype(jnp.float32)
  # Plain x * scale - shift loses up to 5e-7 by rounding; with the leading bits of both it is exact.
  (coarse, fine), (shift_coarse, shift_fine) = map(_split, (scale, shift))
  return (x * coarse - shift_coarse) + (x * fine - shift_fine)


def _check(images: jax.Array, name: str) -> None:
  if images.dtype != jnp.uint8 or images.shape[-1:] != (3,):
    raise ValueError(
      f"The images are {images.dtype} {list(images.shape)} and {name} wants uint8 "
      "[..., height, width, 3]; give pixels as data.ImageSettings makes them."
    )


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """float64 values as float32 multiples of 2^-16 and the float32 remainders."""
  coarse = np.round(values * 2**16) / 2**16
  return coarse.astype(np.float32), (values - coarse).astype(np.float32)
