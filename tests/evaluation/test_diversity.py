"""Diversity of texts by hand."""

import pytest

from lmops_jax.evaluation.captions import bleu
from lmops_jax.evaluation.diversity import distinct, self_bleu


def test_distinct_counts_ngrams_over_all_texts():
  texts = ["a cat, 4k", "A cat, 8k", "", "dog"]
  assert distinct(texts, 1) == 5 / 7  # a, cat,, 4k, 8k, dog
  assert distinct(texts, 2) == 3 / 4
  assert distinct(texts, 5) == 0 and distinct(["x x x"], 1) == 1 / 3
  with pytest.raises(ValueError, match="n=0"):
    distinct(texts, 0)


def test_self_bleu_compares_each_text_with_the_others():
  texts = ["a b c d e", "a b c d f", "g h i j k"]
  want = [bleu([text], [[t for t in texts if t != text]])[3].corpus for text in texts]
  assert self_bleu(texts) == pytest.approx(sum(want) / 3)
  assert self_bleu(["A b c d"] * 3) == pytest.approx(1, abs=1e-6)
  assert self_bleu(["a b c d", "e f g h"]) < 1e-3
  with pytest.raises(ValueError, match="1 texts have no others"):
    self_bleu(["a"])
