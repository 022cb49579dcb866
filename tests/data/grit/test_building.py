"""Captions to rows of GrIT in files, stopped and gone on with."""

import dataclasses
import json

import pytest

from lmops_jax.data import DetectorFunction, GritJsonl, GritShards, RecordedBoxes
from lmops_jax.data.grit import building
from lmops_jax.data.grit.building import grounded_row, read_phrases, write_phrases, write_rows
from lmops_jax.data.grit.detection import Detection
from lmops_jax.data.grit.files import write_shard
from lmops_jax.data.grit.phrases import Phrase, Phrases
from lmops_jax.data.grit.records import GritRow, Region
from lmops_jax.data.multimodal import LeftOut

CAPTION = "a dog in a field of flowers"
DOG, FIELD, FLOWERS = Phrase(0, 5, 0, 27), Phrase(9, 16, 9, 27), Phrase(20, 27, 20, 27)
A, B = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
RULES = {"min_score": 0.65, "max_overlap": 0.5}


class _Finder:
  """The phrases of one caption; it notes what it is asked."""

  def __init__(self):
    self.asked = []

  def fingerprint(self):
    return "1"

  def phrases(self, captions):
    self.asked += captions
    return [
      Phrases((DOG, FIELD, FLOWERS), 0) if caption == CAPTION else Phrases((), 2)
      for caption in captions]


def _grounded(*detections):
  left_out = LeftOut()
  row = grounded_row(
    GritRow(1, CAPTION), (DOG, FIELD, FLOWERS), detections, where="f:1", left_out=left_out, **RULES)
  return row, left_out


def test_the_papers_example():
  """The field's expression lies in the dog's, which has the dog's box."""
  row, left_out = _grounded(Detection(1, B, 0.8), Detection(0, A, 0.9))
  assert row.ref_exps == (Region(0, 27, A, 0.9),)
  assert row.noun_chunks == (Region(0, 5, A, 0.9), Region(9, 16, B, 0.8))
  assert left_out.counts == {"inside": 1}


def test_an_expression_needs_a_box_of_its_chunk():
  row, _ = _grounded(Detection(1, B, 0.8), Detection(0, A, 0.6), Detection(1, A, 0.7))
  assert row.ref_exps == (Region(9, 27, B, 0.8), Region(9, 27, A, 0.7))  # several boxes
  row, left_out = _grounded(Detection(0, A, 0.65))
  assert row is None and left_out.counts == {"low_score": 1}


@pytest.fixture
def corpus(folder, row, write):
  rows = [row(i, image=f"{i}.png") for i in (1, 2, 3, 4)]
  rows[2:2] = [row(8, "of nothing", image="1.png"), row(9, image="broken.png")]
  return GritJsonl(write(rows), pictures=str(folder))


def _detect(pixels, phrases):
  assert pixels.shape == (40, 60, 3)
  return [([A], [0.9]) if phrase == "a dog" else ([B], [0.7]) for phrase in phrases]


DETECTOR = DetectorFunction(_detect, "1")


def _built(directory, corpus, detector=DETECTOR, finder=None, form="jsonl"):
  found = write_phrases(
    directory, corpus.examples(LeftOut()), finder or _Finder(), rows_per_file=2)
  asked = read_phrases(directory, corpus.examples(LeftOut()))
  return found, write_rows(
    directory, asked, detector, form=form, rows_per_file=2, batch_size=1, **RULES)


def _files(directory):
  return {path.name: path.read_bytes() for path in sorted(directory.glob("*/*")) if path.is_file()}


