"""The one program against its parts, on the host and on a mesh."""

import jax
import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.aesthetic import Folded
from lmops_jax.models.pixels import normalise, resized_middle
from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.systems.promptist.rating import Rater
from lmops_jax.text.clip import clip_texts
from tests.systems.promptist import tiny_clip

TEXTS = ["a cat", "Tom &amp;amp; Jerry\n  at\tsea", "", "x" * 40, "a dog"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return pretrained.load(tiny_clip.write(tmp_path_factory.mktemp("clip") / "model"))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
  path = tiny_clip.write_aesthetic(tmp_path_factory.mktemp("head") / "head.safetensors")
  return AestheticFile(path, sha256="any").folded()


@pytest.fixture(scope="module")
def rater(source, head):
  return Rater(source.model, source.params(), head, source.tokenizer(), num_rows=4)


def pictures(num_prompts=5, num_images=2):
  shape = (num_prompts, num_images, 24, 40, 3)
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_ratings_are_those_of_the_parts(rater, source, head):
  found = rater(pictures(), TEXTS)
  assert found.cosine.shape == found.aesthetic.shape == (5, 2)
  assert found.cut == rater.cut(TEXTS) == ["", "", "", "x" * 22, ""]

  def features(array, method):
    apply = jax.jit(lambda p, x: source.model.apply({"params": p}, x, method=method))
    return np.asarray(apply(source.params(), array), np.float64)

  clean = [TEXTS[0], "Tom & Jerry at sea", *TEXTS[2:]]
  tokens = clip_texts(source.tokenizer(), clean, 20).tokens
  texts = features(tokens, "text_features")
  small = normalise(resized_middle(pictures().reshape(10, 24, 40, 3), tiny_clip.SIZE))
  vectors = features(small, "image_features")
  for i in range(5):
    own = vectors[2 * i : 2 * i + 2]
    np.testing.assert_allclose(found.cosine[i], own @ texts[i], atol=2e-5)
    np.testing.assert_allclose(found.aesthetic[i], own @ head.kernel + head.bias, atol=1e-4)
  assert np.ptp(found.cosine) > 0.1 and np.ptp(found.aesthetic) > 0.1


def test_a_mesh_gives_the_same_ratings(rater, source, head):
  partitioner = MeshConfig(data=4, fsdp=2).build()
  split = Rater(
    source.model, source.params(partitioner), head, source.tokenizer(), partitioner, num_rows=3)
  assert split.num_rows == 8
  for a, b in zip(rater(pictures(), TEXTS)[:2], split(pictures(), TEXTS)[:2]):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_together_is_refused(source, head):
  with pytest.raises(ValueError, match="takes vectors of 768 numbers and CLIP gives 12"):
    Rater(source.model, None, Folded(np.zeros(768), 0.0), None)
  rater = Rater(source.model, None, head, source.tokenizer())
  with pytest.raises(ValueError, match="against 4 texts"):
    rater(pictures(), TEXTS[:4])
