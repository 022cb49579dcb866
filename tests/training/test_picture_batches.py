"""Pictures from files to a step: packed rows in groups, on a mesh, resumed."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import ImageRows, ImageSettings, write_rows
from lmops_jax.data.image_tokens import ImageTokens, encode_records
from lmops_jax.data.mixture import Mixture
from lmops_jax.data.multimodal import Picture, Record
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.pixels import normalise
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.optimizers import sgd
from lmops_jax.training.sources import Ahead, Batches, Groups, Part, part_of

IDS = ImageTokens(
  vocab_size=40, bos_id=0, pad_id=1, eos_id=2, image_id=30, image_end_id=31, line_end_id=32,
  num_slots=2)
QUIET = loop.Records(tensorboard=False, checkpoint_every=2)


class _Digits:
  def encode_batch(self, texts):
    return [[3 + int(digit) for digit in text] for text in texts]


def _record(number):
  """A picture of one grey, between digits that tell it."""
  file = io.BytesIO()
  Image.new("RGB", (6, 6), (number * 7 % 256,) * 3).save(file, "PNG")
  return Record(number, (Picture("", data=file.getvalue()), f"{number:03}"), 0, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rows")
  for name, records, pictures in (
    ("pairs", map(_record, range(60)), 3), ("text", [Record(0, ("12345",), 0, "")] * 9, 0),
  ):
    write_rows(folder / name, encode_records(records, _Digits(), IDS), IDS, length=24,
               pictures_per_row=pictures, pictures_per_example=min(pictures, 1))
  return folder


def _source(folder, **options):
  def mixture(name):
    return Mixture({name: ImageRows(folder / name, ImageSettings(4, 4), **options)}, seed=3)

  return Groups({"text": Part(mixture("text"), 1), "pairs": Part(mixture("pairs"), 2)}, 8)


def _losses(params, batch):
  """A table of words, and a product for the vectors of pictures: each token tells the next."""
  nats, tokens = 0, 0
  for kind in ("text", "pairs"):
    rows = part_of(batch, kind)
    x = params["words"][rows["tokens"]]
    if "images" in rows:
      images = normalise(rows["images"])
      vectors = images.mean(axis=(3, 4)) @ params["pictures"]  # [B,n,I,slots * D]
      vectors = vectors.reshape(*vectors.shape[:2], -1, x.shape[-1])
      index = rows["vector_index"][..., None]
      x = jnp.where(index < 0, x, jnp.take_along_axis(vectors, jnp.maximum(index, 0), axis=2))
    logits = x @ params["words"].T
    at = jnp.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
    losses = (jax.nn.logsumexp(logits, axis=-1) - at) * rows["loss_mask"]
    nats += losses.sum(axis=(1, 2))
    tokens += rows["loss_mask"].sum(axis=(1, 2))
  return nats / tokens * batch["weight"]


def _init(key):
  words, pictures = jax.random.split(key)
  return {"words": jax.random.normal(words, (40, 4)),
          "pictures": jax.random.normal(pictures, (3, 8))}


def _train(directory, source, partitioner=None):
  learner = supervised(_init, _losses, sgd(0.1), partitioner=partitioner)
  return loop.train(learner, source, 4, 0, directory, partitioner, records=QUIET)


class _Broken(RuntimeError):
  pass


def _watched(source, asked, last=3):
  """Notes the steps that are asked for, and breaks after one."""
  def at(step):
    if step > last:
      raise _Broken
    asked.append(step)
    return source.batch(step)

  return Batches(at)


def test_training_resumes_and_shards_with_the_same_numbers(folder, tmp_path):
  want = _train(tmp_path / "one", _source(folder)).state.params
  with pytest.raises(_Broken):
    _train(tmp_path / "two", _watched(_source(folder), [], last=2))
  ahead = Ahead(_source(folder, num_threads=1, cache_bytes=0))
  asked = []
  resumed = _train(tmp_path / "two", _watched(ahead, asked)).state.params
  assert asked == [0, 2, 3]  # the first one for its shapes
  jax.tree.map(np.testing.assert_array_equal, resumed, want)
  mesh = MeshConfig(data=8).build()
  sharded = _train(tmp_path / "three", _source(folder), partitioner=mesh).state.params
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sharded, want)


def test_a_batch_shows_each_picture_with_its_digits(folder):
  rows = part_of(_source(folder).batch(5), "pairs")
  seen = 0
  for tokens, index, images in zip(
    *(rows[name].reshape(-1, *rows[name].shape[2:]) for name in (
      "tokens", "vector_index", "images"))):
    for at in np.flatnonzero(tokens == 31):
      number = int("".join(str(tokens[at + i] - 3) for i in (1, 2, 3)))
      picture = index[at - 1] // 2
      assert (images[picture] == number * 7 % 256).all()
      seen += 1
  assert seen > 20
