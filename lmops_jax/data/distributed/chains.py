"""Where instances begin, found for every part of a corpus on its own.

`packing.pack` cuts one stream of tokens from its first to its last, and where an instance begins
depends on all before it. But how far an instance reaches depends only on the tokens from its
beginning on. A part of the stream therefore is a map: from the place where its first instance
begins, which is one of the first `length`, to the place where the next part's first instance
begins, and the number of instances in between. The maps of all parts are made side by side and
followed one after another, which then takes one look-up a part.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lmops_jax.data import packing


class Chain(NamedTuple):
  """What a part of a stream does to an instance that begins `i` tokens after the part's begin.

  Attributes:
    exits: `[length] int64`, how far after the part's end the next part's first instance begins.
    counts: `[length] int64`, how many instances begin in the part.
  """

  exits: np.ndarray
  counts: np.ndarray


class Entry(NamedTuple):
  """Where a part's first instance begins, in tokens, and how many instances come before it."""

  offset: int
  first_index: int


def chain(
  tokens: np.ndarray, tail: np.ndarray, *, length: int, bos_id: int, eos_id: int, sentence_end=None
) -> Chain:
  """The map of one part.

  Args:
    tokens: `[n]`, the part: every document's ids and EOS.
    tail: `[length]`, the tokens after the part; fewer only if the stream ends before.
    length, bos_id, eos_id, sentence_end: as in `packing.pack`.

  Raises:
    ValueError: for a `sentence_end` that cannot be told token by token.
  """
  ends = packing.end_flags(sentence_end, eos_id)
  if sentence_end is not None and ends is None:
    raise ValueError(
      f"{sentence_end!r} gives no flag a token, so instances cannot be cut side by side; give a "
      "table or a rule with `ends`."
    )
  num = len(tokens)
  stream = np.concatenate([tokens, tail[:length]])
  begin = np.arange(num)
  stop = np.minimum(begin + length, len(stream))
  if ends is not None and len(stream) > length:
    flags = ends(stream[:-1], int(stream[-1]))
    last_end = np.maximum.accumulate(np.where(flags, np.arange(1, len(stream)), 0))
    full = begin + length < len(stream)  # others hold all that is left
    cut = last_end[stop[full] - 1]
    stop[full] = np.where(cut > begin[full], cut, stop[full])
  counted = np.ones(num, np.int64)
  if bos_id == eos_id:  # an instance of nothing but EOS inputs is left out
    others = np.concatenate([[0], np.cumsum(stream != eos_id)])
    counted = (others[stop - 1] > others[begin]).astype(np.int64)

  place = np.arange(length)
  counts = np.zeros(length, np.int64)
  inside = np.flatnonzero(place < num)
  while len(inside):
    counts[inside] += counted[place[inside]]
    place[inside] = stop[place[inside]]
    inside = inside[place[inside] < num]
  return Chain(place - num, counts)


def follow(chains: Iterable[Chain]) -> tuple[list[Entry], int]:
  """Entries of all parts in order, and the number of instances of the whole."""
  entries = []
  offset = first_index = 0
  for part in chains:
    entries.append(Entry(offset, first_index))
    first_index += int(part.counts[offset])
    offset = int(part.exits[offset])
  return entries, first_index
