"""The data scorer: what it sees, that it can learn, and how it is split (checks 15, 16, 24)."""

import types

import numpy as np
import pytest

from lmops_jax.data import instance_writing, instances, packing
from lmops_jax.evaluation import correlation, examples
from lmops_jax.models import heads, transformer
from lmops_jax.systems.pds import scorer
from lmops_jax.text import vocabulary_sources
from lmops_jax.training import learner, loop, losses, optimizers, sources

LETTERS = np.array(list("etaoinshrdlucmfw"))


def _texts(num, seed=0):
  rng = np.random.default_rng(seed)
  return [" ".join("".join(rng.choice(LETTERS, 5)) for _ in range(9)) for _ in range(num)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("scorer")
  train = vocabulary_sources.TrainSentencePiece(vocab_size=320, sample_bytes=50_000)
  vocabulary = train.build(iter(_texts(300)), folder / "vocabulary")
  packed = packing.pack(
    ((i, vocabulary.encode(text)) for i, text in enumerate(_texts(40))), length=48,
    bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
  )
  instance_writing.write_instances(
    folder / "corpus", packed, length=48, vocab_size=vocabulary.vocab_size,
    pad_id=vocabulary.pad_id, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
  )
  corpus = instances.open_instances(folder / "corpus")
  return types.SimpleNamespace(corpus=corpus, vocabulary=vocabulary)


def test_every_real_token_counts_and_padding_does_not(prepared):
  view = scorer.View(prepared)
  indices = np.arange(len(prepared.corpus))
  rows = view.rows(indices)
  np.testing.assert_array_equal(rows["example_id"], prepared.corpus.ids)
  for i in indices:
    stored = prepared.corpus.instance(i).tokens[:48]
    assert rows["mask"][i].sum() == len(stored)
    np.testing.assert_array_equal(rows["tokens"][i][: len(stored)], stored)
  assert rows["mask"][-1].sum() < 48  # the last instance is shorter


def test_another_vocabulary_sees_the_same_text(prepared, tmp_path):
  other = vocabulary_sources.TrainSentencePiece(vocab_size=400, sample_bytes=50_000, seed=5).build(
    iter(_texts(300, seed=9)), tmp_path / "other"
  )
  view = scorer.View(prepared, other)
  assert view.vocab_size == 400
  rows = view.rows(np.arange(5))
  for i in range(5):
    row = rows["tokens"][i][rows["mask"][i] > 0]
    ours = prepared.vocabulary.decode(prepared.corpus.instance(i).tokens.tolist())
    theirs = other.decode(row.tolist())
    assert row[0] == other.bos_id and len(row) <= 48
    assert ours.startswith(theirs[: len(theirs) - 8].strip())


def test_a_vocabulary_that_loses_the_text_is_refused(prepared):
  class Forgetful:
    vocab_size, bos_id, eos_id, pad_id = 10, 1, 2, 0

    def encode(self, text):
      return [5] * (len(text) // 4)

    def decode(self, ids):
      return "?" * len(ids)

  with pytest.raises(ValueError, match="another vocabulary"):
    scorer.View(prepared, Forgetful())


def test_it_overfits_64_examples(tmp_path):
  rng = np.random.default_rng(0)
  rows = {
    "tokens": rng.integers(3, 64, (64, 12)).astype(np.int32),
    "mask": np.ones((64, 12), np.float32), "score": rng.normal(size=64).astype(np.float32),
  }
  config = transformer.TransformerConfig(
    vocab_size=64, num_layers=1, width=32, num_heads=2, mlp_width=64, max_length=12
  )
  model = heads.SequenceRegressor(config)
  example_losses = losses.regression_example_losses(model)
  result = loop.train(
    learner.supervised(scorer.initializer(model), example_losses, optimizers.adamw(1e-2)),
    sources.Batches(lambda step: rows), 120, 0, tmp_path, records=loop.Records(tensorboard=False),
  )
  predicted = examples.map_examples(example_losses.predict, result.state.params, rows, 64)
  assert correlation.spearman(predicted, rows["score"]) > 0.99


def test_the_split_is_random_seeded_and_complete():
  train, validation = scorer.split(1000, 0.1, seed=3)
  assert len(validation) == 100
  np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(1000))
  np.testing.assert_array_equal(scorer.split(1000, 0.1, seed=3)[1], validation)
  assert not np.array_equal(scorer.split(1000, 0.1, seed=4)[1], validation)
  assert validation.max() > 500 and validation.min() < 500  # not the first tenth
  with pytest.raises(ValueError, match="too few"):
    scorer.split(3, 0.5, seed=0)


def test_corpus_scores_must_match_the_corpus(tmp_path):
  context = types.SimpleNamespace(directory=tmp_path, name="annotate/mine", writes=True)
  with pytest.raises(ValueError, match="gave 7 scores for 9 instances"):
    scorer.write_scores(context, np.arange(9), [np.zeros(3), np.zeros(4)], shard_size=4)


def test_a_vocabulary_of_its_own_needs_a_model_of_its_own():
  with pytest.raises(ValueError, match="from_proxy=False"):
    scorer.Scorer(optimizers.sgd(0.1), vocabulary=vocabulary_sources.SentencePieceFile("x.model"))
