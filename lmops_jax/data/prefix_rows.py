"""Rows of pictures with texts, and of texts alone, whose beginnings an encoder reads.

MetaLM's vision-language pretraining (arXiv:2206.06336, section 4.1): picture and a beginning of its
caption, of random length, are read together in both directions, and the rest is predicted. Texts
alone are treated alike. When it is finetuned a picture is read with the whole prompt.

    <s> <image> slots </image> [beginning] rest </s>
    <s> [beginning] rest </s>

Rows are those of `image_rows`, several examples in each perhaps; what is read is found when a batch
is asked for. The paper does not tell the lengths of beginnings: they are uniform here. Nor has it
words around pictures, which stand between two of them here as in all rows of this library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from lmops_jax.config.setting_types import component
from lmops_jax.data.image_rows import ImageRows
from lmops_jax.data.span_rows import encoded_spans
from lmops_jax.host.hashing import GOLDEN, mix64, order_keys


@runtime_checkable
class Prefix(Protocol):
  """How much of each example the encoder reads."""

  def lengths(
    self, num_words: np.ndarray, num_given: np.ndarray, chance: np.ndarray, room: int
  ) -> np.ndarray:
    """Words of each example's beginning, `[k]`, at most those that it has.

    The word behind it, or the end, is always learned.

    Args:
      num_words: `[k]`, words of each example, without special ones.
      num_given: `[k]`, how many of them, at its beginning, are not learned, such as a prompt; of a
        text without a picture the first word never is.
      chance: `[k] float64` in [0, 1).
      room: the most words that the encoder reads.
    """


@component(module="data")
@dataclasses.dataclass(frozen=True)
class RandomPrefix:
  """Beginnings of random length, uniform on 0 to n - 1 of n words, or to the encoder's room."""

  def lengths(
    self, num_words: np.ndarray, num_given: np.ndarray, chance: np.ndarray, room: int
  ) -> np.ndarray:
    """See `Prefix`."""
    return (chance * np.minimum(num_words, room + 1)).astype(np.int64)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class PromptPrefix:
  """What is given: the prompt, whole."""

  def lengths(
    self, num_words: np.ndarray, num_given: np.ndarray, chance: np.ndarray, room: int
  ) -> np.ndarray:
    """See `Prefix`."""
    return num_given


class _Examples(NamedTuple):
  """The examples of a batch's rows, in order.

  Attributes:
    row, start, stop: `[k]`, where the words of each stand: behind its picture, or behind `<s>`.
    picture: `[k]`, the number of its picture among the row's, -1 for none.
    number: `[k]`, which of the row's examples it is, from 0 on.
    num_given: `[k]`, words at its beginning that are not learned.
  """

  row: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  picture: np.ndarray
  number: np.ndarray
  num_given: np.ndarray


