"""Boxes follow their pictures through the crop of training (arXiv:2306.14824, its code)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lmops_jax.data.grounded_text import GroundedText, Located
from lmops_jax.data.images import ImageSettings, cropped, upright_size
from lmops_jax.data.multimodal import LeftOut, Part, Picture, Record

LEAST_KEPT = 0.2  # of a box's area, within the crop


def cropped_boxes(boxes: np.ndarray, width: int, height: int, size: int) -> np.ndarray:
  """Where boxes lie within the square that `images.crop` cuts out.

  As in the code of Kosmos-2, half of the excess is taken off unrounded, and a box is cut at the
  square's edges.

  Args:
    boxes: `[n,4]`, x1, y1, x2, y2 as fractions of the picture.
    width, height: the picture's, in pixels. size: the square's side.

  Returns:
    `[n,4] float64` as fractions of the square, NaN for a box of which less than `LEAST_KEPT` of the
    area is left.
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  resized = np.array(cropped(width, height, size)[:2] * 2, np.float64)
  corners = boxes * resized
  inside = np.clip(corners - (resized - size) / 2, 0, size)
  area, kept = (np.prod(c[:, 2:] - c[:, :2], axis=1) for c in (corners, inside))
  return np.where(((kept > 0) & (kept >= LEAST_KEPT * area))[:, None], inside / size, np.nan)


def fitted(
  records: Iterable[Record], settings: ImageSettings, left_out: LeftOut
) -> Iterator[Record]:
  """Records whose boxes are fractions of the pictures as `settings` makes them.

  A stretch without a box left is no longer one, and a text without a stretch left is a plain text
  ("plain"). If that is a prompt, or boxes alone were the text, nothing is asked or answered any
  more, and the record is left out ("box_outside").

  Args:
    left_out: gets the above, the boxes that are lost ("lost_box"), and "unreadable" pictures.
  """
  for record in records:
    if settings.fit == "squash" or not any(isinstance(p, GroundedText) for p in record.parts):
      yield record
      continue
    try:
      parts = list(_cropped_parts(record, settings.height, left_out))
    except ValueError as error:
      left_out.add("unreadable", str(error))
      continue
    if None in parts:
      left_out.add("box_outside", record.source)
    else:
      yield record._replace(parts=tuple(parts))


def _cropped_parts(record: Record, side: int, left_out: LeftOut) -> Iterator[Part | None]:
  """The parts of a record, None for a text that is of no use without its boxes."""
  size = None
  for number, part in enumerate(record.parts):
    if isinstance(part, Picture):
      size = upright_size(part.read(), part.where)
    elif isinstance(part, GroundedText):
      spans = list(_cropped_spans(part.spans, size, side, left_out))
      if spans:
        part = GroundedText(part, spans, part.asks)
      elif number < record.num_given or not part:
        part = None
      else:
        left_out.counts["plain"] += 1
        part = str(part)
    yield part


def _cropped_spans(
  spans: Iterable[Located], size: tuple[int, int], side: int, left_out: LeftOut
) -> Iterator[Located]:
  """The stretches that keep a box, or had none."""
  for span in spans:
    found = cropped_boxes(span.boxes, *size, side)
    found = found[np.isfinite(found).all(axis=1)]
    if lost := len(span.boxes) - len(found):
      left_out.counts["lost_box"] += lost
    if len(found) or not span.boxes:
      yield span._replace(boxes=tuple(map(tuple, found.tolist())))
