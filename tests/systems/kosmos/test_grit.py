"""`lmops kosmos grit`: captions to rows of GrIT as stages, with and without a detector."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.config.setting_types import component
from lmops_jax.data import GritJsonl
from lmops_jax.data.grit.detection import Detection
from lmops_jax.data.grit.phrases import Phrase, Phrases
from lmops_jax.data.multimodal import LeftOut

CAPTION = "a dog in a field of flowers"
TAGGED = (
  "a/DET/det/1 dog/NOUN/ROOT/1 in/ADP/prep/1 a/DET/det/4 field/NOUN/pobj/2 of/ADP/prep/4 "
  "flowers/NOUN/pobj/5",
  "a/DET/det/1 cat/NOUN/ROOT/1 on/ADP/prep/1 a/DET/det/4 mat/NOUN/pobj/2",
  "a/DET/det/1 dog/NOUN/ROOT/1 and/CCONJ/cc/1 a/DET/det/4 cat/NOUN/conj/1")


@component(module="grit_test")
@dataclasses.dataclass(frozen=True)
class ByWords:
  """Every "a dog", whose expression is the whole caption."""

  def fingerprint(self):
    return "words"

  def phrases(self, captions):
    return [
      Phrases((Phrase(0, 5, 0, len(caption)),) if caption.startswith("a dog") else (), 0)
      for caption in captions]


@component(module="grit_test")
@dataclasses.dataclass(frozen=True)
class Middle:
  """A box in the middle of pictures that are not black."""

  def fingerprint(self):
    return "middle"

  def detect(self, questions):
    return [
      [Detection(0, (0.25, 0.25, 0.75, 0.75), 0.9)] if q.pixels.any() else [] for q in questions]


@pytest.fixture
def captions(tmp_path):
  for i in range(3):
    Image.fromarray(np.full((40, 60, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
  path = tmp_path / "captions.jsonl"
  texts = [CAPTION, CAPTION, "no one", CAPTION]
  path.write_text("".join(
    json.dumps({"id": i, "image": f"{i % 3}.png", "caption": text}) + "\n"
    for i, text in enumerate(texts)))
  return str(path)


def _run(run_stages, captions, workdir, *bindings):
  own = workdir.parent / "own.gin"
  own.write_text("\n".join([
    "import lmops_jax.systems.kosmos", "run.system = @kosmos.Grit()", "run.mesh = None",
    "run.stages = None", "kosmos.Grit.captions = @data.GritJsonl()",
    f"data.GritJsonl.path = '{captions}'", "kosmos.Grit.finder = @grit_test.ByWords()",
    *bindings]))
  found = run_stages(own, workdir)
  summary = json.loads((workdir / "report/summary.json").read_text())
  return found.statuses, summary, found.system.table(summary)


def test_phrases_come_first_and_rows_when_there_is_a_detector(run_stages, captions, tmp_path):
  workdir = tmp_path / "run"
  _, summary, table = _run(run_stages, captions, workdir)
  assert summary["counts"] == {"phrases": {"captions": 4, "phrases": 3, "without_phrase": 1}}
  assert not summary["figures"] and "without_phrase" in table
  statuses, summary, table = _run(
    run_stages, captions, workdir, "kosmos.Grit.detector = @grit_test.Middle()",
    "kosmos.Grit.batch_size = 1")
  assert statuses["phrases"] == "cached" and statuses["rows"] == "ran"
  # Rows 0 and 3 show the black picture.
  assert summary["counts"]["rows"] == {
    "rows": 1, "chunks": 1, "chunk_boxes": 1, "expressions": 1, "expression_boxes": 1,
    "expression_words": 7, "without_box": 2}
  assert summary["figures"] == {
    "expressions a row": 1, "boxes an expression": 1, "words an expression": 7}
  assert "without_box" in table and (workdir / "report/index.html").exists()
  example, = GritJsonl(str(workdir / "rows/rows")).examples(LeftOut())
  assert example.id == 1 and example.row.ref_exps == (
    (0, 27, (0.25, 0.25, 0.75, 0.75), 0.9),)


def test_nothing_found_is_an_error_that_says_why(run_stages, captions, tmp_path):
  with pytest.raises(ValueError, match="no caption has rows .1 low_score, 3 without_box.; look"):
    _run(run_stages, captions, tmp_path / "run", "kosmos.Grit.detector = @grit_test.Middle()",
         "kosmos.Grit.min_score = 0.95")


def test_settings_of_another_type_are_refused(run_stages, captions, tmp_path):
  with pytest.raises(ValueError, match="kosmos.Grit.finder='en_core_web_trf' must be a compo"):
    _run(run_stages, captions, tmp_path / "run", "kosmos.Grit.finder = 'en_core_web_trf'")


def test_the_command_asks_for_what_it_needs(capsys, captions):
  assert cli.main(["kosmos", "grit", "--captions", captions]) == 2
  assert "PARSER must be given" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_with_a_parser_that_learned_three_captions(captions, tmp_path, capsys):
  spacy = pytest.importorskip("spacy", reason="needs the extra grit")
  from spacy.tokens import Doc
  from spacy.training import Example

  nlp = spacy.blank("en")
  nlp.add_pipe("morphologizer")
  nlp.add_pipe("parser", config={"min_action_freq": 1})
  examples = []
  for text in TAGGED:
    words, pos, deps, heads = zip(*(word.split("/") for word in text.split()))
    parsed = Doc(nlp.vocab, words=words, pos=pos, deps=deps, heads=list(map(int, heads)))
    examples.append(Example(nlp.make_doc(" ".join(words)), parsed))
  optimizer = nlp.initialize(lambda: examples)
  spacy.util.fix_random_seed(0)
  for _ in range(40):
    nlp.update(examples, sgd=optimizer)
  nlp.to_disk(tmp_path / "model")

  workdir = tmp_path / "run"
  command = ["kosmos", "grit", "--captions", captions, "--parser", str(tmp_path / "model"),
             "--workdir", str(workdir)]
  assert cli.main(command) == 0, capsys.readouterr().err
  questions = [
    json.loads(line) for path in workdir.glob("phrases/phrases/*.jsonl")
    for line in path.read_text().splitlines()]
  assert [q["phrases"] for q in questions if q["id"] != 2] == [["a dog", "a field", "flowers"]] * 3
  (tmp_path / "boxes.jsonl").write_text("".join(json.dumps({
    "id": q["id"], "boxes": [
      {"phrase": phrase, "box": [0.3 * i, 0, 0.3 * i + 0.3, 1], "score": 0.7}
      for i, phrase in enumerate(q["phrases"])]}) + "\n" for q in questions))
  assert cli.main([
    *command, "--gin.DETECTOR=@data.RecordedBoxes()",
    f"--gin.data.RecordedBoxes.path='{tmp_path}/boxes.jsonl'"]) == 0, capsys.readouterr().err
  found = {e.id: e for e in GritJsonl(str(workdir / "rows/rows")).examples(LeftOut())}
  assert found[0].row.ref_exps == ((0, 27, (0, 0, 0.3, 1), 0.7),)
  assert len(found[0].row.noun_chunks) == 3
