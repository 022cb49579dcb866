"""Selecting the best share of a corpus by one worker, or by many that each see some of the scores.

The set is that of `selection.gumbel_top_k`, and memory does not grow with the corpus. A histogram
over the leading bits of all perturbed scores is a sketch of fixed size that adds up in any order
and any grouping; the bin that holds the threshold is cut into bins in turn, until so few scores are
left that they are collected and ranked exactly, ties by id. A last pass writes. Up to some hundred
million scores that is three passes. How the work is spread is not known here: `total` adds up a
function over items, wherever it runs. `select_in_process` is the selection in one process, of a
single item.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.systems.pds import ranking, selection


@dataclasses.dataclass(frozen=True)
class Sketch:
  """What is known about a set of perturbed scores; sketches of two sets add up to that of both.

  Attributes:
    count: how many scores there are. digest: changes with any one of them, modulo 2^64.
    histogram: how many scores fall into each bin of the range that is searched, `[bins] int64`, or
      `[]` for no range.
  """

  count: int
  digest: int
  histogram: np.ndarray

  def __add__(self, other: Sketch) -> Sketch:
    return Sketch(
      self.count + other.count, (self.digest + other.digest) & ranking.LARGEST,
      self.histogram + other.histogram,
    )


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Pairs near the threshold, in no particular order. `ids [n] int64`, `keys [n] uint64`."""

  ids: np.ndarray
  keys: np.ndarray

  def __add__(self, other: Candidates) -> Candidates:
    return Candidates(
      np.concatenate([self.ids, other.ids]), np.concatenate([self.keys, other.keys])
    )


class Selection(NamedTuple):
  """Figures of a selection; the indices and ids themselves went to `write`."""

  num_examples: int
  num_selected: int
  threshold: float  # smallest perturbed score that was kept
  num_passes: int


class Noise(NamedTuple):
  """The scale and the seed of the noise that perturbs the scores."""

  tau: float
  seed: int


def select(
  total: Callable[[Callable[[Any], Any], Iterable[Any], Any], Any],
  items: Iterable[Any],
  read: Callable[[Any], Iterable[tuple[np.ndarray, np.ndarray]]],
  write: Callable[[Any, Iterator[tuple[np.ndarray, np.ndarray]]], None],
  *,
  num_examples: int,
  ratio: float | None = None,
  k: int | None = None,
  tau: float,
  seed: int,
  max_candidates: int = 1 << 19,
) -> Selection:
  """Finds the threshold and writes what lies at or above it.

  Args:
    total: `total(function, items, zero)` is `zero + function(item) + ...` over all items.
    items: the parts of the corpus, however it is cut.
    read: the `(ids [n], scores [n])` shards of an item, the same in every pass; all ids are
      distinct and >= 0.
    write: called once for each item, with the item and an iterator over blocks `(rows [m], ids
      [m])` of what is selected from it; a row counts the item's scores from 0, in `read`'s order.
    num_examples: how many scores all items hold together.
    ratio, k, tau, seed: as in `selection.gumbel_top_k`.
    max_candidates: the most scores that are collected, >= 1.

  Raises:
    ValueError: for arguments that `gumbel_top_k` refuses, a number of scores that is not
      `num_examples`, an id that occurs twice at the threshold, or shards that changed between the
      passes.
  """
  count = selection.num_selected(num_examples, ratio=ratio, k=k)
  noise = Noise(*selection.checked_noise(tau, seed))
  if max_candidates < 1:
    raise ValueError(f"max_candidates={max_candidates} is too small to search with; use 1 or more.")
  items = list(items)
  blocks = functools.partial(_blocks, read, noise, num_examples)

  around = ranking.Range(rank=count, total=num_examples)
  num_passes, digest = 0, None
  while digest is None or around.total > max_candidates:
    sketch = total(functools.partial(_sketch, blocks, around), items, _empty(around.num_bins))
    num_passes += 1
    selection.check_count(sketch.count, num_examples)
    if digest is None:
      digest = sketch.digest
    selection.check_unchanged(sketch.digest, digest)
    narrowed = around.narrowed(sketch.histogram)
    if narrowed == around:  # one id, more often than candidates may be held
      selection.check_selected(around.total, around.rank, (0, ranking.LAST_ID - around.low))
    around = narrowed
  nobody = Candidates(np.empty(0, np.int64), np.empty(0, np.uint64))
  found = total(functools.partial(_candidates, blocks, around), items, nobody)
  selection.check_unchanged(len(found.ids), around.total)
  threshold = ranking.nth_largest(found.ids, found.keys, around.rank)

  seen = total(functools.partial(_write, blocks, write, threshold), items, _empty(0))
  selection.check_unchanged(seen.digest, digest)
  selection.check_selected(seen.count, count, threshold)
  return Selection(num_examples, count, ranking.unkey(threshold[0]), num_passes + 2)


def select_in_process(
  shards: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
  write: Callable[[np.ndarray, np.ndarray], None],
  **settings,
) -> Selection:
  """`select` in this process.

  Args:
    shards: called once a pass, returns the `(ids [n], scores [n])` shards.
    write: called with `(rows [m], ids [m])` of what is selected, block by block, m >= 1.
    settings: `num_examples`, `tau` and so on, as for `select`.
  """

  def total(function, items, zero):
    return sum(map(function, items), start=zero)

  def write_all(_, chosen) -> None:
    for rows, ids in chosen:
      write(rows, ids)

  return select(total, [None], lambda _: shards(), write_all, **settings)


def _empty(num_bins: int) -> Sketch:
  return Sketch(0, 0, np.zeros(num_bins, np.int64))


def _blocks(read, noise: Noise, num_examples: int, item):
  return selection.blocks(read(item), noise.tau, noise.seed, num_examples)


def _sketch(blocks, around: ranking.Range, item) -> Sketch:
  """The sketch of an item's perturbed scores."""
  count = digest = 0
  histogram = np.zeros(around.num_bins, np.int64)
  for ids, keys in blocks(item):
    count += len(ids)
    digest += ranking.digest(ids, keys)
    _, _, digits = around.inside(ids, keys)
    histogram += around.histogram(digits)
  return Sketch(count, digest & ranking.LARGEST, histogram)


def _candidates(blocks, around: ranking.Range, item) -> Candidates:
  """An item's pairs in the range."""
  ids, keys = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
  for block in blocks(item):
    inside_ids, inside_keys, _ = around.inside(*block)
    ids.append(inside_ids.copy())
    keys.append(inside_keys)
  return Candidates(np.concatenate(ids), np.concatenate(keys))


def _write(blocks, write, threshold, item) -> Sketch:
  """Writes what is selected from an item; returns its count, and the digest of all the scores."""
  count = digest = num_seen = 0

  def chosen():
    nonlocal count, digest, num_seen
    for ids, keys in blocks(item):
      digest += ranking.digest(ids, keys)
      kept = np.flatnonzero(ranking.at_least(ids, keys, threshold))
      if len(kept):
        count += len(kept)
        yield num_seen + kept, ids[kept]
      num_seen += len(ids)

  write(item, chosen())
  return Sketch(count, digest & ranking.LARGEST, np.zeros(0, np.int64))
