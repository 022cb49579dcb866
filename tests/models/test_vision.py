"""The vision tower: sizes of images, bytes, norms, and stacks of layers that can be told apart."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.stacks import with_top
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.models.vision import (
  CLIP_MEAN,
  CLIP_STD,
  VisionConfig,
  VisionTransformer,
  cubic_matrix,
  patches,
)

TRUNK = TransformerConfig(
  num_layers=3, width=16, num_heads=2, mlp_width=24, max_length=40, norm="layer", gated_mlp=False,
  activation="quick_gelu", positions="none", causal=False, final_norm=False)
CONFIG = VisionConfig(TRUNK, image_size=12, patch_size=3)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


@functools.cache
def _params():
  made = nn.unbox(jax.jit(VisionTransformer(CONFIG).init)(jax.random.key(0), IMAGES)["params"])
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), made)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _apply(params, images, config=CONFIG, method=None):
  return VisionTransformer(config).apply({"params": params}, images, method=method)


def test_patches_times_a_matrix_are_a_convolution():
  kernel = _params()["patch_embedding"]
  want = jax.lax.conv_general_dilated(
    IMAGES, kernel, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision="highest")
  got = patches(jnp.asarray(IMAGES), 3) @ kernel.reshape(-1, 16)
  np.testing.assert_allclose(got, want.reshape(2, 16, 16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new, old", [(7, 4), (4, 16), (1, 3), (24, 16), (5, 1)])
def test_cubic_interpolation_equals_its_definition(new, old):
  """Keys' kernel, sample by sample, on a row whose edges are repeated."""
  samples = np.random.default_rng(2).normal(size=old)

  def kernel(x, a=-0.75):
    x = abs(x)
    if x <= 1:
      return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

  want = []
  for i in range(new):
    at = (i + 0.5) * old / new - 0.5
    want.append(sum(
      samples[min(max(j, 0), old - 1)] * kernel(at - j) for j in range(-4, old + 5)))
  matrix = cubic_matrix(new, old)
  assert matrix.shape == (new, old) and matrix.dtype == np.float32
  np.testing.assert_allclose(matrix @ samples, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)


def test_a_grid_of_the_same_size_is_the_identity():
  np.testing.assert_array_equal(cubic_matrix(6, 6), np.eye(6))


def test_positions_of_other_sizes_are_interpolated_along_rows_and_columns():
  """A grid of 8 x 2 patches from one of 4 x 4."""
  config = dataclasses.replace(CONFIG, any_size=True)
  table = np.asarray(_params()["position_embedding"])
  grids = table[1:].reshape(4, 4, 16).transpose(2, 0, 1)
  grids = cubic_matrix(8, 4) @ grids @ cubic_matrix(2, 4).T
  positions = VisionTransformer(config).apply(
    {"params": _params()}, (2, 24, 6, 3), method=lambda module, shape: module._positions(shape))
  np.testing.assert_array_equal(positions[0], table[0])
  np.testing.assert_allclose(
    positions[1:], grids.transpose(1, 2, 0).reshape(16, 16), rtol=1e-5, atol=1e-5)


def test_other_sizes_give_a_vector_for_each_patch():
  config = dataclasses.replace(CONFIG, any_size=True)
  np.testing.assert_array_equal(_apply(_params(), IMAGES, config), _apply(_params(), IMAGES))
  wide = np.random.default_rng(3).normal(size=(1, 9, 18, 3)).astype(np.float32)
  assert _apply(_params(), wide, config).shape == (1, 1 + 3 * 6, 16)


def test_bytes_are_normalised_as_clip_does():
  pixels = np.random.default_rng(4).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
  floats = (pixels.astype(np.float64) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
  np.testing.assert_allclose(
    _apply(_params(), pixels), _apply(_params(), floats.astype(np.float32)), rtol=1e-4, atol=1e-5)
  other = dataclasses.replace(CONFIG, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1 / 255,) * 3)
  np.testing.assert_allclose(
    _apply(_params(), pixels, other), _apply(_params(), pixels.astype(np.float32)), rtol=1e-4,
    atol=1e-4)


def test_features_are_all_vectors_normed():
  vectors, features = _apply(_params(), IMAGES), _apply(_params(), IMAGES, method="features")
  np.testing.assert_allclose(
    features[:, 0], _apply(_params(), vectors, method="pooled"), rtol=1e-6, atol=1e-6)
  centred = vectors - vectors.mean(-1, keepdims=True)
  norm = _params()["post_norm"]
  want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"]
  np.testing.assert_allclose(features, want + norm["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_layers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stack_of_the_last_layers_changes_nothing_but_the_tree(top_layers):
  config = dataclasses.replace(CONFIG, top_layers=top_layers)
  params = with_top(_params(), top_layers)
  fresh = jax.eval_shape(VisionTransformer(config).init, jax.random.key(0), IMAGES)["params"]
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes == jax.tree.map(jnp.shape, nn.unbox(fresh))
  np.testing.assert_allclose(
    _apply(params, IMAGES, config), _apply(_params(), IMAGES), rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="top_layers=1 must be from 1 to"):
    with_top(params, 1)


@pytest.mark.parametrize("changes, message", [
  ({"top_layers": 3}, "top_layers=3 must be below the trunk's num_layers=3"),
  ({"patch_size": 5}, "image_size=12 must be a multiple of patch_size=5"),
  ({"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std"),
])
def test_impossible_towers_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("any_size, shape, message", [
  (False, (2, 15, 12, 3), r"images are \[15, 12, 3\] and .* wants \[12, 12, 3\]; resize them"),
  (True, (2, 12, 12, 4), r"images are \[12, 12, 4\]"),
  (True, (12, 12, 3), r"images are \[12, 3\] and"),
  (True, (2, 12, 13, 3), r"images are \[12, 13, 3\] and their sides must be multiples of .*=3"),
  (True, (2, 0, 12, 3), "sides must be multiples"),
  (True, (2, 60, 60, 3), "401 positions and models.TransformerConfig.max_length is 40"),
])
def test_images_of_wrong_sizes_are_refused(any_size, shape, message):
  model = VisionTransformer(dataclasses.replace(CONFIG, any_size=any_size))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.apply({"params": _params()}, jnp.zeros(shape)))
