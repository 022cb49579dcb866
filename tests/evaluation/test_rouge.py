"""ROUGE of summaries: against rouge-score, and by hand."""

import numpy as np
import pytest

from lmops_jax.evaluation import rouge

GOLD = "The cat sat on the mat, and the dog's 2 bones."
ANSWERS = (
  "the cat the mat", "On the mat: the dog's bones!", "A dog", "", "...", GOLD.upper(),
  "bones 2 the and mat the on sat cat the")


def test_by_hand():
  answer, golds = "the cat sat", ["the cat ran", "a cat sat down"]
  assert rouge.METRICS["rouge_1"](answer, golds) == pytest.approx(2 / 3)
  assert rouge.METRICS["rouge_2"](answer, golds) == pytest.approx(1 / 2)
  assert rouge.rouge_l(answer, golds) == pytest.approx(2 / 3)
  assert rouge.rouge_l("sat the cat", ["the sat cat"]) == pytest.approx(2 / 3)


@pytest.mark.parity
def test_equals_rouge_score():
  scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs pip install rouge-score")
  theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
  for answer in ANSWERS:
    golds = [GOLD, "A dog and its bones"]
    want = theirs.score_multi(golds, answer)
    for name, own in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
      got = rouge.METRICS[name](answer, golds)
      np.testing.assert_allclose(got, want[own].fmeasure, atol=1e-12, err_msg=f"{name} {answer}")
