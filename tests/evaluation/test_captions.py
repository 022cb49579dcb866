"""Scores of captions against pycocoevalcap's (a golden file), and by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lmops_jax.evaluation import captions
from lmops_jax.evaluation.caption_tokens import tokenised

GOLDEN = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text("utf-8"))


@pytest.mark.parametrize("caption,words", GOLDEN["tokens"])
def test_words_are_those_of_the_penn_treebank_tokeniser(caption, words):
  assert tokenised(caption) == words


def test_scores_are_those_of_pycocoevalcap():
  found = captions.caption_scores(GOLDEN["candidates"], GOLDEN["references"])
  assert set(found) == set(GOLDEN["scores"])
  for name, (corpus, rows) in GOLDEN["scores"].items():
    np.testing.assert_allclose(found[name].rows, rows, rtol=1e-12, atol=1e-14)
    assert found[name].corpus == pytest.approx(corpus, rel=1e-12)
  assert max(GOLDEN["scores"]["CIDEr"][1]) > 5 and min(GOLDEN["scores"]["BLEU-4"][1]) < 1e-3


def test_cider_by_hand():
  """Two pictures without common words: every n-gram weighs log 2, so equal captions score 10."""
  found = captions.cider(["a b c d", "w x"], [["a b c d"], ["w x y z"]])
  n1 = 2 * 1 / (math.sqrt(2) * math.sqrt(4))  # two of four words
  n2 = 1 / (math.sqrt(1) * math.sqrt(3))  # one of three bigrams
  penalty = math.exp(-((1 - 3) ** 2) / 72)
  assert found.rows == pytest.approx([10.0, 10 * (n1 + n2) / 4 * penalty])


def test_bleu_and_rouge_by_hand():
  words, right = ["the cat sat"], [["the cat ran off", "a cat sat down there now"]]
  one, two, _, four = captions.bleu(words, right)
  penalty = math.exp(1 - 4 / 3)
  assert one.corpus == pytest.approx(penalty)  # all three words are there
  assert two.corpus == pytest.approx(penalty * math.sqrt(2 / 2))
  assert four.corpus < 1e-3
  precision, recall = 2 / 3, 2 / 4
  assert captions.rouge_l(words, right).corpus == pytest.approx(
    (1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_nothing_said_scores_nothing():
  found = captions.caption_scores(["", "a cat."], [["A dog."], ["A cat"]])
  assert all(scores.rows[0] < 1e-6 for scores in found.values())
  assert found["BLEU-1"].rows[1] == pytest.approx(1)


def test_the_order_of_references_does_not_matter():
  turned = [references[::-1] for references in GOLDEN["references"]]
  one, other = (captions.caption_scores(GOLDEN["candidates"], r)
                for r in (GOLDEN["references"], turned))
  for name in one:
    np.testing.assert_allclose(one[name].rows, other[name].rows, rtol=1e-12)


@pytest.mark.parametrize("candidates,references,message", [
  ([], [], "0 captions and references of 0 pictures"),
  (["a"], [["a"], ["b"]], "1 captions and references of 2 pictures"),
  (["a", "b"], [["a"], []], r"the references of row 1 are \[\]"),
  (["a"], ["a"], "the references of row 0 are 'a'; expected a list"),
  (["a"], [["a", " "]], "expected a list of captions that are not empty"),
])
def test_bad_input(candidates, references, message):
  for score in (captions.cider, captions.bleu, captions.rouge_l):
    with pytest.raises(ValueError, match=message):
      score(candidates, references)


def test_bleu_is_that_of_sacrebleu():
  bleu = pytest.importorskip("sacrebleu").BLEU
  draws = np.random.default_rng(0)
  words = np.array("a the red dog cat on grass runs and sits".split())
  def sentence(low, high):
    return " ".join(draws.choice(words, draws.integers(low, high)))
  found = [sentence(3, 12) for _ in range(60)]
  golds = [[sentence(4, 12) for _ in range(3)] for _ in found]
  for order in range(1, 5):
    peer = bleu(tokenize="none", max_ngram_order=order, smooth_method="none")
    want = peer.corpus_score(found, list(zip(*golds))).score / 100
    assert want > 0.01 and captions.bleu(found, golds)[order - 1].corpus == pytest.approx(
      want, rel=1e-5)
