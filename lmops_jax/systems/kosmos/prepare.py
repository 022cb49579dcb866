"""Stage `scenes`: vocabulary, packed rows of each source, and the items of the evaluation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lmops_jax.config.setting_types import component
from lmops_jax.data.grounded_text import appended_box_words
from lmops_jax.data.image_rows import METADATA_FILE, ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens, appended, encode_records, special_words
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Mixture
from lmops_jax.data.multimodal import Record
from lmops_jax.host.whole_files import write_json
from lmops_jax.shared_stages import corpora, row_sources
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos.features import Features
from lmops_jax.systems.kosmos.items import Item, items
from lmops_jax.systems.kosmos.world import CORRECT, Weights, World, records, weights
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training.sources import Groups, Part

STAGE = "scenes"
_TRAIN, _VALIDATION = "train", "validation"
_ITEMS_FILE, _PICTURES_FILE, _IDS_FILE = "items.json", "pictures.npy", "ids.json"
_VOCABULARY_RECORDS = 500  # of each source


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class RowShape(row_sources.RowShape):
  """Rows of one part of a group."""


# By part and source: the records to train on, or those to validate if it is told so.
Sources = Mapping[str, Mapping[str, Callable[[bool], Iterator[Record]]]]


def run(
  context: pipeline.StageContext, world: World, vocabulary, shapes: Mapping[str, RowShape],
  num_slots: int,
) -> None:
  """Writes rows of the world's sources, see `write_sources`, and the items."""
  sources = {
    part: {source: functools.partial(records, world, part, source) for source in of_part}
    for part, of_part in weights(world).items()}
  # "Yes" and "No" are in the vocabulary with matrices to train on or without.
  answers = [f"Is it correct? {answer}" for answer in CORRECT]
  write_sources(context, sources, vocabulary, shapes, num_slots, texts=answers)
  _write_items(context.directory, items(world))


def write_sources(
  context: pipeline.StageContext, sources: Sources, vocabulary, shapes: Mapping[str, RowShape],
  num_slots: int, *, grid: int | None = None, texts: Iterable[str] = (),
) -> None:
  """Writes the vocabulary, `train/<part>/<source>` and `validation/<part>/<source>`.

  Args:
    num_slots: vectors of a picture.
    grid: cells in a row of the words for boxes; None: the vocabulary has none.
    texts: that the vocabulary is made from beside those of the sources.
  """
  out, special = context.directory, special_words(grid)
  words = corpora.build_vocabulary(
    context, vocabulary, itertools.chain(texts, _texts(sources)))
  ids = appended(words, num_slots, special)
  box_words = None if grid is None else appended_box_words(words, special)
  write_json(out / _IDS_FILE, dataclasses.asdict(ids))
  counts = {}
  pairs = [(part, source) for part in sources for source in sources[part]]
  with context.progress(len(pairs), "sources", "drawing") as bar:
    for part, source in pairs:
      shape = shapes[part]
      for name in (_TRAIN, _VALIDATION):
        found = sources[part][source](name == _VALIDATION)
        counts[f"{name}/{part}/{source}"] = write_rows(
          out / name / part / source, encode_records(found, words, ids, words=box_words), ids,
          length=shape.length, pictures_per_row=shape.pictures,
          pictures_per_example=shape.pictures, too_long="error")
      bar.update()
  context.extra["counts"] = counts


def _texts(sources: Sources) -> Iterator[str]:
  """Some of each source."""
  for of_part in sources.values():
    for found in of_part.values():
      for record in itertools.islice(found(False), _VOCABULARY_RECORDS):
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
    self, shapes: Mapping[str, RowShape], weights: Weights, side: int, num_groups: int, seed: int,
    features: Features | None = None,
  ) -> Groups:
    """Groups of rows of the parts to train on, in the order of a seed.

    Args:
      shapes: of the parts.
      weights: shares of the sources in each part's rows.
      side: of pictures.
      features: of the pictures, whose numbers stand in their place then; None: pixels.
    """
    return Groups({
      part: Part(self._mixture(_TRAIN, part, weights[part], side, seed, features), shape.rows)
      for part, shape in shapes.items()}, num_groups)

  def validation(
    self, part: str, weights: Weights, side: int, num_groups: int,
    features: Features | None = None,
  ) -> dict[str, np.ndarray]:
    """A batch of groups of one row each; arguments as for `groups`."""
    mixture = self._mixture(_VALIDATION, part, weights[part], side, 0, features)
    return Groups({part: Part(mixture, 1)}, num_groups).batch(0)

  def rows(self, side: int) -> dict[str, ImageRows]:
    """All rows, to train on and to validate, by the name of their folder."""
    return {
      "/".join(name): ImageRows(self._folder.joinpath(*name), ImageSettings(side, side))
      for name in sorted(
        found.parent.relative_to(self._folder).parts
        for found in self._folder.glob(f"*/*/*/{METADATA_FILE}"))}

  def _mixture(
    self, name: str, part: str, weights: Mapping[str, float], side: int, seed: int,
    features: Features | None,
  ) -> Mixture:
    settings, folder = ImageSettings(side, side), self._folder / name / part
    rows = {source: ImageRows(folder / source, settings) for source in weights}
    return Mixture(
      rows if features is None else {
        source: features.numbered(of, f"{name}/{part}/{source}") for source, of in rows.items()},
      weights, seed=seed)


def batched(values, size: int):
  """Lists of `size` values, the last one shorter."""
  values = iter(values)
  return iter(lambda: list(itertools.islice(values, size)), [])
