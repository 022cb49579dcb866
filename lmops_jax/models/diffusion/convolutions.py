"""Convolutions with kernels of 3 x 3, and of doubled pictures.

Pictures are `[B,h,w,C]`, kernels `[3,3,C,D]`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lmops_jax.models.partitioning import platform_in_use

SIDE = 3  # of a kernel
_AROUND = (1, 1)  # zeros on both sides, which keep the size
_LEAST_CHANNELS, _LEAST_POSITIONS = 128, 256  # for `minimal`, below which copies outweigh products


def convolved(
  x: jax.Array, kernel: jax.Array, stride: int = 1, padding: tuple[int, int] = _AROUND
) -> jax.Array:
  """The picture convolved with the kernel, in the way that is fast on the platform in use.

  Args:
    x: `[B,h,w,C]`.
    kernel: `[3,3,C,D]`, of the same type.
    stride: 1, or 2 for half the size.
    padding: zeros above and left, and below and right.
  """
  if stride == 1 and padding == _AROUND and _pays(x, kernel):
    return minimal(x, kernel)
  return _direct(x, kernel, stride, padding)


def _pays(x, kernel) -> bool:
  positions, channels = x.size // x.shape[-1], min(kernel.shape[2:])
  is_large = channels >= _LEAST_CHANNELS and positions >= _LEAST_POSITIONS
  return is_large and x.dtype == jnp.float32 and platform_in_use() == "cpu"


def minimal(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`convolved` with stride 1 and zeros around, in 4 products a position and channel instead of 9.

  Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin & Gray, arXiv:1509.09308, section 4.1): tiles
  of 4 x 4 pixels that overlap by two, and the kernel, become sums and differences, whose products
  give 2 x 2 pixels. Large convolutions take 0.5 to 0.8 of the time on a CPU, and in float32 the
  result is at most twice as far from the exact one.
  """
  b, height, width, channels = x.shape
  down, across = -(-height // 2), -(-width // 2)  # tiles
  x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
  x = x.reshape(b, down + 1, 2, across + 1, 2, channels)
  tiles = [tile for rows in _of_pixels(x[:, :, 0], x[:, :, 1], axis=1)
           for tile in _of_pixels(rows[:, :, :, 0], rows[:, :, :, 1], axis=2)]
  pixels = jnp.stack(tiles).reshape(16, -1, channels)
  weights = _of_kernel(_of_kernel(kernel, 0), 1).reshape(16, channels, -1)
  # Behind a barrier, since XLA would write the sums anew for each product.
  found = jnp.einsum("pnc,pcd->pnd", jax.lax.optimization_barrier(pixels), weights)
  found = found.reshape(4, 4, b, down, across, -1)
  rows = [jnp.stack(_of_products(row), axis=3) for row in _of_products(found)]
  out = jnp.stack(rows, axis=2).reshape(b, 2 * down, 2 * across, -1)
  return out[:, :height, :width]


def _of_pixels(even, odd, axis):
  """The four sums of a tile's pixels in one direction, given every second pixel of it."""
  num = even.shape[axis] - 1
  take = functools.partial(jax.lax.slice_in_dim, axis=axis)
  first, second = (take(x, 0, num) for x in (even, odd))
  third, fourth = (take(x, 1, num + 1) for x in (even, odd))
  return first - third, second + third, third - second, second - fourth


def _of_kernel(kernel, axis):
  first, middle, last = jnp.moveaxis(kernel, axis, 0)
  both = (first + last) / 2
  return jnp.stack([first, both + middle / 2, both - middle / 2, last], axis)


def _of_products(products):
  """The two pixels of a tile in one direction."""
  first, second, third, fourth = products
  return first + second + third, second - third - fourth


def doubled(x: jax.Array) -> jax.Array:
  """`[B,h,w,C]` to `[B,2h,2w,C]`, each pixel four times."""
  b, height, width, channels = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, height, 2, width, 2, channels))
  return x.reshape(b, 2 * height, 2 * width, channels)


def doubled_convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`doubled(x)` convolved with the kernel, zeros around, `[B,2h,2w,D]`.

  In each direction three entries of the kernel lie on two pixels of `x`, so that four kernels of
  2 x 2 do, one for each place within a pixel: 16 products for each of `x` instead of 36.
  """
  b, height, width, channels = x.shape
  wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  both = _on_two_pixels(_on_two_pixels(wide, 0), 2)  # [2,2,2,2,C,D]: place and pixel, down, across
  both = both.transpose(1, 3, 4, 0, 2, 5).reshape(2, 2, channels, -1)
  out = _direct(x, both.astype(x.dtype), 1, _AROUND)
  out = out.reshape(b, height + 1, width + 1, 2, 2, -1)
  rows = [jnp.stack([out[:, i : i + height, j : j + width, i, j] for j in range(2)], axis=3)
          for i in range(2)]
  return jnp.stack(rows, axis=2).reshape(b, 2 * height, 2 * width, -1)


def _on_two_pixels(kernel, axis):
  """Three entries of an axis as `[2 places, 2 pixels]`; the pixel before it is a place's first."""
  first, middle, last = jnp.moveaxis(kernel, axis, 0)
  places = jnp.stack([jnp.stack([first, middle + last]), jnp.stack([first + middle, last])])
  return jnp.moveaxis(places, (0, 1), (axis, axis + 1))


def _direct(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride,) * 2, (padding,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