def test_captions_become_rows(corpus, tmp_path, folder):
  phrases, rows = _built(tmp_path, corpus)
  assert phrases.counts == {"captions": 6, "phrases": 15, "abstract": 2, "without_phrase": 1}
  assert phrases.named["without_phrase"] == ["rows.jsonl:3"]
  # "flowers" has the box of "a field", which comes first.
  assert rows.counts == {
    "rows": 4, "chunks": 8, "chunk_boxes": 8, "expressions": 4, "expression_boxes": 4,
    "expression_words": 28,
    "suppressed": 4, "inside": 4, "unreadable": 1}
  assert "broken.png" in rows.named["unreadable"][0]
  left_out = LeftOut()
  again = list(GritJsonl(str(tmp_path / "rows")).examples(left_out))
  assert [e.id for e in again] == [1, 2, 3, 4] and not left_out.counts
  assert again[0].row.ref_exps == (Region(0, 27, A, 0.9),)
  assert again[0].row.others["width"] == 60 and again[0].row.others["url"] == "http://x/1"
  assert again[3].picture.read() == (folder / "4.png").read_bytes()
  question = json.loads((tmp_path / "phrases/000000.jsonl").read_text().splitlines()[0])
  assert question["phrases"] == ["a dog", "a field", "flowers"] and question["id"] == 1
  assert question["picture"][0] == str(folder / "1.png")


def test_a_stopped_run_goes_on_and_gives_the_same(corpus, tmp_path):
  _built(tmp_path / "whole", corpus)
  calls = []

  def stops(pixels, phrases):
    calls.append(phrases)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return _detect(pixels, phrases)

  finder = _Finder()
  with pytest.raises(KeyboardInterrupt):
    _built(tmp_path / "parts", corpus, DetectorFunction(stops, "1"), finder)
  num_asked = len(finder.asked)
  _, rows = _built(tmp_path / "parts", corpus, DetectorFunction(stops, "1"), finder)
  assert len(finder.asked) == num_asked == 6  # nothing is parsed again
  assert len(calls) == 2 + 1 + 2  # nor looked at, what was in a finished file
  assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
  assert rows.counts["rows"] == 4


def test_shards_hold_the_pictures(corpus, tmp_path, folder):
  left_out = LeftOut()
  write_shard(tmp_path / "in.tar", [e for e in corpus.examples(left_out) if e.id in (1, 2)])
  shards = GritShards(str(tmp_path / "in.tar"))
  _built(tmp_path / "out", shards, form="tar")
  again = list(GritShards(str(tmp_path / "out/rows")).examples(left_out))
  assert [e.picture.read() for e in again] == [
    (folder / f"{i}.png").read_bytes() for i in (1, 2)]
  assert again[1].row.ref_exps == (Region(0, 27, A, 0.9),)
  with pytest.raises(ValueError, match="in.tar:0+ is no file of its own.*write the form 'tar'"):
    _built(tmp_path / "lines", shards)


def test_boxes_from_elsewhere(corpus, tmp_path, write):
  """The phrases are the questions of a detector that runs elsewhere; 3 was not looked at."""
  boxes = [{"phrase": "a dog", "box": list(A), "score": 0.9}]
  detector = RecordedBoxes(write(
    [{"id": 1, "boxes": boxes}, {"id": 2, "boxes": []}, {"id": 4, "boxes": boxes}], "boxes.jsonl"))
  _, rows = _built(tmp_path, corpus, detector)
  assert rows.counts == {
    "rows": 2, "chunks": 2, "chunk_boxes": 2, "expressions": 2, "expression_boxes": 2,
    "expression_words": 14, "unreadable": 1, "not_looked_at": 1, "without_box": 1}
  assert rows.named["not_looked_at"] == ["rows.jsonl:5"]


def test_a_detector_answers_every_question(corpus, tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Silent:
    def detect(self, questions):
      return []

  with pytest.raises(ValueError, match="gave 0 answers to 1 questions"):
    _built(tmp_path, corpus, Silent())


def test_phrases_of_other_captions_are_refused(corpus, tmp_path, row, write):
  write_phrases(tmp_path, corpus.examples(LeftOut()), _Finder(), rows_per_file=2)
  for rows in ([row(1, "another dog", image="1.png")], [row(1, image="1.png")]):
    write(rows)
    with pytest.raises(ValueError, match="captions changed meanwhile; run the stage of the phra"):
      list(read_phrases(tmp_path, corpus.examples(LeftOut())))


def test_parts_are_lists_of_a_size():
  assert list(building.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
