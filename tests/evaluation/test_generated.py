"""Scores of generated answers by the name of the metric."""

import numpy as np
import pytest

from lmops_jax.evaluation import captions, generated


@pytest.mark.parametrize("metric,rows", [
  ("exact_match", [1, 0]), ("f1", [1, 2 / 3]), ("vqa", [2 / 3, 0]),
  ("meteor", [0.5 * 10 / 11] * 2), ("rouge_l", [2 / 3, 2 / 3]), ("rouge_2", [0, 0]),
])
def test_metrics_of_single_answers(metric, rows):
  found = generated.score(metric, ["The dog!", "red bus"], [["dog"] * 3, ["bus", "bus"]])
  np.testing.assert_allclose(found.rows, rows)
  assert found.corpus == pytest.approx(np.mean(rows))


def test_captions_are_taken_as_they_were_generated():
  found = generated.score("cider", ["A dog runs.", "Cats"], [["a dog runs"], ["two cats"]])
  words = captions.cider(["a dog runs", "cats"], [["a dog runs"], ["two cats"]])
  assert found.corpus == words.corpus > 0


@pytest.mark.parametrize("arguments,message", [
  (("bleu", ["a"], [["a"]]), "no metric 'bleu' of generated answers; give one of exact_match, f1"),
  (("f1", ["a"], []), "1 answers and the right ones of 0 rows"),
  (("f1", [], []), "0 answers and the right ones of 0 rows"),
])
def test_bad_input(arguments, message):
  with pytest.raises(ValueError, match=message):
    generated.score(*arguments)


def test_bleu_of_captions_and_of_explanations():
  """By hand: of 8 words 7 are right, of 6 bigrams 5, of 4 trigrams 3; both as long as theirs."""
  found = ["a dog on the grass", "two red cars"]
  golds = [["A dog on the grass."], ["two blue cars"]]
  right, total = np.array([7, 4, 3, 2]), np.array([8, 6, 4, 2])
  want = np.cumprod(right / total) ** (1 / np.arange(1, 5))
  got = [generated.score(f"bleu_{n}", found, golds).corpus for n in range(1, 5)]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  told = [f"yes because {one}" for one in found], [[f"no because {one[0]}"] for one in golds]
  assert [generated.score(f"explanation_bleu_{n}", *told).corpus for n in range(1, 5)] == got
  for n in range(1, 5):
    figure = generated.of_corpus(f"bleu_{n}", found, golds)
    assert figure(np.arange(2)) == got[n - 1]
    assert figure(np.array([0, 0])) == pytest.approx(1, abs=1e-6)  # the first caption twice
    one = generated.score(f"bleu_{n}", found[1:], golds[1:]).corpus
    assert figure(np.array([1])) == pytest.approx(one, rel=1e-9)
    assert generated.of_corpus(f"explanation_bleu_{n}", *told)(np.arange(2)) == got[n - 1]
  assert generated.of_corpus("cider", found, golds) is None
