"""Packing by first fit: each item goes into the first open bin with room, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_MAX_OPEN = 64  # older bins are nearly full


def first_fit(
  items: Iterable[tuple[Item, Sequence[int]]], room: Sequence[int], *, share: bool = True
) -> Iterator[list[Item]]:
  """Bins of items, in the order in which they were opened.

  Args:
    items: each with its size in every measure, such as tokens and pictures; none exceeds `room`.
    room: of a bin, in the same measures.
    share: False puts each item into a bin of its own.
  """
  bins: list[tuple[list[Item], list[int]]] = []
  for item, sizes in items:
    fitting = (b for b in bins if all(left >= size for left, size in zip(b[1], sizes)))
    chosen = next(fitting, None) if share else None
    if chosen is None:
      chosen = ([], list(room))
      bins.append(chosen)
    chosen[0].append(item)
    chosen[1][:] = (left - size for left, size in zip(chosen[1], sizes))
    if len(bins) > _MAX_OPEN:
      yield bins.pop(0)[0]
  for members, _ in bins:
    yield members
