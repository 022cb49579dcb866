"""Stage `scenes`: vocabulary, packed rows of each source, and the items of the evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmops_jax.config.setting_types import Count, PositiveInt, component
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens, appended, encode_records
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Mixture
from lmops_jax.host.whole_files import write_json
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos.items import Item, items
from lmops_jax.systems.kosmos.world import CORRECT, SOURCES, World, records, sources
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training.sources import Groups, Part

STAGE = "scenes"
_TRAIN, _VALIDATION = "train", "validation"
_ITEMS_FILE, _PICTURES_FILE, _IDS_FILE = "items.json", "pictures.npy", "ids.json"
_VOCABULARY_RECORDS = 500  # of each source


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class RowShape:
  """Rows of one part of a group.

  Attributes:
    length: predicted positions.
    pictures: of a row, at most; 0 for texts.
    rows: in each group.
  """

  length: PositiveInt
  pictures: Count
  rows: PositiveInt


def run(
  context: pipeline.StageContext, world: World, vocabulary, shapes: dict[str, RowShape],
  num_slots: int,
) -> None:
  """Writes the vocabulary, `train/<part>/<source>`, `validation/<part>/<source>` and the items."""
  out = context.directory
  words = corpora.build_vocabulary(context, vocabulary, _texts(world))
  ids = appended(words, num_slots)
  write_json(out / _IDS_FILE, dataclasses.asdict(ids))
  counts = {}
  drawn = list(sources(world))
  with context.progress(len(drawn), "sources", "drawing") as bar:
    for part, source in drawn:
      shape = shapes[part]
      for name in (_TRAIN, _VALIDATION):
        found = records(world, part, source, validation=name == _VALIDATION)
        counts[f"{name}/{part}/{source}"] = write_rows(
          out / name / part / source, encode_records(found, words, ids), ids,
          length=shape.length, pictures_per_row=shape.pictures,
          pictures_per_example=shape.pictures, too_long="error")
      bar.update()
  context.extra["counts"] = counts
  _write_items(out, items(world))


def _texts(world: World) -> Iterator[str]:
  """What the vocabulary is made from; "Yes" and "No" are among it, with matrices or without."""
  yield from (f"Is it correct? {answer}" for answer in CORRECT)
  for part, source in sources(world):
    for record in itertools.islice(records(world, part, source), _VOCABULARY_RECORDS):
      yield " ".join(part for part in record.parts if isinstance(part, str))


def _write_items(out: Path, found: Iterator[Item]) -> None:
  """Items, their pictures in one array, each once."""
  numbers: dict[int, int] = {}
  pictures: list[np.ndarray] = []  # kept, so that no other one gets the id of one of them

  def number(picture: np.ndarray) -> int:
    if id(picture) not in numbers:
      numbers[id(picture)] = len(pictures)
      pictures.append(picture)
    return numbers[id(picture)]

  rows = [
    {**item._asdict(), **{
      name: [number(picture) for picture in getattr(item, name)]
      for name in ("pictures", "candidates")}}
    for item in found
  ]
  write_json(out / _ITEMS_FILE, rows)
  np.save(out / _PICTURES_FILE, np.stack(pictures))


class Prepared:
  """What the stage wrote.

  Attributes:
    vocabulary, ids: as `encode_records` takes them.
  """

  def __init__(self, folder: Path):
    self._folder = Path(folder)
    self.vocabulary: Vocabulary = corpora.open_vocabulary(self._folder)
    self.ids = ImageTokens(**json.loads((self._folder / _IDS_FILE).read_text()))

  def items(self) -> tuple[list[Item], np.ndarray]:
    """The items, with numbers in the place of pictures, and all pictures `[N,side,side,3]`."""
    rows = json.loads((self._folder / _ITEMS_FILE).read_text())
    return [Item(**row) for row in rows], np.load(self._folder / _PICTURES_FILE)

  def groups(
    self, shapes: dict[str, RowShape], side: int, num_groups: int, seed: int
  ) -> Groups:
    """Groups of rows of the parts to train on, in the order of a seed."""
    return Groups({
      part: Part(self._mixture(_TRAIN, part, side, seed), shape.rows)
      for part, shape in shapes.items()}, num_groups)

  def validation(self, part: str, side: int, num_groups: int) -> dict[str, np.ndarray]:
    """A batch of groups of one row each."""
    return Groups({part: Part(self._mixture(_VALIDATION, part, side, 0), 1)}, num_groups).batch(0)

  def _mixture(self, name: str, part: str, side: int, seed: int) -> Mixture:
    settings, folder = ImageSettings(side, side), self._folder / name / part
    there = {source: of for source, of in SOURCES[part].items() if (folder / source).is_dir()}
    return Mixture(
      {source: ImageRows(folder / source, settings) for source in there},
      {source: of.weight for source, of in there.items()}, seed=seed)


def batched(values, size: int):
  """Lists of `size` values, the last one shorter."""
  values = iter(values)
  return iter(lambda: list(itertools.islice(values, size)), [])
