"""Filters against transformers' logits processors, and what they and the draw promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lmops_jax.decoding import sampling


def _scores(rows=5, vocab=23, seed=0):
  return (3 * np.random.default_rng(seed).normal(size=(rows, vocab))).astype(np.float32)


def _history(length, rows=5, vocab=6, slots=12, seed=1):
  """Tokens from a small set, so that n-grams repeat; what follows `length` is rubbish."""
  history = np.random.default_rng(seed).integers(0, vocab, (rows, slots)).astype(np.int32)
  return history, np.full(rows, length, np.int32)


@pytest.mark.parity
@pytest.mark.parametrize(("ours", "name", "arguments"), [
  (sampling.top_k, "TopKLogitsWarper", (4,)),
  (sampling.top_k, "TopKLogitsWarper", (100,)),
  (sampling.top_p, "TopPLogitsWarper", (0.7,)),
  (sampling.top_p, "TopPLogitsWarper", (0.999,)),
  (sampling.top_p, "TopPLogitsWarper", (1e-6,)),
  (sampling.min_p, "MinPLogitsWarper", (0.1,)),
  (sampling.min_p, "MinPLogitsWarper", (1.0,)),
])
def test_warpers_equal_those_of_transformers(ours, name, arguments):
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  processors = pytest.importorskip("transformers").generation.logits_process
  for scores in (_scores(), np.where(_scores(seed=2) < -2, -np.inf, _scores())):
    scores = scores.astype(np.float32)
    want = getattr(processors, name)(*arguments)(None, torch.from_numpy(scores))
    np.testing.assert_array_equal(ours(jnp.asarray(scores), *arguments), want.numpy())


@pytest.mark.parity
@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_history_filters_equal_those_of_transformers(length):
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  processors = pytest.importorskip("transformers").generation.logits_process
  scores, (history, lengths) = _scores(), _history(length)
  ids = torch.from_numpy(history[:, :length].astype(np.int64))
  for penalty in (1.3, 0.7):
    want = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(scores))
    got = sampling.repetition_penalty(jnp.asarray(scores), history, lengths, penalty)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
  for size in (1, 2, 3):
    want = processors.NoRepeatNGramLogitsProcessor(size)(ids, torch.from_numpy(scores))
    got = sampling.no_repeat_ngram(jnp.asarray(scores), history, lengths, size)
    np.testing.assert_array_equal(got, want.numpy())


def test_history_filters_respect_each_rows_length():
  scores, (history, _) = _scores(rows=3), _history(0, rows=3)
  lengths = np.array([2, 5, 12])
  for f in (
    lambda *a: sampling.repetition_penalty(*a, 1.5), lambda *a: sampling.no_repeat_ngram(*a, 2)
  ):
    together = f(jnp.asarray(scores), history, lengths)
    for row, n in enumerate(lengths):
      alone = f(jnp.asarray(scores[row : row + 1]), history[row : row + 1, :n], lengths[row, None])
      np.testing.assert_array_equal(together[row], alone[0])


def test_top_p_keeps_the_smallest_sufficient_set():
  scores = _scores(rows=40, vocab=50, seed=3)
  for p in (0.05, 0.5, 0.95):
    kept = np.isfinite(sampling.top_p(jnp.asarray(scores), p))
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mass = (kept * probabilities).sum(-1)
    least = np.where(kept, probabilities, 2).min(-1)
    assert (mass >= p - 1e-5).all() and (mass - least < p).all() and (kept.sum(-1) >= 1).all()
    assert (np.where(kept, 0, probabilities).max(-1) < least).all()


def test_forbid_while_spares_rows_that_are_late():
  scores = jnp.zeros((2, 5))
  got = sampling.forbid_while(scores, (1, 4), jnp.array([True, False]))
  np.testing.assert_array_equal(np.isfinite(got), [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])


def test_best_is_argmax_also_of_ties_and_infinities():
  scores = np.array([[1, 3, 3, 2], [-np.inf] * 4, [-5, -np.inf, -1, -2]], np.float32)
  np.testing.assert_array_equal(sampling.best(jnp.asarray(scores)), scores.argmax(-1))


def test_sample_follows_the_distribution():
  scores = np.array([0.0, 1.0, -1.0, -np.inf, 2.0], np.float32)
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = sampling.sample(keys, jnp.broadcast_to(scores, (len(keys), 5)))
  counts = np.bincount(drawn, minlength=5)
  assert counts[3] == 0
  allowed = np.isfinite(scores)
  weights = np.exp(scores[allowed].astype(np.float64))
  expected = weights / weights.sum() * len(keys)
  assert scipy.stats.chisquare(counts[allowed], expected).pvalue > 1e-3


def test_a_rows_draw_does_not_depend_on_other_rows():
  keys, scores = jax.random.split(jax.random.key(3), 4), jnp.asarray(_scores(rows=4))
  together = sampling.sample(keys, scores)
  alone = [int(sampling.sample(keys[i : i + 1], scores[i : i + 1])[0]) for i in range(4)]
  np.testing.assert_array_equal(together, alone)


def test_token_log_probs():
  scores = _scores(rows=3)
  tokens = jnp.array([4, 0, 22])
  want = jax.nn.log_softmax(scores)[jnp.arange(3), tokens]
  np.testing.assert_allclose(sampling.token_log_probs(scores, tokens), want, rtol=1e-5, atol=1e-6)
