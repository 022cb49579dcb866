"""Words for an encoder that reads them together with a picture (MetaLM, arXiv:2206.06336, 4.1).

`span_rows` puts what is read of a row into one row of an encoder of text, each span behind a start
token of its own. An encoder of pictures and words (`models.fused_encoder`) takes each of these
spans beside its picture instead, or, in rows without pictures, alone. Its vectors are those of a
picture, then those of the words beside it, the start token's first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.data.mixture import Rows


class Beside(NamedTuple):
  """What is read beside each picture.

  Attributes:
    tokens: `[B,I,T] int32`, from the start token on; 0 is padding.
    segments: `[B,I,T] int32`, 1 for words and 0 for padding.
    numbers: `[B,E+I*P] int32`, for the number of each vector of an encoder of text and one of
      pictures, of which the former come first, that of the encoder of both. 0 for padding.
  """

  tokens: np.ndarray
  segments: np.ndarray
  numbers: np.ndarray

  def renumbered(self, index: np.ndarray) -> np.ndarray:
    """An index of vectors `[B,S]`, -1 for words that are not read, in the new numbers."""
    found = np.take_along_axis(self.numbers, np.maximum(index, 0), axis=1)
    return np.where(index < 0, -1, found).astype(np.int32)


  def renumbered_lists(self, index: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same for rows of different lengths."""
    return [np.where(of_row < 0, -1, numbers[np.maximum(of_row, 0)]).astype(np.int32)
            for of_row, numbers in zip(index, self.numbers, strict=True)]


def beside_pictures(
  inputs: Mapping[str, np.ndarray], image_segments: np.ndarray | None, num_slots: int,
  num_words: int, num_texts: int = 1,
) -> Beside:
  """The spans of an encoder's rows, each beside its picture.

  Args:
    inputs: `encoder_tokens`, `encoder_positions`, `encoder_segments [B,E]` of `encoded_spans`.
    image_segments: `[B,I]`, the segment that belongs to each picture, 0 for those that a row lacks;
      None for rows without pictures, whose spans are read alone.
    num_slots: P, vectors of a picture without words.
    num_words: T, the most words beside a picture, the start token counted.
    num_texts: I of rows without pictures.

  Raises:
    ValueError: for a span without a picture among rows that have some, more spans than `num_texts`
      in a row that has none, or one with more words; it names the row of the batch.
  """
  tokens, positions, segments = (
    inputs[f"encoder_{name}"] for name in ("tokens", "positions", "segments"))
  if image_segments is None:
    num_slots = 0
    image_segments = np.broadcast_to(np.arange(1, num_texts + 1), (len(tokens), num_texts))
  num_images, used = image_segments.shape[1], segments > 0
  belongs = (segments[..., None] == image_segments[:, None]) & used[..., None]
  lost = used & ~belongs.any(axis=2)
  if lost.any():
    row = int(np.argmax(lost.any(axis=1)))
    raise ValueError(
      f"row {row} of a batch has {segments[row].max()} texts to be encoded and "
      f"{(image_segments[row] > 0).sum()} places for them; an encoder of pictures and words reads "
      "a text behind its picture, and texts alone only in rows without pictures."
    )
  most = int(positions.max(initial=0, where=used))
  if most >= num_words:
    row = int(np.argmax(np.where(used, positions, 0).max(axis=1)))
    raise ValueError(
      f"row {row} of a batch has a text of {most} tokens to be encoded, and the encoder reads "
      f"{num_words - 1} behind the start token (models.FusedEncoderConfig.max_words={num_words}); "
      "raise it, or give shorter texts."
    )
  shape = len(tokens), num_images, num_words
  found = Beside(
    np.zeros(shape, np.int32), np.zeros(shape, np.int32),
    np.zeros((len(tokens), tokens.shape[1] + num_images * num_slots), np.int32))
  row, place = np.nonzero(used)
  image, word = belongs.argmax(axis=2)[row, place], positions[row, place]
  found.tokens[row, image, word] = tokens[row, place]
  found.segments[row, image, word] = 1
  size = num_slots + num_words
  found.numbers[row, place] = image * size + num_slots + word
  slots = np.arange(num_images)[:, None] * size + np.arange(num_slots)
  found.numbers[:, tokens.shape[1] :] = slots.ravel()
  return found


class FusedRows:
  """Rows for an encoder of text, as one that reads pictures and words together takes them.

  Args:
    rows: `PrefixRows` or `PictureSpans`, with at most `num_words` positions for an encoder; those
      without pictures have one text each.
    num_slots, num_words: see `beside_pictures`.
  """

  def __init__(self, rows: Rows, num_slots: int, num_words: int):
    self._rows, self._num_slots, self._num_words = rows, num_slots, num_words

  def __len__(self) -> int:
    return len(self._rows)

  def batch(self, indices: Sequence[int] | np.ndarray, **told) -> dict[str, np.ndarray]:
    """Rows as a batch, with words beside pictures; what is `told` is the rows' own, see `fused`."""
    return fused(self._rows.batch(indices, **told), self._num_slots, self._num_words)

  def num_learned(self, indices: Sequence[int] | np.ndarray, **told) -> np.ndarray:
    """Number of learned tokens of rows, `[n] int64`; decodes nothing."""
    return self._rows.num_learned(indices, **told)


class ApartRows(FusedRows):
  """The same for two encoders, one of pictures and one of words, which do not see each other.

  Args:
    rows: as there.
  """

  def __init__(self, rows: Rows):
    super().__init__(rows, 0, 0)

  def batch(self, indices: Sequence[int] | np.ndarray, **told) -> dict[str, np.ndarray]:
    """Rows as a batch, without what tells which picture belongs to which text."""
    batch = dict(self._rows.batch(indices, **told))
    batch.pop("image_segments", None)
    return batch


def fused(
  batch: Mapping[str, np.ndarray], num_slots: int, num_words: int
) -> dict[str, np.ndarray]:
  """A batch with spans for an encoder of text as one for an encoder of pictures and words.

  Args:
    batch: with the arrays of `encoded_spans` and, if there are pictures, `image_segments [B,I]`.
    num_slots, num_words: see `beside_pictures`, which also tells of errors.

  Returns:
    Its arrays without those of an encoder of text, and `image_tokens`, `image_segments [B,I,T]
    int32` as `models.universal.UniversalLM.row_vectors` takes them; `vector_index` refers to the
    vectors that it gives then.
  """
  kept = {name: value for name, value in batch.items()
          if not name.startswith("encoder_") and name != "image_segments"}
  found = beside_pictures(batch, batch.get("image_segments"), num_slots, num_words)
  return kept | {
    "image_tokens": found.tokens, "image_segments": found.segments,
    "vector_index": found.renumbered(batch["vector_index"])}
