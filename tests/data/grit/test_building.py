"""Captions to rows of GrIT in files, stopped and gone on with."""

import dataclasses
import json

import pytest

from lmops_jax.data import DetectorFunction, GritJsonl, GritShards, RecordedBoxes
from lmops_jax.data.grit import building
from lmops_jax.data.grit.building import Rules, read_phrases, write_phrases, write_rows
from lmops_jax.data.grit.detection import Detection
from lmops_jax.data.grit.files import write_shard
from lmops_jax.data.grit.phrases import Phrase, Phrases
from lmops_jax.data.grit.records import GritRow, Region
from lmops_jax.data.grit.rows import grounded_row
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


@pytest.mark.parametrize("phrase", [-1, 3])
def test_boxes_of_phrases_that_were_not_asked_for_are_refused(phrase):
  with pytest.raises(ValueError, match=f"gave f:1 a box of phrase {phrase}, and it was asked f"):
    _grounded(Detection(phrase, A, 0.9))


@pytest.fixture
def corpus(folder, row, write):
  rows = [row(i, image=f"{i}.png") for i in (1, 2, 3, 4)]
  rows[2:2] = [row(8, "of nothing", image="1.png"), row(9, image="broken.png")]
  return GritJsonl(write(rows), pictures=str(folder))


def _detect(pixels, phrases):
  assert pixels.shape == (40, 60, 3)
  return [([A], [0.9]) if phrase == "a dog" else ([B], [0.7]) for phrase in phrases]


DETECTOR = DetectorFunction(_detect, "1")


def _built(directory, corpus, detector=DETECTOR, finder=None, form="jsonl", spread=None):
  chosen = {} if spread is None else {"spread": spread}
  found = write_phrases(directory, corpus, finder or _Finder(), rows_per_file=2, **chosen)
  rules = Rules(**RULES, form=form, rows_per_file=2, batch_size=1)
  return found, write_rows(directory, corpus, directory, detector, rules, **chosen)


def _files(directory):
  return {
    str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("*/[!.]*")}


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
  assert [e.id for e in again] == [1, 2, 3, 4]
  assert set(left_out.counts) == {"hidden"}  # seals, which go when a stage ends
  assert again[0].row.ref_exps == (Region(0, 27, A, 0.9),)
  assert again[0].row.others["width"] == 60 and again[0].row.others["url"] == "http://x/1"
  assert again[3].picture.read() == (folder / "4.png").read_bytes()
  question = json.loads((tmp_path / "phrases/000000-000000.jsonl").read_text().splitlines()[0])
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
  write_phrases(tmp_path, corpus, _Finder(), rows_per_file=2)
  for rows in ([row(1, "another dog", image="1.png")], [row(1, image="1.png")]):
    write(rows)
    with pytest.raises(ValueError, match="captions changed meanwhile; run the stage of the phra"):
      list(read_phrases(tmp_path, 0, corpus.examples(LeftOut())))


def test_parts_are_lists_of_a_size():
  assert list(building.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


class _Backwards:
  """Does items last first, and each twice, as a cluster may."""

  def each(self, function, items, *, setup):
    for item in reversed(list(items)):
      function(setup(), item)
      function(setup(), item)


@pytest.fixture
def three_files(folder, row, tmp_path):
  """Captions in three files, some without a picture."""
  (tmp_path / "in").mkdir()
  for name, ids in (("a", (1, 2, 3)), ("b", (4, 77)), ("c", (2, 1))):
    (tmp_path / f"in/{name}.jsonl").write_text("".join(
      json.dumps(row(f"{name}{i}", image=f"{i}.png")) + "\n" for i in ids))
  return GritJsonl(str(tmp_path / "in"), pictures=str(folder))


def test_files_are_the_same_whoever_does_them(three_files, tmp_path):
  found = _built(tmp_path / "here", three_files)
  again = _built(tmp_path / "there", three_files, spread=_Backwards())
  assert _files(tmp_path / "here") == _files(tmp_path / "there")
  assert [side.counts for side in found] == [side.counts for side in again]
  assert found[0].counts["without_file"] == 1 and found[1].counts["rows"] == 6
  names = sorted(path.name for path in (tmp_path / "there/rows").glob("*.jsonl"))
  assert names == [f"{piece}.jsonl" for piece in (
    "000000-000000", "000000-000001", "000001-000000", "000002-000000")]
  whole = [e.source for e in three_files.examples(LeftOut())]
  assert whole == [
    e.source for piece in three_files.pieces() for e in piece.examples(LeftOut())]


@pytest.mark.parametrize("form", ["jsonl", "tar"])
def test_a_part_of_which_nothing_is_left_is_an_empty_file(corpus, tmp_path, form):
  _, rows = _built(tmp_path, corpus, DetectorFunction(lambda *_: [([], [])] * 3, "1"), form=form)
  assert rows.counts == {"without_box": 4, "unreadable": 1}
  read = GritJsonl if form == "jsonl" else GritShards
  left_out = LeftOut()
  assert not list(read(str(tmp_path / "rows")).examples(left_out))
  assert set(left_out.counts) == {"hidden"}


def test_a_damaged_file_is_made_again(three_files, tmp_path):
  _built(tmp_path / "run", three_files)
  before = _files(tmp_path / "run")
  (tmp_path / "run/rows/000001-000000.jsonl").write_text("{")
  _built(tmp_path / "run", three_files)
  assert _files(tmp_path / "run") == before


def test_on_beam(three_files, tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra `beam`")
  from lmops_jax.data import Engine

  threads = Engine(["--direct_num_workers=2", "--direct_running_mode=multi_threading"])
  _built(tmp_path / "here", three_files)
  _, rows = _built(tmp_path / "beam", three_files, spread=threads)
  assert _files(tmp_path / "beam") == _files(tmp_path / "here") and rows.counts["rows"] == 6
