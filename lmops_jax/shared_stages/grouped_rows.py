"""Rows of several sources by part, written by one stage and read in groups by another."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lmops_jax.data.grounded_text import BoxWords
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Mixture, Rows
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.shared_stages.row_sources import Form, RowShape, RowSource, Side
from lmops_jax.shared_stages.row_texts import marked
from lmops_jax.stages import pipeline
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training.sources import Groups, Part

VALIDATION = "validation"

Opened = Mapping[str, Mapping[str, Rows]]  # by part and name of the source


@dataclasses.dataclass(frozen=True)
class GroupedSources:
  """The sources of each part of a group.

  Attributes:
    sources: by part. shapes: of the rows of each part.
    images: how pictures become pixels.
    too_long, pictures_per_example: see `image_rows.write_rows`.
    held_out: share of each source's records that nothing is learned from.
  """

  sources: Mapping[str, Sequence[RowSource]]
  shapes: Mapping[str, RowShape]
  images: ImageSettings
  too_long: str
  pictures_per_example: int
  held_out: float

  def check(self, setting: str) -> None:
    """Raises ValueError for no source, or two of one part with one name.

    Args:
      setting: the name of the system in gin files.
    """
    if not self.sources:
      raise ValueError(f"{setting} has no source; give it one of a part at least.")
    for part, sources in self.sources.items():
      name, num = Counter(source.name for source in sources).most_common(1)[0]
      if num > 1:
        raise ValueError(
          f"{num} sources of the part {part!r} are called {name!r}; give them different names.")

  def write(
    self, context: pipeline.StageContext, vocabulary: Vocabulary, ids: ImageTokens,
    words: Sequence[str], box_words: BoxWords | None = None,
  ) -> None:
    """Writes `<part>/<source>`, and `validation/<part>/<source>` of what is held out.

    The stage's `extra` gets `counts` by source and, as `first_rows`, each source's first row in
    words.

    Args:
      vocabulary, ids: of the rows. words: the special ones behind the vocabulary.
      box_words: the vocabulary's words for boxes; None if it has none.
    """
    counts: dict[str, Mapping[str, int]] = {}
    for part, sources in self.sources.items():
      form = Form(self.shapes[part], vocabulary, ids, self.images, self.too_long,
                  self.pictures_per_example, box_words)
      for source in sources:
        name = f"{part}/{source.name}"
        counts[name] = self._write(context, name, source, form, held=False)
        if self.held_out:
          counts[f"{VALIDATION}/{name}"] = self._write(context, name, source, form, held=True)
    context.extra["counts"] = counts
    context.extra["first_rows"] = {
      f"{part}/{name}": marked(
        {key: of[0] for key, of in rows.batch(np.zeros(1, np.int64)).items()}, vocabulary, ids,
        words)
      for part, opened in self.opened(context.directory).items() for name, rows in opened.items()}

  def _write(self, context, name: str, source: RowSource, form: Form, held: bool):
    """Writes one side of a source; returns counts of what became of it."""
    left_out, records = LeftOut(), Counter()
    folder = context.directory / VALIDATION if held else context.directory
    counts = source.write(
      folder / name, form, Side(name, self.held_out, held, records), left_out)
    if self.held_out and not held:
      counts["held_out"] = records["others"]
    if not held:
      for reason, names in left_out.named.items():
        context.log(f"{name}: {left_out.counts[reason]} {reason}, {names[0]} first")
    return counts | dict(left_out.counts)

  def opened(self, folder: Path) -> dict[str, dict[str, Rows]]:
    """The rows to learn from in the stage's folder."""
    return {
      part: {source.name: source.open(folder / part / source.name, self.images)
             for source in sources}
      for part, sources in self.sources.items()}

  def opened_held_out(self, folder: Path) -> dict[str, dict[str, Rows]]:
    """The rows that are held out, of which there are none unless `held_out` is above 0."""
    return self.opened(folder / VALIDATION) if self.held_out else {}

  def groups(self, opened: Opened, num_groups: int, seed: int, by_epoch: bool = False) -> Groups:
    """Groups of rows, each source weighed as it says.

    Args:
      opened: the rows. num_groups: of a batch. seed: of the order.
      by_epoch: tell rows their epoch, see `Mixture`.
    """
    parts = {}
    for part, of_part in opened.items():
      weights = {source.name: source.weight for source in self.sources[part]}
      parts[part] = Part(
        Mixture(of_part, weights, seed=seed, by_epoch=by_epoch), self.shapes[part].rows)
    return Groups(parts, num_groups)
