"""DSIR scores against fixed hashes and a hand-counted example."""

import hashlib
import math

import numpy as np
import pytest

from lmops_jax.systems.pds import dsir


@pytest.mark.parametrize(
  "ngram, want",
  [  # coreutils sha256sum of the UTF-8 text, read as a hexadecimal number, modulo 10,000
    ("the", 8288),
    ("the cat", 143),
    ("hello world", 1529),
    ("né", 5735),
  ],
)
def test_buckets_of_fixed_strings(ngram, want):
  assert dsir.bucket(ngram) == want
  assert dsir.bucket(ngram) == int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % 10_000


def test_ngrams_split_words_and_punctuation_runs():
  assert list(dsir.ngrams("The cat's 2nd -- Ünï_x!?")) == [
    "the", "cat", "'", "s", "2nd", "--", "ünï_x", "!?",
    "the cat", "cat '", "' s", "s 2nd", "2nd --", "-- ünï_x", "ünï_x !?",
  ]
  assert list(dsir.ngrams(" \n\t")) == []
  assert list(dsir.ngrams("one")) == ["one"]


def test_hand_counted_example():
  # Target: a b a b -> a 2, b 2, "a b" 2, "b a" 1 of 7. Corpus: a c and a -> a 2, c 1, "a c" 1 of 4.
  log_ratio = dsir.fit(["a b a b"], ["a c", "a"], smoothing=1e-8)
  assert log_ratio.shape == (10_000,)
  eps = 1e-8
  want = {
    "a": math.log(2 / 7 + eps) - math.log(2 / 4 + eps),
    "b": math.log(2 / 7 + eps) - math.log(eps),
    "a b": math.log(2 / 7 + eps) - math.log(eps),
    "b a": math.log(1 / 7 + eps) - math.log(eps),
    "c": math.log(eps) - math.log(1 / 4 + eps),
    "a c": math.log(eps) - math.log(1 / 4 + eps),
  }
  buckets = {ngram: dsir.bucket(ngram) for ngram in want}
  assert len(set(buckets.values())) == len(want), "the example must be free of collisions"
  for ngram, value in want.items():
    assert log_ratio[buckets[ngram]] == pytest.approx(value, rel=1e-12)
  assert np.count_nonzero(log_ratio) == len(want)
  got = dsir.scores(["A b", "c b a", "", "unseen"], log_ratio)
  assert got[0] == pytest.approx(want["a"] + want["b"] + want["a b"])
  assert got[1] == pytest.approx(want["c"] + want["b"] + want["a"] + want["b a"])  # "c b" unseen
  assert got[2] == got[3] == 0.0


def test_weights_are_zero_when_target_and_corpus_agree():
  texts = ["def f(x): return x", "The quick brown fox."]
  log_ratio = dsir.fit(texts, texts[::-1])
  assert not log_ratio.any()
  assert not dsir.scores(["anything at all", *texts], log_ratio).any()


def test_scores_prefer_the_target_and_do_not_normalise_by_length():
  target = ["the statement returns a value", "the expression evaluates to a value"]
  raw = [*target, "0x1f 0x2e 0x3d", "int main ( void ) { return 0 ; }"]
  log_ratio = dsir.fit(target, raw)
  prose, code = dsir.scores(["the expression returns a value", "int main ( void )"], log_ratio)
  assert prose > 0 > code
  once, twice = dsir.scores(["int main", "int main int main"], log_ratio)
  assert twice < 2 * once + 1e-9  # the bigram "main int" adds to it


def test_few_buckets_and_lone_surrogates():
  log_ratio = dsir.fit(["a \ud800"], ["b"], num_buckets=3)
  assert log_ratio.shape == (3,)
  assert np.isfinite(dsir.scores(["\ud800 a"], log_ratio)).all()


def test_bad_input():
  with pytest.raises(ValueError, match="DSIR target holds no words"):
    dsir.fit(["", " "], ["a"])
  with pytest.raises(ValueError, match="DSIR corpus sample holds no words"):
    dsir.fit(["a"], [])
  with pytest.raises(ValueError, match="num_buckets=0"):
    dsir.fit(["a"], ["a"], num_buckets=0)
  with pytest.raises(ValueError, match="smoothing=0"):
    dsir.fit(["a"], ["a"], smoothing=0)
  with pytest.raises(ValueError, match="finite vector"):
    dsir.scores(["a"], [0.0, float("nan")])
