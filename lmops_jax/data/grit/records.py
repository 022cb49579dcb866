"""GrIT's rows: a caption, where its picture is, and which of its stretches have which boxes.

    {"caption": "a dog in a field", "id": 17, "url": ..., "width": 640, "height": 480,
     "noun_chunks": [[0, 5, 0.1, 0.2, 0.5, 0.9, 0.83]], "ref_exps": [[0, 16, 0.1, ...]], ...}

A region is `[start, end, x1, y1, x2, y2, score]`: characters of the caption, the end excluded, and
fractions of the picture's width and height. `noun_chunks` are noun phrases as the detector was
asked for them, `ref_exps` the referring expressions made from them. A row without the two is a
caption to find boxes for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lmops_jax.data.boxes import Box
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.host.words import shortened

_LISTS = ("noun_chunks", "ref_exps")
_OVERHANG = 0.01  # detectors draw boxes a little beyond the picture


class Region(NamedTuple):
  """A stretch of a caption and a box of what it names.

  Attributes:
    start, end: characters, 0 <= start < end <= those of the caption.
    box: x1 < x2 and y1 < y2, fractions of the picture, from 0 to 1.
    score: the detector's, finite.
  """

  start: int
  end: int
  box: Box
  score: float


class GritRow(NamedTuple):
  """A caption with its regions.

  Attributes:
    id: whole number or text; None if the row has none.
    caption: as it stands in the data, since regions count its characters.
    noun_chunks, ref_exps: see the module.
    others: the row's other fields, such as url, width, height and the similarities.
  """

  id: int | str | None
  caption: str
  noun_chunks: tuple[Region, ...] = ()
  ref_exps: tuple[Region, ...] = ()
  others: Mapping[str, Any] = {}


def parse(row: Mapping[str, Any], where: str, left_out: LeftOut) -> GritRow:
  """A row of the released form.

  Args:
    row: the fields.
    where: file and line, for errors.
    left_out: gets regions that are left out: "bad_span" (not a stretch of the caption with more
      than blanks), "bad_score" (not finite) and "bad_box" (empty, not finite, or more than a
      hundredth beyond the picture, as pixels are); boxes a little beyond it are "clamped".

  Raises:
    ValueError: for a row of another form.
    UnicodeEncodeError: for a caption with half a character.
  """
  caption = row.get("caption")
  if not isinstance(caption, str):
    raise ValueError(
      f"{where} has the caption {shortened(repr(caption), 60)}; a row of GrIT has a text in the "
      'field "caption".'
    )
  caption.encode()  # half a character is no text
  identifier = row.get("id")
  if isinstance(identifier, bool) or not isinstance(identifier, int | str | None):
    raise ValueError(
      f"{where} has the id {shortened(repr(identifier), 60)}; an id is a whole number or a text."
    )
  regions = (
    tuple(_regions(row.get(name), caption, f"{where} {name}", left_out)) for name in _LISTS)
  others = {name: value for name, value in row.items() if name not in ("caption", "id", *_LISTS)}
  return GritRow(identifier, caption, *regions, others)


def _regions(entries: Any, caption: str, where: str, left_out: LeftOut) -> Iterable[Region]:
  if entries is None:
    return
  if not isinstance(entries, list):
    raise ValueError(f"{where} holds a {type(entries).__name__}, not a list of regions.")
  for number, entry in enumerate(entries):
    place = f"{where}[{number}]"
    if not isinstance(entry, list) or len(entry) != 7 or not all(map(is_number, entry)):
      raise ValueError(
        f"{place} is {shortened(repr(entry), 60)}; a region is a list of 7 numbers: start, end, "
        "x1, y1, x2, y2, score."
      )
    start, end, *box, score = entry
    if not math.isfinite(score):
      left_out.add("bad_score", f"{place} has the score {score}")
    elif not _is_stretch(start, end, caption):
      left_out.add(
        "bad_span", f"{place} is from {start} to {end} of a caption of {len(caption)} characters")
    elif not is_box(box):
      left_out.add("bad_box", f"{place} has the box {box}, not x1 < x2 and y1 < y2 in 0 to 1")
    else:
      inside = clamped(box)
      if inside != tuple(box):
        left_out.counts["clamped"] += 1
      yield Region(int(start), int(end), inside, float(score))


def is_number(value: Any) -> bool:
  """Whether a value of a foreign file is a number; true and false are none."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_stretch(start: float, end: float, caption: str) -> bool:
  """Whether there is a text other than blanks; tables keep whole numbers as floats."""
  if not (math.isfinite(start) and math.isfinite(end)) or start != int(start) or end != int(end):
    return False
  return 0 <= start < end <= len(caption) and bool(caption[int(start) : int(end)].strip())


def is_box(box: Iterable[float]) -> bool:
  """Whether numbers are x1 < x2 and y1 < y2 in fractions of a picture, or hardly beyond."""
  box = tuple(box)
  if not all(map(math.isfinite, box)):
    return False
  x1, y1, x2, y2 = clamped(box)
  return x1 < x2 and y1 < y2 and all(-_OVERHANG <= value <= 1 + _OVERHANG for value in box)


def clamped(box: Iterable[float]) -> Box:
  """A box within the picture."""
  return tuple(min(max(float(value), 0.0), 1.0) for value in box)


def as_row(row: GritRow) -> dict[str, Any]:
  """The fields of a row in the released form, from which `parse` makes the row again.

  Numbers among the other fields that are not finite, for which JSON has no word, become null.
  """
  fields: dict[str, Any] = {"caption": row.caption, **row.others}
  for name, value in row.others.items():
    if isinstance(value, float) and not math.isfinite(value):
      fields[name] = None
  if row.id is not None:
    fields["id"] = row.id
  for name, regions in zip(_LISTS, (row.noun_chunks, row.ref_exps)):
    fields[name] = [[r.start, r.end, *r.box, r.score] for r in regions]
  return fields

