"""Ways to convolve against the plain one, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.diffusion import convolutions
from lmops_jax.models.diffusion.convolutions import convolved, doubled, doubled_convolved, minimal

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 5, 6))


def _plain(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_doubled_repeats_every_pixel():
  x = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
  np.testing.assert_array_equal(doubled(jnp.asarray(x)), x.repeat(2, axis=1).repeat(2, axis=2))


def test_a_doubled_picture_is_convolved_without_being_written():
  x = RNG.normal(size=(2, 3, 4, 5))
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      doubled_convolved(x, KERNEL), _plain(doubled(x), KERNEL), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sides", [(4, 6), (3, 5)])
def test_minimal_filtering_is_the_convolution(sides):
  x = RNG.normal(size=(2, *sides, 5))

  def of(function):
    return lambda *args: jnp.sin(function(*args)).sum()

  with jax.enable_x64(True):
    np.testing.assert_allclose(minimal(x, KERNEL), _plain(x, KERNEL), rtol=0, atol=1e-12)
    got, want = (jax.grad(of(f), (0, 1))(x, KERNEL) for f in (minimal, _plain))
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def test_large_convolutions_are_minimal_on_a_cpu_alone(monkeypatch):
  x = jnp.asarray(RNG.normal(size=(1, 16, 16, 128)), jnp.float32)
  kernel = jnp.asarray(RNG.normal(size=(3, 3, 128, 128)), jnp.float32)
  large = convolved(x, kernel)
  np.testing.assert_array_equal(large, minimal(x, kernel))
  exact = _plain(x.astype(jnp.float32), kernel)
  np.testing.assert_allclose(large, exact, rtol=0, atol=1e-5 * float(jnp.abs(exact).max()))
  small = convolved(x[:, :8], kernel)
  np.testing.assert_array_equal(small, _plain(x[:, :8], kernel))
  monkeypatch.setattr(convolutions, "platform_in_use", lambda: "tpu")
  np.testing.assert_array_equal(convolved(x, kernel), _plain(x, kernel))
