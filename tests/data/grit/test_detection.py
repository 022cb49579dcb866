"""Detectors, and which of their boxes count."""

import math

import numpy as np
import pytest

from lmops_jax.data import DetectorFunction, RecordedBoxes
from lmops_jax.data.documents import document_id
from lmops_jax.data.grit.detection import Detection, Question, selected
from lmops_jax.data.multimodal import LeftOut

A, NEAR_A, B = (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.45), (0.5, 0.5, 1.0, 1.0)
PIXELS = np.zeros((4, 6, 3), np.uint8)


def _selected(*found, **settings):
  left_out = LeftOut()
  kept = selected(found, **{
    "min_score": 0.65, "max_overlap": 0.5, "where": "f:1", "left_out": left_out, **settings})
  return kept, left_out


def test_the_surest_box_stays_whatever_its_phrase():
  kept, left_out = _selected(
    Detection(0, NEAR_A, 0.7), Detection(1, A, 0.9), Detection(1, B, 0.8), Detection(2, B, 0.65))
  assert kept == [Detection(1, A, 0.9), Detection(1, B, 0.8)]
  assert left_out.counts == {"suppressed": 1, "low_score": 1}
  kept, left_out = _selected(Detection(0, NEAR_A, 0.7), Detection(1, A, 0.9), max_overlap=0.95)
  assert len(kept) == 2 and not left_out.counts


@pytest.mark.parametrize("box, score, reason", [
  (A, math.nan, "bad_score"), (A, math.inf, "bad_score"), ((0.5, 0, 0.5, 1), 0.9, "bad_box"),
  ((0, 0, 300, 200), 0.9, "bad_box"), ((math.nan, 0, 1, 1), 0.9, "bad_box")])
def test_what_is_no_box_is_counted_and_named(box, score, reason):
  kept, left_out = _selected(Detection(0, box, score), Detection(0, B, 0.8))
  assert kept == [Detection(0, B, 0.8)] and left_out.counts == {reason: 1}
  assert left_out.named[reason][0].startswith("f:1: the detector gave the")


def _question(identifier, *phrases):
  return Question(identifier, " ".join(phrases), phrases, PIXELS)


def test_recorded_boxes_belong_to_phrases_by_their_words(write):
  detector = RecordedBoxes(write([
    {"id": 1, "boxes": [{"phrase": "a dog", "box": list(A), "score": 0.9},
                        {"phrase": "a cat", "box": list(B), "score": 1}]},
    {"id": "x", "boxes": []}]))
  found = detector.detect([
    _question(1, "a dog", "a car", "a dog"), _question(document_id("x"), "a"), _question(3, "a")])
  assert found == [[Detection(0, A, 0.9), Detection(2, A, 0.9)], [], None]
  before = detector.fingerprint()
  write([{"id": 1, "boxes": []}])
  assert detector.fingerprint() != before


@pytest.mark.parametrize("rows, message", [
  ([{"boxes": []}], "rows.jsonl:1: field 'id' holds None"),
  ([{"id": 1}], 'rows.jsonl:1 has no list in the field "boxes"'),
  ([{"id": 1, "boxes": [[0, 5]]}], "rows.jsonl:1 has the box .*0, 5"),
  ([{"id": 1, "boxes": [{"phrase": "a", "box": [0, 1, 2], "score": 1}]}], "4 numbers"),
  ([{"id": 1, "boxes": [{"phrase": "a", "box": list(A), "score": None}]}], 'a number "score"'),
  ([{"id": 1, "boxes": []}, {"id": 1, "boxes": []}], "rows.jsonl:2 has the id 1, as an earlier"),
])
def test_recorded_boxes_of_another_form_are_refused(write, rows, message):
  with pytest.raises(ValueError, match=message):
    RecordedBoxes(write(rows)).detect([_question(1, "a")])


def test_a_function_is_a_detector():
  def corner(pixels, phrases):
    assert pixels is PIXELS
    return [([A, B], [0.9, 0.5]) if phrase == "a dog" else ([], []) for phrase in phrases]

  detector = DetectorFunction(corner, "v1")
  found, = detector.detect([_question(1, "a car", "a dog")])
  assert found == [Detection(1, A, 0.9), Detection(1, B, 0.5)] and detector.fingerprint() == "v1"


@pytest.mark.parametrize("answer, message", [
  ([], "gave 0 pairs for the 1 phrases of the example 7"),
  ([([A], [0.9, 0.8])], r"gave boxes \[1, 4\] and scores \[2\] for the phrase 'a'"),
  ([(A, 0.9)], r"boxes \[4\] and scores \[\]"),
  ([([A[:2], A[2:]], [0.9])], r"boxes \[2, 2\] and scores \[1\]"),
])
def test_a_function_that_answers_otherwise_is_refused(answer, message):
  with pytest.raises(ValueError, match=message):
    DetectorFunction(lambda pixels, phrases: answer, "v1").detect([_question(7, "a")])
