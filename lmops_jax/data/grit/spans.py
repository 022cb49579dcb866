"""Which stretches of a caption keep their boxes, from scores and places alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmops_jax.data.grit.records import Region
from lmops_jax.data.grounded_text import Located


def confident(regions: Iterable[Region], min_score: float) -> list[Region]:
  """Regions with a score above `min_score`."""
  return [region for region in regions if region.score > min_score]


def outermost(regions: Sequence[Region]) -> list[Region]:
  """Regions whose stretch lies in no other stretch; those with equal ends stay together."""
  ends = {(region.start, region.end) for region in regions}
  return [
    region for region in regions
    if not any(
      start <= region.start and region.end <= end and (start, end) != (region.start, region.end)
      for start, end in ends)
  ]


def merged(regions: Iterable[Region]) -> tuple[list[Located], int]:
  """Stretches with all boxes of the regions with these ends, in the order of their beginnings.

  Returns:
    The stretches, and how many were left out since they reach into the one before: tags cannot
    cross. Of two with one beginning the longer stays. Boxes stay in the order of the regions.
  """
  boxes: dict[tuple[int, int], list] = {}
  for region in regions:
    boxes.setdefault((region.start, region.end), []).append(region.box)
  found: list[Located] = []
  for start, end in sorted(boxes, key=lambda ends: (ends[0], -ends[1])):
    if not found or start >= found[-1].end:
      found.append(Located(start, end, tuple(boxes[start, end])))
  return found, len(boxes) - len(found)
