"""Spans of a row that a bidirectional encoder reads: which they are, and what is learned beside.

From MetaLM (arXiv:2206.06336, section 2.2): a causal decoder gets some stretches of its row as
vectors of an encoder that sees the whole stretch at once. Learned are all tokens outside of spans
and the first token of every span; a span's other tokens are known to whoever reads its vectors.

Spans are `[k,2] int32`, half-open places `[start, end)` in the row's input, ordered and disjoint.
Place 0 is the start token, which no span holds.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from lmops_jax.config.setting_types import Part, PositiveInt, at_least, component


@runtime_checkable
class SpanSampler(Protocol):
  """How the spans of a row are chosen."""

  def spans(
    self, tokens: np.ndarray, document_ends: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """The spans of a row, `[k,2] int32`; k is 0 for a row that is too short for one.

    Args:
      tokens: `[n] int32`, the start token first, without padding.
      document_ends: `[n] bool`, the tokens that end a document, which no span holds.
      rng: where chance comes from.
    """

  def encoder_length(self, length: int) -> int:
    """The most places of the encoder that the spans of a row take, a start token each included.

    Args:
      length: the most tokens of a row.

    Returns:
      0 if no row has a span.

    Raises:
      ValueError: if rows of this length are too short for the spans that are asked for.
    """

  def longest_span(self, length: int) -> int:
    """The most tokens that a span of a row of at most `length` tokens has; 0 for no spans."""


@component(module="data")
@dataclasses.dataclass(frozen=True)
class RandomSpans:
  """Random spans in disjoint windows, until they are a given share of the row (semi-causal).

  The windows of `window` tokens begin at 1, 1 + window, ..., below n - 1.5 window, and are visited
  in random order until more than `proportion` of the row is in spans. In a window without the end
  of a document a place c is drawn: the span is the window up to and with c if c is in its second
  half, else from c on. In a window with one end the span is what follows the end; if that is short,
  or there are several ends, the window is passed over. So spans of whole windows have more than
  half a window's tokens: 65 to 128 in MetaLM. Rows of at most 2.5 windows and one token get none.

  Attributes:
    window: w, tokens of a window, and of the longest span.
    proportion: r, of the n - 1 tokens behind the start token.
    least_tail: tokens of a window that must be left from the end of a document on, that end
      included, for a span behind it.
  """

  window: at_least(2) = 128
  proportion: Part = 0.25
  least_tail: at_least(2) = 20

  def spans(
    self, tokens: np.ndarray, document_ends: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """See `SpanSampler`."""
    starts = self._starts(len(tokens))
    if not len(starts):
      return _no_spans()
    w = self.window
    order = rng.permutation(len(starts))
    place = rng.integers(0, w, len(starts))
    ends = np.flatnonzero(document_ends)
    first, behind = np.searchsorted(ends, starts), np.searchsorted(ends, starts + w)
    num_ends = behind - first
    in_second_half = 2 * place >= w
    start = np.where(in_second_half, starts, starts + place)
    stop = np.where(in_second_half, starts + place + 1, starts + w)
    if len(ends):
      one = num_ends == 1
      boundary = ends[np.minimum(first, len(ends) - 1)]
      start, stop = np.where(one, boundary + 1, start), np.where(one, starts + w, stop)
      is_fit = (num_ends == 0) | (one & (starts + w - boundary >= self.least_tail))
      order = order[is_fit[order]]
    total = np.cumsum((stop - start)[order])
    limit = self.proportion * (len(tokens) - 1)
    num = np.searchsorted(total, limit, side="right") + 1  # the first total above it is the last
    chosen = np.sort(order[:num])
    return np.stack([start[chosen], stop[chosen]], axis=1).astype(np.int32)

  def encoder_length(self, length: int) -> int:
    """See `SpanSampler`.

    All spans but the one that is drawn last are together within `proportion`, that one has at most
    a window's tokens, and there are at most as many spans as windows.
    """
    num_windows = len(self._starts(length))
    if not num_windows:
      raise ValueError(
        f"data.RandomSpans.window={self.window} needs rows of more than {2.5 * self.window + 1:g} "
        f"tokens, and these have {length}; make the window smaller or the rows longer."
      )
    within = int(self.proportion * (length - 1))
    return min(within, (num_windows - 1) * self.window) + self.window + num_windows

  def longest_span(self, length: int) -> int:
    """See `SpanSampler`."""
    return self.window

  def _starts(self, length: int) -> np.ndarray:
    """The places at which windows begin, ascending; none for a row that is too short."""
    w = self.window
    if 2 * length <= 5 * w + 2:
      return np.zeros(0, np.int64)
    return np.arange(1, (2 * length - 3 * w + 1) // 2, w)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class PrefixSpan:
  """One span at the start of a row, behind the start token (the objective of a prefix LM).

  Its length is uniform from 1 up to a limit. It ends in front of the first end of a document; a row
  that begins with one has no span.

  Attributes:
    longest: the limit in tokens.
    share: the limit as a share of the n - 1 tokens behind the start token; the lower limit counts.
  """

  longest: PositiveInt = 511
  share: Part = 0.5

  def spans(
    self, tokens: np.ndarray, document_ends: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """See `SpanSampler`."""
    limit = self.longest_span(len(tokens))
    if not limit:
      return _no_spans()
    stop = 1 + int(rng.integers(1, limit + 1))
    in_the_way = np.flatnonzero(document_ends[1:stop])
    stop = 1 + int(in_the_way[0]) if len(in_the_way) else stop
    return np.array([[1, stop]], np.int32) if stop > 1 else _no_spans()

  def encoder_length(self, length: int) -> int:
    """See `SpanSampler`."""
    longest = self.longest_span(length)
    if not longest:
      raise ValueError(
        f"data.PrefixSpan.share={self.share} of a row of {length} tokens is no whole token; raise "
        "it, or make the rows longer."
      )
    return longest + 1

  def longest_span(self, length: int) -> int:
    """See `SpanSampler`."""
    return max(min(self.longest, int(self.share * (length - 1))), 0)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class NoSpans:
  """No span: the causal objective, and no encoder."""

  def spans(
    self, tokens: np.ndarray, document_ends: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """See `SpanSampler`."""
    return _no_spans()

  def encoder_length(self, length: int) -> int:
    """See `SpanSampler`."""
    return 0

  def longest_span(self, length: int) -> int:
    """See `SpanSampler`."""
    return 0


def _no_spans() -> np.ndarray:
  return np.zeros((0, 2), np.int32)


def semi_causal_mask(spans: np.ndarray, length: int) -> np.ndarray:
  """Which places of the input predict a token that is learned, `[length] bool`.

  Place p predicts token p + 1, and is False for start <= p <= end - 2 of a span, whose vectors up
  to p hold token p + 1 already. The place in front of a span predicts its first token, and the
  span's last place the token behind it.

  Args:
    spans: `[k,2]`, see the module.
    length: places of the input.
  """
  mask = np.ones(length, bool)
  for start, end in np.asarray(spans).tolist():
    mask[start : end - 1] = False
  return mask


def check_spans(
  spans: np.ndarray, length: int, where: str, *, longest: int | None = None,
  document_ends: np.ndarray | None = None,
) -> None:
  """Refuses spans that a row cannot have.

  Args:
    spans: `[k,2]` integers.
    length: tokens of the row's input.
    where: names the row in errors.
    longest: the most tokens of a span; None is no limit.
    document_ends: `[length] bool`, tokens that no span may hold; None if there are none.

  Raises:
    ValueError: for another shape or type, or a span that is empty, starts at the start token, ends
      behind the row, overlaps with the one in front or stands before it, is too long, or crosses
      the end of a document.
  """
  spans = np.asarray(spans)
  if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype.kind not in "iu":
    raise ValueError(
      f"{where} has spans of shape {spans.shape} and type {spans.dtype}; give whole numbers "
      "[k, 2], the start and the end of each."
    )
  start, end = spans.astype(np.int64).T
  ahead = np.concatenate([[1], end[:-1]])
  sizes = end - start
  _refuse(spans, start < 1, where, "starts at the start token or in front of it; start at 1 or "
          "later")
  _refuse(spans, sizes < 1, where, "is empty or ends before it starts; leave it out")
  _refuse(spans, end > length, where, f"ends behind the row's {length} tokens; end it there")
  _refuse(spans, start < ahead, where, "overlaps with the span in front of it, or stands before "
          "it; give disjoint spans in order")
  if longest is not None:
    _refuse(spans, sizes > longest, where, f"is longer than the {longest} tokens that the encoder "
            "reads behind its start token; make it shorter")
  if document_ends is not None:
    before = np.concatenate([[0], np.cumsum(document_ends)])
    _refuse(spans, before[end] > before[start], where, "crosses the end of a document; end it in "
            "front of that")


def _refuse(spans: np.ndarray, is_wrong: np.ndarray, where: str, fault: str) -> None:
  if is_wrong.any():
    start, end = spans[np.argmax(is_wrong)].tolist()
    raise ValueError(f"{where} has the span [{start}, {end}), which {fault}.")
