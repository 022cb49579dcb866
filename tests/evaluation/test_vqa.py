"""Answers to questions about pictures: by hand, and against the official script (a golden file)."""

import json
from pathlib import Path

import pytest

from lmops_jax.evaluation import vqa

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vqa.json").read_text("utf-8"))


@pytest.mark.parametrize("answer,wanted", [
  ("A red ball.", "red ball"),
  ("The Two dogs!", "2 dogs"),
  ("none", "0"),
  ("dont know", "don't know"),
  ("1,000", "1000"),
  ("yes,it is", "yes it is"),  # a blank for what stands between letters
  ("yes, it is", "yes it is"),
  ("black-and-white", "black and white"),
  ("black - white", "black white"),
  ("1,2-3", "123"),  # a comma between digits drops all punctuation
  ("3.5 m.", "3.5 m"),
  ("u.s.a", "usa"),
  (" a\nb\tthe c ", "b c"),
  ("the", ""),
  ("couldntve", "couldntve"),  # two apostrophes left out are not known
  ("couldn'tve", "couldn't've"),
])
def test_normalisation_by_hand(answer, wanted):
  assert vqa.normalised(answer) == wanted


def test_only_the_first_32_points_go():
  assert vqa.normalised("." * 40 + "x") == "." * 8 + "x"


@pytest.mark.parametrize("num,wanted", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_by_hand(num, wanted):
  """With n of ten equal answers: n times min((n-1)/3, 1), and 10-n times min(n/3, 1), over ten."""
  golds = ["yes"] * num + ["no"] * (10 - num)
  assert vqa.accuracy(" Yes. ", golds) == pytest.approx(wanted)


def test_golds_are_taken_as_they_are_where_they_agree():
  assert vqa.accuracy("t-shirt", ["t-shirt"] * 10) == 0  # the answer alone is normalised
  assert vqa.accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1


def test_the_official_script_normalises_the_same():
  for answer, wanted in GOLDEN["normalised"]:
    assert vqa.normalised(answer) == wanted
  for word, wanted in GOLDEN["contractions"].items():
    assert vqa.normalised(word) == wanted


def test_the_official_script_finds_the_same_accuracies():
  values = set()
  for answer, golds, wanted in GOLDEN["accuracies"]:
    assert vqa.accuracy(answer, golds) == pytest.approx(wanted, abs=1e-12)
    values.add(round(wanted, 6))
  assert len(values) > 4


def test_one_gold_answer_is_refused():
  with pytest.raises(ValueError, match=r"several people's answers, and 1 are given \('red'\)"):
    vqa.accuracy("red", ["red"])
