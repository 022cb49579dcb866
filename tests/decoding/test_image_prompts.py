"""Prompts with pictures: vectors made once by contents, in batches, within a limit of bytes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.data.image_tokens import ImageTokens, lay_out
from lmops_jax.data.images import ImageSettings, as_png
from lmops_jax.data.multimodal import Picture
from lmops_jax.decoding.image_prompts import PictureEncoder, check_fits
from lmops_jax.models.connectors import ResamplerConfig
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.models.vision import VisionConfig

SLOTS, WIDTH, SIDE = 3, 8, 4
TRUNK = TransformerConfig(
  num_layers=1, width=8, num_heads=2, mlp_width=8, norm="layer", positions="none", causal=False,
  final_norm=False)
MODEL = DockedLM(DockedConfig(
  TransformerConfig(vocab_size=20, num_layers=1, width=WIDTH, num_heads=2, mlp_width=8),
  VisionConfig(TRUNK, image_size=SIDE, patch_size=2), ResamplerConfig(SLOTS, unit_scale=True)))
IDS = ImageTokens(
  vocab_size=20, image_id=17, image_end_id=18, line_end_id=19, num_slots=SLOTS)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
PICTURES = [Picture(f"picture {i}", data=as_png(pixels)) for i, pixels in enumerate(PIXELS)]
A, B, C, D, E = PICTURES
ONE_BYTES = 4 * SLOTS * WIDTH


@pytest.fixture(scope="module")
def params():
  return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.fixture(scope="module")
def want(params):
  return jax.jit(lambda images: MODEL.apply({"params": params}, images, method="image_vectors"))(
    PIXELS)


def _encoder(params, **options):
  return PictureEncoder(MODEL, params, ImageSettings(SIDE, SIDE), **options)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_vectors_are_those_of_the_model_whatever_the_batch(params, want, batch_size):
  encoder = _encoder(params, batch_size=batch_size)
  got = encoder([A, B, C, A, D, E])
  for vectors, i in zip(got, (0, 1, 2, 0, 3, 4), strict=True):
    assert vectors.dtype == np.float32 and vectors.shape == (SLOTS, WIDTH)
    np.testing.assert_allclose(vectors, want[i], rtol=1e-5, atol=1e-6)
  assert got[0] is got[3] and encoder.num_encoded == 5
  assert encoder([]) == []


def test_equal_contents_are_one_picture_wherever_they_are(params, tmp_path):
  encoder = _encoder(params)
  path = tmp_path / "copy.png"
  path.write_bytes(A.data)
  first, again = encoder([A, A._replace(where="elsewhere")])
  copy, = encoder([Picture("copy", str(path))])
  assert first is again is copy and encoder.num_encoded == 1
  path.write_bytes(B.data)  # a file is known by what it holds now
  assert encoder([Picture("copy", str(path))])[0] is not copy and encoder.num_encoded == 2


def test_the_longest_unused_vectors_go_first(params):
  encoder = _encoder(params, cache_bytes=2 * ONE_BYTES)
  encoder([A, B])
  encoder([A])
  encoder([C])  # B goes
  assert encoder.num_encoded == 3
  encoder([A, C])
  assert encoder.num_encoded == 3
  encoder([B])  # A goes
  encoder([C])
  assert encoder.num_encoded == 4
  encoder([A])
  assert encoder.num_encoded == 5


def test_one_call_has_all_its_vectors_however_small_the_cache(params, want):
  encoder = _encoder(params, cache_bytes=1, batch_size=2)
  got = encoder([A, B, C, A, B])
  assert encoder.num_encoded == 3
  np.testing.assert_allclose(got, want[np.array([0, 1, 2, 0, 1])], rtol=1e-5, atol=1e-6)
  encoder([A])
  assert encoder.num_encoded == 4


def test_prompts_hold_the_vectors_of_their_own_pictures(params):
  encoder = _encoder(params)
  rows = [
    lay_out(0, parts, texts, len(parts), IDS, end=False)
    for parts, texts in (((A, "x"), [[5]]), (("x",), [[6]]), ((B, "x", A), [[7, 8]]))]
  one, none, two = encoder.prompts(rows)
  a, b = encoder([A, B])
  assert one.vectors is a and one.ids == [0, 17, 17, 17, 17, 18, 5]
  assert none.vectors is None and none.ids == [0, 6]
  np.testing.assert_array_equal(two.vectors[two.index[two.slots]], np.concatenate([b, a]))
  assert two.slots.tolist() == [False] * 2 + [True] * 3 + [False] * 4 + [True] * 3 + [False]


def test_more_pictures_than_the_context_holds_are_refused():
  row = lay_out(0, (A, B), [], 2, IDS, end=False)
  check_fits(row, IDS, 11, "prompt 3")  # <s> and two blocks
  with pytest.raises(ValueError, match="^prompt 3 has 2 pictures of 5 tokens .* at most 1 pict"):
    check_fits(row, IDS, 10, "prompt 3")
