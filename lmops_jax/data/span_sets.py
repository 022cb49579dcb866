"""Examples with encoded inputs as rows to finetune on, several in a row (MetaLM, 2206.06336).

A set is one of `supervised` (the rows of models without an encoder) and the spans of its rows.
Attention stays within an example, in the decoder by `segment_ids` and in the encoder by its spans.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lmops_jax.data import supervised
from lmops_jax.data.first_fit import first_fit
from lmops_jax.data.span_examples import SpanExample, SpecialIds, fitted
from lmops_jax.data.span_rows import encoded_spans
from lmops_jax.data.supervised import SupervisedSet
from lmops_jax.host.whole_files import write_json

_SPANS, _SETTINGS = "spans.npy", "spans.json"
_SAVED = ("encoder_length", "bos_id", "pad_id")


@dataclasses.dataclass(frozen=True)
class SpanSet:
  """Rows with spans.

  Attributes:
    rows: the rows as models without an encoder read them.
    spans: `[N,K,2] int32`, of each row; (0, 0) fills.
    encoder_length: E, places of the encoder for each row.
    bos_id, pad_id: as `encoded_spans` takes them.
  """

  rows: SupervisedSet
  spans: np.ndarray
  encoder_length: int
  bos_id: int
  pad_id: int

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def counts(self) -> Mapping[str, int]:
    """See `build`."""
    return self.rows.counts

  def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Rows as a batch: the arrays of `SupervisedSet.batch`, and those of `encoded_spans`."""
    batch = self.rows.batch(indices)
    spans = [of_row[of_row[:, 1] > 0] for of_row in np.asarray(self.spans[np.asarray(indices)])]
    return batch | encoded_spans(
      batch["tokens"], spans, self.encoder_length, bos_id=self.bos_id, pad_id=self.pad_id)

  def num_learned(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Number of learned tokens of rows, `[n] int64`."""
    return self.rows.num_learned(indices)


def build(
  examples: Iterable[SpanExample], ids: SpecialIds, length: int, *,
  encoder_length: int | None = None, encoder_positions: int | None = None, pack: bool = True,
  too_long: str = "drop",
) -> SpanSet:
  """Rows of `length` predicted positions.

  Args:
    examples: in order, each with something learned.
    ids: the special ids.
    length: S.
    encoder_length: E; None takes S, which is enough wherever a token follows each span.
    encoder_positions: the most positions of a span with its start token; None: no limit.
    pack: put several examples into a row, first fit in order; False gives each its own.
    too_long: "drop" an example of more than S + 1 tokens, or with a span that the encoder has no
      positions for, or "cut" its spans (`span_examples.fitted`), both counted, or make it an
      "error". An example whose words alone exceed the row is dropped, or an error.

  Returns:
    The set; counts are `rows` (examples), `sequences`, `tokens`, `learned_tokens`, `encoded_tokens`
    and examples "dropped" or "cut".

  Raises:
    ValueError: for an example with pictures, one with nothing to learn, one that is too long (with
      "error"), or if none is left.
  """
  if too_long not in supervised.TOO_LONG:
    raise ValueError(f"too_long={too_long!r} is not one of {', '.join(supervised.TOO_LONG)}.")
  encoder_length = length if encoder_length is None else encoder_length
  if length < 1 or encoder_length < 1 or encoder_positions is not None and encoder_positions < 2:
    raise ValueError(
      f"length={length} and encoder_length={encoder_length} must be 1 or more, and "
      f"encoder_positions={encoder_positions} 2 or more."
    )
  counts: Counter[str] = Counter(dropped=0, cut=0)
  fitting = _fitting(examples, length, encoder_length, encoder_positions, too_long, counts)
  sized = ((one, (len(one.tokens) - 1, one.num_places)) for one in fitting)
  members = list(first_fit(sized, (length, encoder_length), share=pack))
  if not members:
    raise ValueError(
      f"no example is left: {counts['dropped']} have more than {length} tokens or spans of more "
      'than the encoder reads; raise the limits, or set too_long to "cut".'
    )
  spans = [_spans_of(of_row) for of_row in members]
  table = np.zeros((len(members), max(map(len, spans)), 2), np.int32)
  for row, of_row in zip(table, spans):
    row[: len(of_row)] = of_row
  counts["encoded_tokens"] = int((table[..., 1] - table[..., 0]).sum())
  rows = supervised.placed(members, length, ids.pad_id, counts)
  return SpanSet(rows, table, encoder_length, ids.bos_id, ids.pad_id)


def _fitting(
  examples: Iterable[SpanExample], length: int, encoder_length: int,
  encoder_positions: int | None, too_long: str, counts: Counter[str],
) -> Iterator[SpanExample]:
  """The examples that fit into a row; others are treated as `build` says."""
  for example in examples:
    if example.pictures:
      raise ValueError(
        f"{example.where} has pictures, and these rows hold text alone; make rows of it with "
        "image_rows.write_rows."
      )
    if not example.learned[1:].any():
      raise ValueError(f"{example.where} has no token to learn; give it an answer.")
    cut = fitted(example, length, encoder_positions)
    if cut is not None and cut.num_places > encoder_length:
      cut = None
    if cut is not example:
      if too_long == "error":
        raise ValueError(_too_long(example, length, encoder_length, encoder_positions))
      is_dropped = cut is None or too_long == "drop"
      counts["dropped" if is_dropped else "cut"] += 1
      if is_dropped:
        continue
    yield cut


def _too_long(example, length: int, encoder_length: int, encoder_positions: int | None) -> str:
  sizes = example.spans[:, 1] - example.spans[:, 0]
  inside = int(sizes.sum())
  longest = int(sizes.max(initial=0))
  limit = "" if encoder_positions is None else f", one of which at most {encoder_positions - 1}"
  return (
    f"{example.where} has {len(example.tokens) - inside} tokens outside of spans and {inside} in "
    f"{len(sizes)} of them, the longest {longest}; a row takes {length + 1} in all and "
    f"{encoder_length} places of the encoder{limit}; raise the limits, or set too_long to \"drop\" "
    'or "cut".'
  )


def _spans_of(members: Sequence[SpanExample]) -> np.ndarray:
  """The spans of a row of examples, `[k,2]`."""
  starts = np.cumsum([0] + [len(example.tokens) - 1 for example in members])
  return np.concatenate([example.spans + start for example, start in zip(members, starts)])


def save(directory: Path, data: SpanSet) -> None:
  """Writes a set into a folder, made if needed."""
  supervised.save(directory, data.rows)
  np.save(directory / _SPANS, data.spans)
  write_json(directory / _SETTINGS, {name: getattr(data, name) for name in _SAVED})


def load(directory: Path) -> SpanSet:
  """Opens what `save` wrote; the arrays are mapped, not read.

  Raises:
    ValueError: if a file is missing.
  """
  rows = supervised.load(directory)
  try:
    spans = np.load(directory / _SPANS, mmap_mode="r")
    settings = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ValueError(
      f"{error.filename} is missing; delete the folder of the stage that wrote it and run it again."
    ) from error
  return SpanSet(rows, spans, **settings)
