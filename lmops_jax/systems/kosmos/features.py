"""Stage `features`: what a frozen tower makes of each picture, once for all arms and seeds.

A tower that is not trained and drops nothing makes the same of a picture at every step. The stage
writes what the connector reads (`DockedLM.features`) of each different picture of the rows, and the
numbers by which rows refer to it; a training step then begins at the connector. Number 0 is a black
picture, which also stands in the places of a row that hold none, as in batches of pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.data.image_rows import ImageRows
from lmops_jax.host.hashing import digest
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.sizing import docked as docked_sizes
from lmops_jax.stages import pipeline
from lmops_jax.training import language_models, loop

STAGE = "features"
NUMBERS = "pictures"  # the field of a batch
BLACK = 0  # number of the black picture
_FEATURES_FILE, _NUMBERS_FILE = "features.npy", "numbers.npz"
_AT_ONCE = 256  # pictures


def are_fixed(config: DockedConfig, optimizer: optax.GradientTransformation) -> bool:
  """Whether a picture's features are the same at every step of a training.

  They are if the optimizer trains nothing of the tower and the tower drops nothing.
  """
  trunk = config.vision.trunk
  if trunk.embedding_dropout or trunk.attention_dropout or trunk.residual_dropout:
    return False
  text = language_models.language_model(config.text, 2, config.text.max_length).config  # any words
  model = DockedLM(dataclasses.replace(config, text=text))
  return not docked_sizes.trains_tower(
    optimizer, jax.eval_shape(loop.initializer(model), jax.random.key(0)))


def run(
  context: pipeline.StageContext, *, model: DockedLM, tower: Any, rows: Mapping[str, ImageRows],
  partitioner,
) -> None:
  """Writes the features of the pictures of all rows, and where those of each source are.

  Args:
    tower: its parameters.
    rows: by name.
  """
  numbers: dict[str, int] = {}  # by a digest of the file
  different: list[tuple[ImageRows, int]] = []
  of_rows = {}
  total = sum(of.num_pictures for of in rows.values())
  with context.progress(total, "pictures", "comparing") as bar:
    for name, of in rows.items():
      found = of_rows[name] = np.zeros(of.num_pictures, np.int32)
      for i in range(of.num_pictures):
        found[i] = numbers.setdefault(digest([of.picture(i).read()]), 1 + len(different))
        if found[i] > len(different):
          different.append((of, i))
      bar.update(of.num_pictures)

  num = 1 + len(different)
  shape = num, 1 + model.config.vision.num_patches, model.config.vision.trunk.width
  num_bytes = num * docked_sizes.feature_bytes(model.config)
  context.log(f"{len(different):,} different ones of {total:,} pictures, "
              f"{num_bytes / 2**20:,.0f} MiB of features, which training maps from the disk")
  context.extra |= {"pictures": total, "different": len(different), "bytes": num_bytes}
  context.flops += num * docked_sizes.tower_flops(model.config)
  side = model.config.vision.image_size
  black = np.zeros((1, side, side, NUM_CHANNELS), np.uint8)
  dtype = jnp.dtype(model.config.text.dtype)
  out = np.lib.format.open_memmap(
    context.directory / _FEATURES_FILE, "w+", dtype, shape) if context.writes else None
  with context.progress(num, "pictures", "encoding") as bar, partitioner.activate():
    for start in range(0, num, _AT_ONCE):
      some = different[max(start - 1, 0) : start - 1 + _AT_ONCE]
      images = np.concatenate([*([] if start else [black]), *(_pixels(*one)[None] for one in some)])
      if out is not None:
        out[start : start + len(images)] = encode(model, tower, images)
      bar.update(len(images))
  if out is not None:
    out.flush()
    np.savez(context.directory / _NUMBERS_FILE, **of_rows)


def _pixels(rows: ImageRows, number: int) -> np.ndarray:
  picture = rows.picture(number)
  return rows.settings.pixels(picture.read(), picture.where)


def encode(model: DockedLM, tower: Any, images: np.ndarray) -> np.ndarray:
  """Features `[n,P,width]` of up to 256 pictures, for which one shape is compiled."""
  filled = np.pad(images, ((0, _AT_ONCE - len(images)),) + ((0, 0),) * 3)
  return np.asarray(_encode(model, tower, filled))[: len(images)]


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, tower, images):
  return model.apply({"params": {"vision": tower}}, images, method="features")


class Features:
  """What the stage wrote.

  Args:
    folder: the stage's.
    dtype: the language model's.
  """

  def __init__(self, folder: Path, dtype: str):
    # NumPy does not know bfloat16, and reads bytes.
    self._table = np.load(folder / _FEATURES_FILE, mmap_mode="r").view(jnp.dtype(dtype))
    with np.load(folder / _NUMBERS_FILE) as numbers:
      self._numbers = dict(numbers)

  def of(self, numbers: np.ndarray) -> np.ndarray:
    """The features `[...,P,width]` of numbers `[...]`."""
    return self._table[numbers]

  def numbered(self, rows: ImageRows, name: str) -> NumberedRows:
    """Rows, which had that name, with numbers in the place of pictures."""
    return NumberedRows(rows, self._numbers[name])


@dataclasses.dataclass(frozen=True)
class NumberedRows:
  """Rows for a `Mixture` with numbers in the place of pictures.

  Attributes:
    rows: the rows.
    numbers: of each of their pictures.
  """

  rows: ImageRows
  numbers: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def num_learned(self, indices: np.ndarray) -> np.ndarray:
    """See `mixture.Rows`."""
    return self.rows.num_learned(indices)

  def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """What `ImageRows.batch` returns, with `pictures [n,I] int32` in the place of `images`."""
    batch = self.rows.texts(indices)
    if self.rows.pictures_per_row:
      own = self.rows.picture_numbers(indices)
      there = own >= 0
      batch[NUMBERS] = np.full(own.shape, BLACK, np.int32)
      batch[NUMBERS][there] = self.numbers[own[there]]
    else:
      del batch["vector_index"]
    return batch
