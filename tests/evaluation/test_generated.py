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
