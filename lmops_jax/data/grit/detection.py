"""Where the phrases of a caption are in its picture: detectors, and which of their boxes count.

GrIT (arXiv:2306.14824, section 3.1) takes a detector that is asked in words, such as GLIP. None is
part of this library: boxes come from a file that a detector has written elsewhere, from a function
of the user's own, or from any component with `Detector`'s methods.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lmops_jax.config.setting_types import Text, component
from lmops_jax.data import files, matching
from lmops_jax.data.box_overlap import suppressed
from lmops_jax.data.boxes import Box
from lmops_jax.data.documents import given_id
from lmops_jax.data.grit.records import clamped, is_box, is_number
from lmops_jax.data.lines import ENDINGS, jsonl_rows
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.host.foreign_files import printable
from lmops_jax.host.words import shortened


class Question(NamedTuple):
  """What a detector is asked.

  Attributes:
    id: the example's.
    caption: the whole caption.
    phrases: what to find, as it stands in the caption; two may be equal.
    pixels: `[height,width,3] uint8`, the picture as it is, upright.
  """

  id: int
  caption: str
  phrases: tuple[str, ...]
  pixels: np.ndarray


class Detection(NamedTuple):
  """A box of a phrase.

  Attributes:
    phrase: its index among the question's.
    box: x1, y1, x2, y2 as fractions of the picture.
    score: a finite number; what counts as sure is a setting of what reads it.
  """

  phrase: int
  box: Box
  score: float


@runtime_checkable
class Detector(Protocol):
  """A setting that finds phrases in pictures."""

  def fingerprint(self) -> str:
    """Changes when the boxes may."""

  def detect(self, questions: Sequence[Question]) -> Sequence[Sequence[Detection] | None]:
    """The boxes for each question, any number, in any order; None if it was not looked at."""


@component(module="data")
@dataclasses.dataclass(frozen=True)
class RecordedBoxes:
  """Boxes that a detector has written into JSON lines, all of which are held in memory.

      {"id": 17, "boxes": [{"phrase": "a dog", "box": [0.1, 0.2, 0.5, 0.9], "score": 0.83}]}

  Boxes are fractions of the picture. A box belongs to the phrases with its words.

  Attributes:
    path: a file, a folder (all its JSON lines files), or a pattern with `*` and `**`.
  """

  path: Text

  def fingerprint(self) -> str:
    return files.fingerprint(repr(self), self._found().files)

  def _found(self) -> matching.Found:
    return matching.matching(self.path, "data.RecordedBoxes.path", ENDINGS)

  def detect(self, questions: Sequence[Question]) -> list[list[Detection] | None]:
    """See `Detector`.

    Raises:
      ValueError: for a row of another form, or two with one id.
    """
    rows = self._rows
    return [
      None if question.id not in rows else [
        Detection(number, box, score) for phrase, box, score in rows[question.id]
        for number, asked in enumerate(question.phrases) if asked == phrase]
      for question in questions]

  @functools.cached_property
  def _rows(self) -> dict[int, list[tuple[str, Box, float]]]:
    """Phrase, box and score of each box, by the id of the example."""
    found: dict[int, list[tuple[str, Box, float]]] = {}
    for _, path in self._found().files:
      for number, row in jsonl_rows(path):
        where = f"{printable(path)}:{number}"
        identifier = given_id(row.get("id"), where, "id")
        if identifier in found:
          raise ValueError(
            f"{where} has the id {shortened(repr(row['id']), 60)}, as an earlier row; give all "
            "boxes of a picture in one row."
          )
        found[identifier] = [_recorded(entry, where) for entry in _listed(row, where)]
    return found


def _listed(row: Mapping[str, Any], where: str) -> list[Any]:
  if not isinstance(row.get("boxes"), list):
    raise ValueError(
      f'{where} has no list in the field "boxes"; give one, empty if nothing was found.')
  return row["boxes"]


def _recorded(entry: Any, where: str) -> tuple[str, Box, float]:
  fields = entry if isinstance(entry, dict) else {}
  phrase, box, score = (fields.get(name) for name in ("phrase", "box", "score"))
  is_sound = isinstance(phrase, str) and isinstance(box, list) and len(box) == 4
  if not is_sound or not all(map(is_number, (*box, score))):
    raise ValueError(
      f'{where} has the box {shortened(repr(entry), 60)}; a box is an object with a text "phrase", '
      '4 numbers "box" and a number "score".'
    )
  return phrase, tuple(map(float, box)), float(score)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class DetectorFunction:
  """A detector that is a function for one picture.

  Attributes:
    function: `(pixels [height,width,3] uint8, phrases) -> [(boxes [n,4], scores [n])]`, a pair for
      each phrase; boxes are fractions of the picture.
    version: a text to change when the function gives other boxes.
  """

  function: Callable[[np.ndarray, Sequence[str]], Sequence[tuple[Any, Any]]]
  version: Text

  def fingerprint(self) -> str:
    return self.version

  def detect(self, questions: Sequence[Question]) -> list[list[Detection]]:
    """See `Detector`.

    Raises:
      ValueError: if the function does not give a pair of as many boxes as scores for each phrase.
    """
    return [self._detect(question) for question in questions]

  def _detect(self, question: Question) -> list[Detection]:
    pairs = list(self.function(question.pixels, question.phrases))
    if len(pairs) != len(question.phrases):
      raise ValueError(
        f"data.DetectorFunction.function gave {len(pairs)} pairs for the {len(question.phrases)} "
        f"phrases of the example {question.id}; it should give boxes and scores for each."
      )
    found = []
    for number, (boxes, scores) in enumerate(pairs):
      boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
      if scores.ndim != 1 or boxes.size != 4 * len(scores) or boxes.shape[-1:] not in ((4,), (0,)):
        raise ValueError(
          f"data.DetectorFunction.function gave boxes {list(boxes.shape)} and scores "
          f"{list(scores.shape)} for the phrase {question.phrases[number]!r} of the example "
          f"{question.id}; it should give [n, 4] and [n]."
        )
      found += [
        Detection(number, tuple(box), score)
        for box, score in zip(boxes.reshape(-1, 4).tolist(), scores.tolist())]
    return found


def selected(
  detections: Iterable[Detection], *, min_score: float, max_overlap: float, where: str,
  left_out: LeftOut,
) -> list[Detection]:
  """The sure boxes that do not show what a surer one shows, of whatever phrase; surest first.

  Args:
    min_score: a score has to be above it.
    max_overlap: intersection over union above which two boxes show the same.
    where: names the example.
    left_out: gets boxes with a "bad_score" or that are a "bad_box" (as `records.parse`), with a
      "low_score", and those "suppressed".
  """
  sure = []
  for found in detections:
    if not math.isfinite(found.score):
      left_out.add("bad_score", f"{where}: the detector gave the score {found.score}")
    elif not is_box(found.box):
      left_out.add("bad_box", f"{where}: the detector gave the box {tuple(found.box)}")
    elif found.score > min_score:
      sure.append(found._replace(box=clamped(found.box)))
    else:
      left_out.counts["low_score"] += 1
  sure.sort(key=lambda found: -found.score)
  kept = suppressed(np.array([found.box for found in sure]).reshape(-1, 4), max_overlap)
  if len(kept) < len(sure):
    left_out.counts["suppressed"] += len(sure) - len(kept)
  return [sure[i] for i in kept]
