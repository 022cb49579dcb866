"""Packed rows with spans for an encoder: batches of the semi-causal objective (arXiv:2206.06336).

The spans of a row share one row of the encoder, each behind a start token of its own:

    <s> span 1 <s> span 2 ... padding

Attention stays within a span (`encoder_segments`) and positions start anew, so that no vector
depends on other spans, and all spans of a batch are read in one call almost without padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lmops_jax.data.batches import token_weights
from lmops_jax.data.mixture import Rows
from lmops_jax.data.spans import SpanSampler, check_spans, semi_causal_mask
from lmops_jax.host.hashing import order_key


class PackedRows(Rows, Protocol):
  """Rows of documents one after the other, each behind a start token: `Instances` or the like.

  Attributes:
    length: S. bos_id, eos_id, pad_id: the vocabulary's; `eos_id` ends documents.
  """

  length: int
  bos_id: int
  eos_id: int
  pad_id: int


def encoded_spans(
  tokens: np.ndarray, spans: Sequence[np.ndarray], length: int, *, bos_id: int, pad_id: int
) -> dict[str, np.ndarray]:
  """What the encoder reads of a batch, and where its vectors stand.

  Args:
    tokens: `[B,S] int32`, the rows' inputs.
    spans: of each row, `[k,2]`, as `spans.check_spans` takes them.
    length: E, places of the encoder for each row.
    bos_id: stands in front of every span; its vectors are not used.
    pad_id: fills the rest.

  Returns:
    `encoder_tokens`, `encoder_positions`, `encoder_segments [B,E] int32` (segments 1, 2, ...; 0 is
    padding) and `vector_index [B,S] int32`: for a token of a span its place in the encoder's row,
    else -1.

  Raises:
    ValueError: if the spans of a row take more than E places.
  """
  num_rows, row_length = tokens.shape
  counts = np.array([len(of_row) for of_row in spans], np.int64)
  table = np.concatenate([np.zeros((0, 2), np.int64), *spans]).astype(np.int64)
  row = np.repeat(np.arange(num_rows), counts)
  number = _within(counts)
  sizes = table[:, 1] - table[:, 0] + 1
  ends = np.cumsum(sizes)
  before = np.concatenate([[0], ends])[np.cumsum(counts) - counts]  # places of all earlier rows
  offset = ends - sizes - before[row]
  used = np.bincount(row, sizes, num_rows).astype(np.int64)
  if used.max(initial=0) > length:
    worst = int(np.argmax(used))
    raise ValueError(
      f"row {worst} of a batch has {counts[worst]} spans, which take {used[worst]} places of the "
      f"encoder with their start tokens, and a row has {length}; draw fewer or shorter spans."
    )
  within = _within(sizes)  # 0 at the start token
  place = np.repeat(row * length + offset, sizes) + within
  source = np.repeat(row * row_length + table[:, 0], sizes) + within - 1
  is_start = within == 0
  out = {
    "encoder_tokens": np.full(num_rows * length, pad_id, np.int32),
    "encoder_positions": np.zeros(num_rows * length, np.int32),
    "encoder_segments": np.zeros(num_rows * length, np.int32),
  }
  out["encoder_tokens"][place] = np.where(is_start, bos_id, tokens.ravel()[source])
  out["encoder_positions"][place] = within
  out["encoder_segments"][place] = np.repeat(number + 1, sizes)
  index = np.full(tokens.size, -1, np.int32)
  index[source[~is_start]] = (place - np.repeat(row * length, sizes))[~is_start]
  return {
    **{name: value.reshape(num_rows, length) for name, value in out.items()},
    "vector_index": index.reshape(tokens.shape),
  }


def _within(sizes: np.ndarray) -> np.ndarray:
  """0, 1, ... in each of several runs of some sizes, one after the other."""
  return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def generator(seed: int, example_id: int, draw: int) -> np.random.Generator:
  """The chance of one draw of one example, the same in every run and on every host."""
  key = np.array([order_key(example_id, seed), draw], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))


class SpanRows:
  """Packed rows whose spans are drawn anew in every epoch.

  The spans of a row are a function of (seed, example id, epoch), so that neither a restart nor the
  number of hosts changes them. A source that goes through epochs and tells them is
  `training.sources.Epochs` with `by_epoch` and `whole`.

  Attributes:
    rows: the packed rows. sampler: chooses spans. seed: seed of the choice.
    encoder_length: E, places of the encoder for each row; 0 if there are no spans.

  Args:
    encoder_positions: the most positions of the encoder, a start token included; None: no limit.

  Raises:
    ValueError: if rows are too short for the sampler, or the encoder for its longest span.
  """

  def __init__(
    self, rows: PackedRows, sampler: SpanSampler, seed: int = 0, *,
    encoder_positions: int | None = None,
  ):
    self.rows, self.sampler, self.seed = rows, sampler, seed
    self.encoder_length = sampler.encoder_length(rows.length)
    self._longest = sampler.longest_span(rows.length)
    if encoder_positions is not None and self._longest >= encoder_positions:
      raise ValueError(
        f"{type(sampler).__name__} makes spans of up to {self._longest} tokens, which take "
        f"{self._longest + 1} positions with the start token, and the encoder has "
        f"{encoder_positions}; make the spans shorter, or give the encoder more positions."
      )

  def __len__(self) -> int:
    return len(self.rows)

  def batch(
    self, indices: Sequence[int] | np.ndarray, epoch: int | np.ndarray = 0
  ) -> dict[str, np.ndarray]:
    """Rows as a batch.

    Args:
      indices: `[B]`, of the rows.
      epoch: which draw of their spans, one number or `[B]`.

    Returns:
      `tokens`, `targets [B,S] int32`, `loss_mask [B,S] float32` (0 also where `semi_causal_mask` is
      False), `example_id [B] int64`, the arrays of `encoded_spans` if E > 0, and `weight [B]
      float32`, which makes the mean over rows one over learned tokens.

    Raises:
      ValueError: if the sampler gives spans that a row cannot have, or a row has nothing to learn.
        Spans alone never take all: the last place that learns is no span's inner one.
    """
    batch = dict(self.rows.batch(indices))
    if self.encoder_length:
      spans = self._spans(batch, epoch)
      batch |= encoded_spans(
        batch["tokens"], spans, self.encoder_length, bos_id=self.rows.bos_id,
        pad_id=self.rows.pad_id)
      masks = [semi_causal_mask(of_row, self.rows.length) for of_row in spans]
      batch["loss_mask"] = batch["loss_mask"] * np.stack(masks)
    learns = batch["loss_mask"].any(axis=1)
    if not learns.all():
      identifier = int(batch["example_id"][np.argmin(learns)])
      raise ValueError(
        f"the example {identifier} has no token to learn, with spans or without; leave it out."
      )
    return {**batch, "weight": token_weights(batch["loss_mask"])}

  def num_learned(
    self, indices: Sequence[int] | np.ndarray, epoch: int | np.ndarray = 0
  ) -> np.ndarray:
    """Number of learned tokens of rows, `[n] int64`."""
    return (self.batch(indices, epoch)["loss_mask"] != 0).sum(axis=1, dtype=np.int64)

  def counts(
    self, indices: Sequence[int] | np.ndarray, epoch: int | np.ndarray = 0
  ) -> dict[str, int]:
    """What the spans of rows come to, for reports.

    Returns:
      `rows`, `rows_without_span`, `spans`, `encoded_tokens`, `learned_tokens`.
    """
    batch = self.batch(indices, epoch)
    counts = Counter(rows=len(batch["tokens"]), learned_tokens=int(batch["loss_mask"].sum()))
    if self.encoder_length:
      num_spans = batch["encoder_segments"].max(axis=1)
      counts["spans"] = int(num_spans.sum())
      counts["rows_without_span"] = int((num_spans == 0).sum())
      counts["encoded_tokens"] = int((batch["vector_index"] >= 0).sum())
    names = ("rows", "rows_without_span", "spans", "encoded_tokens", "learned_tokens")
    return {name: counts[name] for name in names}

  def _spans(
    self, batch: Mapping[str, np.ndarray], epoch: int | np.ndarray
  ) -> list[np.ndarray]:
    """The spans of each row. What stands behind the last place that learns is padding, or the end
    of a document, and is not counted among the row's tokens."""
    is_end = batch["tokens"] == self.rows.eos_id
    places = np.arange(1, is_end.shape[1] + 1)
    num_tokens = np.max(places * (batch["loss_mask"] > 0), axis=1, initial=0)
    found = []
    epochs = np.broadcast_to(epoch, len(num_tokens))
    for tokens, ends, n, identifier, draw in zip(
        batch["tokens"], is_end, num_tokens.tolist(), batch["example_id"].tolist(),
        epochs.tolist()):
      tokens, ends = tokens[:n], ends[:n]
      spans = self.sampler.spans(tokens, ends, generator(self.seed, identifier, draw))
      check_spans(
        spans, n, f"the example {identifier}", longest=self._longest, document_ends=ends)
      found.append(spans)
    return found
