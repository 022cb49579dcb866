"""The one program against its parts, on the host and on a mesh."""

import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.aesthetic import Folded
from lmops_jax.models.pixels import normalise, resized_middle
from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.systems.promptist.rating import Rater
from lmops_jax.text.clip_texts import clip_rows
from tests.systems.promptist import tiny_clip

TEXTS = ["a cat", "Tom &amp;amp; Jerry\n  at\tsea", "", "x" * 40, "a dog"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return pretrained.load(tiny_clip.write(tmp_path_factory.mktemp("clip") / "model"))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
  path = tiny_clip.write_aesthetic(tmp_path_factory.mktemp("head") / "head.safetensors")
  return AestheticFile(path, sha256="any").folded()


def pictures(num_prompts=5, num_images=2):
  shape = (num_prompts, num_images, 24, 40, 3)
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_rows_are_cut_before_the_end_token(source):
  rows, cut = clip_rows(source.tokenizer(), TEXTS, 20)
  tokenizer = source.tokenizer()
  assert rows.shape == (5, 20) and cut.tolist() == [False, False, False, True, False]
  assert rows[3].tolist() == [*tokenizer.encode("x" * 18), 1][:19] + [1]
  assert (rows[:, 0] == 0).all() and (rows[:, -1] == 1).all()
  assert rows[2].tolist() == [0] + [1] * 19
  np.testing.assert_array_equal(rows[1], clip_rows(tokenizer, ["Tom & Jerry at sea"], 20)[0][0])


def test_ratings_are_those_of_the_parts(source, head):
  rater = Rater(source.model, source.params(), head, source.tokenizer(), num_rows=4)
  found = rater(pictures(), TEXTS)
  assert found.cosine.shape == found.aesthetic.shape == (5, 2)
  assert found.cut.tolist() == rater.cut(TEXTS).tolist() == [False, False, False, True, False]

  model = source.model.bind({"params": source.params()})
  texts = np.asarray(model.text_features(clip_rows(source.tokenizer(), TEXTS, 20)[0]), np.float64)
  small = normalise(resized_middle(pictures().reshape(10, 24, 40, 3), tiny_clip.SIZE))
  vectors = np.asarray(model.image_features(small), np.float64)
  for i in range(5):
    own = vectors[2 * i : 2 * i + 2]
    np.testing.assert_allclose(found.cosine[i], own @ texts[i], atol=2e-5)
    np.testing.assert_allclose(found.aesthetic[i], own @ head.kernel + head.bias, atol=1e-4)
  assert np.ptp(found.cosine) > 0.1 and np.ptp(found.aesthetic) > 0.1


def test_a_mesh_gives_the_same_ratings(source, head):
  single = Rater(source.model, source.params(), head, source.tokenizer())
  partitioner = MeshConfig(data=4, fsdp=2).build()
  split = Rater(
    source.model, source.params(partitioner), head, source.tokenizer(), partitioner, num_rows=3)
  assert split.num_rows == 8
  for a, b in zip(single(pictures(), TEXTS), split(pictures(), TEXTS)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_together_is_refused(source, head):
  with pytest.raises(ValueError, match="takes vectors of 768 numbers and CLIP gives 12"):
    Rater(source.model, None, Folded(np.zeros(768), 0.0), None)
  rater = Rater(source.model, None, head, source.tokenizer())
  with pytest.raises(ValueError, match="against 4 texts"):
    rater(pictures(), TEXTS[:4])