class PrefixRows:
  """Rows of `ImageRows` of which the encoder reads pictures and beginnings of texts.

  How much it reads is a function of (seed, id, epoch), so that neither a restart nor the number of
  hosts changes it. `Mixture` with `by_epoch` and `training.sources.Groups` weigh rows by learned
  tokens, and each process decodes its own pictures only.

  Attributes:
    rows, prefix, seed: the arguments.
    encoder_length: E, places of the encoder for each row.

  Args:
    rows: rows whose examples are texts, each with at most one picture, in front.
    prefix: how much is read.
    seed: seed of what is drawn.
    encoder_length: None takes S, which is always enough: an example's `<s>` and words take as many
      places of the row.
    encoder_positions: the most positions of a beginning with its start token; None: no limit.

  Raises:
    ValueError: for an encoder without a position for a word.
  """

  def __init__(
    self, rows: ImageRows, prefix: Prefix, seed: int = 0, *, encoder_length: int | None = None,
    encoder_positions: int | None = None,
  ):
    if encoder_positions is not None and encoder_positions < 2:
      raise ValueError(
        f"encoder_positions={encoder_positions} must be 2 or more: a start token and a word.")
    self.rows, self.prefix, self.seed = rows, prefix, seed
    self.encoder_length = rows.length if encoder_length is None else encoder_length
    self._room = rows.length if encoder_positions is None else encoder_positions - 1

  def __len__(self) -> int:
    return len(self.rows)

  def batch(
    self, indices: Sequence[int] | np.ndarray, epoch: int | np.ndarray = 0
  ) -> dict[str, np.ndarray]:
    """Rows as a batch.

    Args:
      indices: `[B]`, of the rows.
      epoch: which draw of their beginnings, one number or `[B]`.

    Returns:
      The arrays of `ImageRows.batch` and of `span_rows.encoded_spans`. `vector_index [B,S] int32`
      is the place in the encoder's row at a word that is read, and at a picture's slot E more than
      the number of its vector; `loss_mask` is 0 in front of words that are read, except the first
      one of a text without a picture. With pictures also `image_segments [B,I] int32`, the
      encoder's segment of each, 0 for those that a row lacks; a picture whose text is not read has
      a segment of its `<s>` alone.

    Raises:
      ValueError: for an example with several pictures or with one behind words, or a beginning that
        the encoder has no room for.
    """
    batch = self._texts(indices, epoch)
    if self.rows.pictures_per_row:
      batch["images"] = self.rows.images(indices)
    return batch

  def num_learned(
    self, indices: Sequence[int] | np.ndarray, epoch: int | np.ndarray = 0
  ) -> np.ndarray:
    """Number of learned tokens of rows, `[n] int64`; decodes nothing."""
    return (self._texts(indices, epoch)["loss_mask"] != 0).sum(axis=1, dtype=np.int64)

  def _texts(self, indices, epoch) -> dict[str, np.ndarray]:
    batch, ids = self.rows.texts(indices), self.rows.image_tokens
    found = _examples(batch, ids.num_slots)
    lengths = self._lengths(found, batch["example_id"], epoch)
    pictured = found.picture >= 0
    kept = pictured | (lengths > 0)
    row, start = found.row[kept], found.start[kept]
    stop = start + lengths[kept]
    num_rows = len(batch["tokens"])
    counts = np.bincount(row, minlength=num_rows)
    spans = np.split(np.stack([start, stop], axis=1), np.cumsum(counts)[:-1])
    slots = batch.pop("vector_index")
    encoded = encoded_spans(
      batch["tokens"], spans, self.encoder_length, bos_id=ids.bos_id, pad_id=ids.pad_id)
    of_words = encoded.pop("vector_index")
    hides = _hidden(of_words.shape, row, start - pictured[kept], stop)
    batch |= encoded
    batch["vector_index"] = np.where(slots >= 0, self.encoder_length + slots, of_words)
    batch["loss_mask"] = np.where(hides, np.float32(0), batch["loss_mask"])
    if self.rows.pictures_per_row:
      segment = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
      segments = np.zeros((num_rows, self.rows.pictures_per_row), np.int32)
      of_picture = found.picture[kept]
      segments[row[of_picture >= 0], of_picture[of_picture >= 0]] = segment[of_picture >= 0]
      batch["image_segments"] = segments
    return batch

  def _lengths(self, found: _Examples, ids: np.ndarray, epoch: int | np.ndarray) -> np.ndarray:
    epochs = np.broadcast_to(epoch, len(ids)).astype(np.uint64)
    keys = mix64(order_keys(ids, self.seed) + epochs * np.uint64(GOLDEN))[found.row]
    keys = mix64(keys + (found.number + 1).astype(np.uint64) * np.uint64(GOLDEN))
    chance = (keys >> np.uint64(11)) * 2.0**-53
    lengths = self.prefix.lengths(
      found.stop - found.start, found.num_given, chance, self._room)
    too_long = lengths > self._room
    if too_long.any():
      worst = int(np.argmax(too_long))
      raise ValueError(
        f"example {found.number[worst] + 1} of the row {int(ids[found.row[worst]])} begins with "
        f"{lengths[worst]} words for the encoder, which reads {self._room} behind its start token; "
        "give it more positions, or make rows with shorter prompts."
      )
    return lengths


def _hidden(shape: tuple[int, int], row, start, stop) -> np.ndarray:
  """`[B,S] bool`, True at the places `start .. stop - 2` of some rows."""
  edges = np.zeros((shape[0], shape[1] + 1), np.int64)
  some = stop - 1 > start
  np.add.at(edges, (row[some], start[some]), 1)
  np.add.at(edges, (row[some], stop[some] - 1), -1)
  return edges.cumsum(axis=1)[:, :-1] > 0


def _examples(batch: Mapping[str, np.ndarray], num_slots: int) -> _Examples:
  """The examples of rows; see `PrefixRows.batch` for errors."""
  segments, length = batch["segment_ids"], batch["segment_ids"].shape[1]
  border = np.zeros((len(segments), 1), segments.dtype)
  before = np.concatenate([border, segments[:, :-1]], axis=1)
  behind = np.concatenate([segments[:, 1:], border], axis=1)
  row, first = np.nonzero((segments > 0) & (segments != before))
  stop = np.nonzero((segments > 0) & (segments != behind))[1] + 1
  is_slot = batch["vector_index"] >= 0
  slots_before = np.concatenate([[0], np.cumsum(is_slot.ravel())])
  slots_of = slots_before[row * length + stop] - slots_before[row * length + first]
  in_front = is_slot[row, np.minimum(first + 2, length - 1)] & (first + 2 < stop)
  wrong = slots_of != np.where(in_front, num_slots, 0)
  if wrong.any():
    worst = int(np.argmax(wrong))
    raise ValueError(
      f"example {segments[row[worst], first[worst]]} of the row "
      f"{int(batch['example_id'][row[worst]])} has {slots_of[worst] // num_slots} pictures, not "
      "one in front of its text; make these rows of pairs and of texts alone."
    )
  start = first + 1 + np.where(in_front, num_slots + 2, 0)
  picture = batch["vector_index"][row, np.minimum(first + 2, length - 1)] // num_slots
  learned = np.flatnonzero(batch["loss_mask"].ravel())
  next_learned = np.append(learned, batch["loss_mask"].size)[
    np.searchsorted(learned, row * length + first)]
  # The place that learns first predicts the first word behind the prompt.
  num_given = np.clip(next_learned + 1 - (row * length + start), 0, stop - start)
  return _Examples(
    row, start, stop, np.where(in_front, picture, -1),
    segments[row, first].astype(np.int64) - 1, num_given)
