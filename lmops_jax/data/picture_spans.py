"""Examples with pictures and encoded inputs as rows to finetune on (MetaLM, arXiv:2206.06336).

One example a row: the rows of `image_rows`, and beside them which stretches the encoder reads and
which picture belongs to which. `span_sets` is for texts alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lmops_jax.data.batches import token_weights
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.span_examples import SpanExample, fitted
from lmops_jax.data.span_rows import encoded_spans
from lmops_jax.host.whole_files import write_json

_FILE = "spans.json"


def write(
  directory: Path, examples: Iterable[SpanExample], ids: ImageTokens, length: int, *,
  pictures: int, encoder_positions: int,
) -> dict[str, int]:
  """Writes examples as rows of `length` predicted positions.

  Args:
    directory: made if needed.
    examples: in order, each with something learned.
    ids: the special ids.
    length: S.
    pictures: I, those of a row; an example with more is left out.
    encoder_positions: the most positions of a span with its start token.

  Returns:
    The counts of `image_rows.write_rows`. Spans that are too long are "cut" at their front; an
    example that is too long even so is "dropped".

  Raises:
    ValueError: for an example with nothing to learn, or if none is left.
  """
  cuts, kept = Counter(), []

  def fitting() -> Iterator[SpanExample]:
    for example in examples:
      if not example.learned[1:].any():
        raise ValueError(f"{example.where} has no token to learn; give it an answer.")
      found = fitted(example, length, encoder_positions)
      cuts["cut"] += found is not None and found is not example
      found = example if found is None else found
      if len(found.tokens) - 1 <= length and len(found.pictures) <= pictures:
        kept.append((found.spans.tolist(), found.picture_segments))
      yield found

  counts = write_rows(
    directory, fitting(), ids, length=length, pictures_per_row=pictures,
    pictures_per_example=pictures, share=False)
  counts["cut"] = cuts["cut"]
  write_json(directory / _FILE, {
    "spans": [spans for spans, _ in kept], "segments": [segments for _, segments in kept]})
  return counts


class PictureSpans:
  """Rows by index, as `write` wrote them.

  Attributes:
    rows: the rows, whose words no encoder reads.

  Args:
    directory: the folder.
    settings: how pictures become pixels.

  Raises:
    ValueError: if the folder holds no finished rows.
  """

  def __init__(self, directory: Path, settings: ImageSettings):
    self.rows = ImageRows(directory, settings)
    path = Path(directory) / _FILE
    try:
      found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise ValueError(f"{path} cannot be read ({error}); write the rows again.") from error
    self._spans = [np.array(spans, np.int32).reshape(-1, 2) for spans in found["spans"]]
    self._segments = np.zeros((len(self.rows), self.rows.pictures_per_row), np.int32)
    for row, segments in zip(self._segments, found["segments"], strict=True):
      row[: len(segments)] = segments

  def __len__(self) -> int:
    return len(self.rows)

  def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Rows as a batch.

    Returns:
      The arrays of `ImageRows.batch` and of `encoded_spans`, E being S; `vector_index` is E more at
      a picture's slot. `image_segments [B,I] int32`, the segment of each picture, 0 for those that
      a row lacks. `weight [B]` makes the mean over rows one over learned tokens.
    """
    indices, ids = np.asarray(indices), self.rows.image_tokens
    batch = self.rows.batch(indices)
    inputs = encoded_spans(
      batch["tokens"], [self._spans[i] for i in indices], self.rows.length, bos_id=ids.bos_id,
      pad_id=ids.pad_id)
    slots = batch["vector_index"]
    index = np.where(slots < 0, inputs["vector_index"], self.rows.length + slots)
    return {
      **batch, **inputs, "vector_index": index.astype(np.int32),
      "image_segments": self._segments[indices], "weight": token_weights(batch["loss_mask"])}

  def num_learned(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Number of learned tokens of rows, `[n] int64`; decodes nothing."""
    return self.rows.num_learned(indices)
