"""Tasks to learn from together: a set of rows for each, and all of them as one endless list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lmops_jax.data import picture_spans, span_sets
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Mixture, Rows
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, sound
from lmops_jax.data.picture_spans import PictureSpans
from lmops_jax.data.span_examples import SpecialIds, encode, whole_input
from lmops_jax.data.span_sets import SpanSet
from lmops_jax.text.vocabularies import Vocabulary


def write_tasks(
  directory: Path, corpora: Mapping[str, ImageCorpus], vocabulary: Vocabulary, ids: SpecialIds,
  length: int, *, encoder_length: int | None = None, encoder_positions: int | None = None,
  pack: bool = True, too_long: str = "drop",
) -> dict[str, dict[str, int]]:
  """Writes the rows of tasks, whose prompts the encoder reads, into a folder for each.

  Args:
    directory: made if needed.
    corpora: by task its prompts with completions.
    vocabulary: of their texts.
    ids: the special ids.
    length, encoder_length, encoder_positions, pack, too_long: see `span_sets.build`.

  Returns:
    For each task the counts of its set, and what its corpus has left out by reason.

  Raises:
    ValueError: as `span_sets.build`, and for a record without a prompt.
  """
  counts = {}
  for name, corpus in corpora.items():
    left_out = LeftOut()
    records = map(whole_input, corpus.records(left_out))
    made = span_sets.build(
      encode(records, vocabulary, ids), ids, length, encoder_length=encoder_length,
      encoder_positions=encoder_positions, pack=pack, too_long=too_long)
    span_sets.save(directory / name, made)
    counts[name] = {**made.counts, **left_out.counts}
  return counts


def write_picture_tasks(
  directory: Path, corpora: Mapping[str, ImageCorpus], vocabulary: Vocabulary, ids: ImageTokens,
  images: ImageSettings, length: int, *, pictures: int, encoder_positions: int,
) -> dict[str, dict[str, int]]:
  """The same for tasks with pictures, each example in a row of its own.

  Args:
    directory, corpora, vocabulary: as for `write_tasks`.
    ids: the special ids.
    images: how pictures become pixels; those that do not are left out.
    length, pictures, encoder_positions: see `picture_spans.write`.
  """
  counts = {}
  for name, corpus in corpora.items():
    left_out = LeftOut()
    records = map(whole_input, sound(corpus.records(left_out), images, left_out))
    made = picture_spans.write(
      directory / name, encode(records, vocabulary, ids), ids, length, pictures=pictures,
      encoder_positions=encoder_positions)
    counts[name] = {**made, **left_out.counts}
  return counts


def open_picture_tasks(
  directory: Path, names: Iterable[str], images: ImageSettings
) -> dict[str, PictureSpans]:
  """The sets of some of the tasks that `write_picture_tasks` wrote."""
  return {name: PictureSpans(directory / name, images) for name in names}


def open_tasks(directory: Path, names: Iterable[str]) -> dict[str, SpanSet]:
  """The sets of some of the tasks that `write_tasks` wrote."""
  return {name: span_sets.load(directory / name) for name in names}


def mixed(
  sets: Mapping[str, Rows], seed: int, *, encoded: bool = True,
  weights: Mapping[str, float] | None = None,
) -> Mixture:
  """The rows of all tasks as an endless list, for `training.sources.Endless`.

  Args:
    sets: by task, of one kind.
    seed: of the order.
    encoded: False gives the same rows, of texts, to a model without an encoder.
    weights: of the tasks; None: each example comes equally often.
  """
  sources = {name: rows if encoded else rows.rows for name, rows in sets.items()}
  return Mixture(sources, weights, seed)
