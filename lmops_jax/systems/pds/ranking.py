"""The order of perturbed scores, and the search for the n-th of very many in bounded memory.

Larger scores come first, then smaller ids. Scores are compared as integers of the same order
(`keys`), so that a range of them can be cut into equal bins exactly. `Range` and its histograms,
which add up however a corpus is cut, find the threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LARGEST = (1 << 64) - 1
LAST_ID = (1 << 63) - 1
_SIGN = np.uint64(1 << 63)
_BIN_BITS = 18


def keys(values: np.ndarray) -> np.ndarray:
  """float64 numbers as integers in the same order, `[n] uint64`."""
  bits = (values + 0.0).view(np.uint64)  # adding zero makes -0.0 equal 0.0
  return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def unkey(key: int) -> float:
  """The number that has this key."""
  bits = key & ~(1 << 63) if key >> 63 else ~key & LARGEST
  return float(np.uint64(bits).view(np.float64))


def at_least(ids, keys, threshold) -> np.ndarray:
  """Which pairs are the threshold `(key, id)` or come before it, `[n] bool`."""
  key, last_id = np.uint64(threshold[0]), threshold[1]
  return (keys > key) | ((keys == key) & (ids <= last_id))


def nth_largest(ids, keys, n) -> tuple[int, int]:
  """The n-th (key, id) in the order "larger key, then smaller id", n >= 1."""
  key = np.partition(keys, len(keys) - n)[len(keys) - n]
  tied = ids[keys == key]
  place = n - int(np.count_nonzero(keys > key)) - 1
  return int(key), int(np.partition(tied, place)[place])


def digest(ids, keys) -> int:
  """Sum of a hash of each (id, key): does not depend on order, changes with any one value."""
  mixed = (ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ keys
  mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
  return int(np.sum(mixed ^ (mixed >> np.uint64(29)), dtype=np.uint64))


class Range(NamedTuple):
  """Where the threshold lies: it is the `rank`-th best pair of this range.

  Attributes:
    rank: 1 <= rank <= total.
    total: how many pairs the range holds.
    low, high: ends of the range, inclusive: either two keys (then all ids of those keys belong to
      it), or two inverted ids (2^63 - 1 - id) of the single key `key`.
  """

  rank: int
  total: int
  low: int = 0
  high: int = LARGEST
  key: int | None = None

  @property
  def _shift(self) -> int:
    return max((self.high - self.low).bit_length() - _BIN_BITS, 0)

  @property
  def num_bins(self) -> int:
    """At most 2^18, for a histogram of 2 MiB."""
    return ((self.high - self.low) >> self._shift) + 1

  def inside(self, ids, keys) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids and keys of the pairs in the range, and the digits that `histogram` counts."""
    if self.key is not None:
      inverted = np.uint64(LAST_ID) - ids.view(np.uint64)
      keep = (keys == np.uint64(self.key)) & (inverted >= self.low) & (inverted <= self.high)
      return ids[keep], keys[keep], inverted[keep]
    if self.low == 0 and self.high == LARGEST:
      return ids, keys, keys
    keep = (keys >= np.uint64(self.low)) & (keys <= np.uint64(self.high))
    return ids[keep], keys[keep], keys[keep]

  def histogram(self, digits) -> np.ndarray:
    """How many fall into each bin, `[num_bins] int64`."""
    bins = ((digits - np.uint64(self.low)) >> np.uint64(self._shift)).astype(np.int64)
    return np.bincount(bins, minlength=self.num_bins)

  def narrowed(self, histogram) -> Range:
    """The one bin that holds the threshold, by the histogram of the whole range."""
    above = histogram[::-1].cumsum()[::-1] - histogram
    chosen = int(np.flatnonzero((above < self.rank) & (self.rank <= above + histogram))[0])
    low = self.low + (chosen << self._shift)
    high = min(low + (1 << self._shift) - 1, self.high)
    rank, total = self.rank - int(above[chosen]), int(histogram[chosen])
    if self.key is None and low == high:
      return Range(rank, total, 0, LAST_ID, key=low)
    return Range(rank, total, low, high, self.key)
