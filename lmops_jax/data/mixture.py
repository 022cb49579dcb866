"""Rows of several sources in given proportions, as one endless list with random access.

Which source a row comes from, and which of its rows it is, are functions of (seed, number): the
sources alternate as evenly as they can by a fixed schedule, and each is walked through in epochs,
every epoch in another order. So a run resumes anywhere, and neither hosts nor workers change what a
step holds. A source may be shorter than a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lmops_jax.data.batches import epoch_permutation, token_weights
from lmops_jax.data.documents import document_id
from lmops_jax.host.hashing import order_key

PERIOD = 10_000  # rows in which the proportions are exact to one row


class Rows(Protocol):
  """Rows by index: `Instances`, `SupervisedSet`, `ImageRows` or the like."""

  def __len__(self) -> int: ...

  def batch(self, indices: np.ndarray) -> Mapping[str, np.ndarray]:
    """Arrays `[n,...]` of the rows `indices [n]`, `loss_mask` and `example_id` among them."""

  def num_learned(self, indices: np.ndarray) -> np.ndarray:
    """Learned tokens of each of the rows, `[n] int64`, read without their pictures."""


class Mixture:
  """Sources drawn from by weight.

  Args:
    sources: rows by the source's name. A source's order depends on its name and the seed alone.
    weights: a weight for each source, to which its share of the rows is proportional; None: the
      sources' numbers of rows. Shares are exact to one row in `PERIOD`; a weight above 0 gives at
      least one.
    seed: seed of the order.
    by_epoch: tell the sources the epochs of their rows as `epoch`, because rows are drawn anew in
      each.

  Raises:
    ValueError: for no source, weights for other sources, a weight that is negative or not finite,
      or one above 0 for an empty source.
  """

  def __init__(
    self, sources: Mapping[str, Rows], weights: Mapping[str, float] | None = None, seed: int = 0,
    *, by_epoch: bool = False,
  ):
    weights = {name: len(rows) for name, rows in sources.items()} if weights is None else weights
    _check_weights(sources, weights)
    self._names = [name for name in sources if weights[name] > 0]
    self._sources = [sources[name] for name in self._names]
    self._by_epoch = by_epoch
    self._schedule = schedule([weights[name] for name in self._names])
    self._counts = np.bincount(self._schedule, minlength=len(self._names))
    ranks = np.zeros(len(self._schedule), np.int64)
    for source, count in enumerate(self._counts):
      ranks[self._schedule == source] = np.arange(count)
    self._ranks = ranks
    self._walks = [
      _Walk(len(rows), order_key(document_id(name), seed))
      for name, rows in zip(self._names, self._sources)
    ]

  def draw(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows with some numbers come from.

    Args:
      numbers: `[n]`, 0 or more.

    Returns:
      The source of each, `[n]`, as an index into the names with a weight above 0, and the row
      within it, `[n]`.
    """
    source, steps = self._steps(numbers)
    rows = np.zeros(len(source), np.int64)
    for i, walk in enumerate(self._walks):
      chosen = source == i
      rows[chosen] = walk.at(steps[chosen])
    return source, rows

  def _steps(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source of each number, and how many of its rows came before."""
    periods, places = np.divmod(np.asarray(numbers, np.int64), len(self._schedule))
    source = self._schedule[places]
    return source, periods * self._counts[source] + self._ranks[places]

  def _told(self, numbers: np.ndarray, i: int) -> dict[str, np.ndarray]:
    """What the source i is told about its rows among those with some numbers."""
    if not self._by_epoch:
      return {}
    source, steps = self._steps(numbers)
    return {"epoch": steps[source == i] // len(self._sources[i])}

  def batch(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """The rows with some numbers, in that order.

    A `weight` that sources give is made anew: the mean over rows is one over learned tokens.

    Raises:
      ValueError: if two sources give different fields, or rows of different shapes.
    """
    source, rows = self.draw(numbers)
    merged: dict[str, np.ndarray] = {}
    first = None
    for i in np.unique(source):
      chosen = source == i
      batch = self._sources[i].batch(rows[chosen], **self._told(numbers, i))
      if first is None:
        first = i
        merged = {
          name: np.zeros((len(rows), *value.shape[1:]), value.dtype)
          for name, value in batch.items()
        }
      shapes = [
        {name: (value.shape[1:], value.dtype) for name, value in b.items()} for b in (merged, batch)
      ]
      if shapes[0] != shapes[1]:
        differing = sorted(
          name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
          f"the sources {self._names[first]!r} and {self._names[i]!r} of a mixture give rows that "
          f"differ in {', '.join(differing)}; make both with the same lengths, pictures a row and "
          "sizes."
        )
      for name, value in batch.items():
        merged[name][chosen] = value
    if "weight" in merged:  # that of each source's rows was among themselves
      merged["weight"] = token_weights(merged["loss_mask"])
    return merged

  def num_learned(self, numbers: np.ndarray) -> np.ndarray:
    """Number of learned tokens of the rows with some numbers, `[n] int64`."""
    source, rows = self.draw(numbers)
    learned = np.zeros(len(rows), np.int64)
    for i in np.unique(source):
      learned[source == i] = self._sources[i].num_learned(
        rows[source == i], **self._told(numbers, i))
    return learned


class _Walk:
  """The rows of a source in the order of its epochs, one after another without end."""

  def __init__(self, num_rows: int, seed: int):
    self._num_rows = num_rows
    # A cache of its own, since each source has other orders; a step touches at most two epochs,
    # unless it is longer than one.
    self._order = functools.lru_cache(maxsize=2)(
      lambda epoch: epoch_permutation.__wrapped__(seed, epoch, num_rows))

  def at(self, steps: np.ndarray) -> np.ndarray:
    """The rows at some steps of the walk."""
    epochs, places = np.divmod(steps, self._num_rows)
    rows = np.zeros(len(steps), np.int64)
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      rows[chosen] = self._order(int(epoch))[places[chosen]]
    return rows


def schedule(weights: Sequence[float], period: int = PERIOD) -> np.ndarray:
  """Which source each row of a period comes from, `[period] int32`.

  A source with k rows in the period has one in each k-th part of it, as near to that part's middle
  as the others let it.

  Args:
    weights: positive numbers. period: at least as many rows as sources.
  """
  share = np.asarray(weights, np.float64) / np.sum(weights) * period
  counts = np.maximum(np.floor(share).astype(np.int64), 1)
  while counts.sum() > period:
    counts[np.argmax(counts)] -= 1
  for i in np.argsort(counts - share, kind="stable")[: period - counts.sum()]:
    counts[i] += 1
  source = np.repeat(np.arange(len(counts)), counts)
  middles = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
  return source[np.argsort(middles, kind="stable")].astype(np.int32)


def _check_weights(sources: Mapping[str, Rows], weights: Mapping[str, float]) -> None:
  if not sources:
    raise ValueError("a mixture has no source; give it one at least.")
  if weights.keys() != sources.keys():
    raise ValueError(
      f"a mixture of {', '.join(sources)} has weights for {', '.join(weights) or 'none'}; give "
      "each source one weight."
    )
  for name, weight in weights.items():
    if not (math.isfinite(weight) and weight >= 0):
      raise ValueError(
        f"the source {name!r} of a mixture has the weight {weight}; weights are finite and not "
        "below 0."
      )
    if weight > 0 and not len(sources[name]):
      raise ValueError(
        f"the source {name!r} of a mixture has the weight {weight} and no row; give it rows, or "
        "the weight 0."
      )
  if not any(weights.values()):
    raise ValueError(
      f"all sources of a mixture ({', '.join(sources)}) have the weight 0; raise one.")
