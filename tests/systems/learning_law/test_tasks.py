"""Perceptron and text tasks: what they hold, how they are saved, what they refuse."""

import dataclasses
import functools
import math
import operator
from collections import Counter

import flax.linen as nn
import jax
import numpy as np
import pytest

from lmops_jax.data import Corpus, Document
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.learning_law import (
  Language,
  Perceptron,
  load_task,
  perceptron_data,
  perturb_tokens,
)
from lmops_jax.systems.learning_law import language as language_lib
from lmops_jax.systems.learning_law.language import as_batch, frequent_table, paper_transformer
from lmops_jax.systems.learning_law.tasks import Task


def test_perceptron_data_are_separable_and_distributed_as_said():
  parts, is_flipped = perceptron_data(0, 8, 20_000, 5000, 5000, label_flip=0.2)
  assert {k: len(v["labels"]) for k, v in parts.items()} == {
    "train": 20_000, "dev": 5000, "select": 5000, "test": 5000}
  x = parts["train"]["inputs"]
  np.testing.assert_allclose(x.mean(), 0, atol=0.02)
  np.testing.assert_allclose(x.var(), 3, rtol=0.02)
  for part in ("dev", "select", "test"):
    np.testing.assert_allclose(parts[part]["inputs"].mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(parts[part]["inputs"].var(), 1, rtol=0.03)
  assert abs(is_flipped.mean() - 0.2) < 0.01
  # The labels that are left alone, and only those, are separated by one vector, the teacher.
  labels = 2 * parts["train"]["labels"] - 1
  teacher = np.random.default_rng(0).normal(size=8)
  agrees = labels * (x @ teacher) > 0
  np.testing.assert_array_equal(agrees, ~is_flipped)
  again, _ = perceptron_data(0, 8, 20_000, 5000, 5000, label_flip=0.2)
  np.testing.assert_array_equal(again["test"]["inputs"], parts["test"]["inputs"])
  clean, none = perceptron_data(0, 8, 20_000, 5000, 5000)
  assert not none.any()
  np.testing.assert_array_equal(clean["train"]["inputs"], x)


def test_a_task_is_the_same_after_saving(tmp_path):
  task = Perceptron(dim=4, num_train=10, num_desired=6, num_select=3, label_flip=0.3).make(5)
  task.save(tmp_path)
  again = load_task(tmp_path)
  assert again.fingerprint == task.fingerprint and again.config == task.config
  assert (again.name, again.seed, again.vocab_size) == ("perceptron", 5, 2)
  np.testing.assert_array_equal(again.is_noise, task.is_noise)
  np.testing.assert_array_equal(again.parts["dev"]["inputs"], task.parts["dev"]["inputs"])
  other = Perceptron(dim=4, num_train=10, num_desired=6, num_select=3, label_flip=0.3).make(6)
  assert other.fingerprint != task.fingerprint
  (tmp_path / "task.json").write_text(
    (tmp_path / "task.json").read_text().replace(task.fingerprint, other.fingerprint))
  with pytest.raises(ValueError, match="not those that task.json describes"):
    load_task(tmp_path)
  with pytest.raises(ValueError, match="holds no task"):
    load_task(tmp_path / "nowhere")


@pytest.mark.parametrize("field, value, match", [
  ("dim", 0, "dim=0"), ("num_train", 0, "num_train=0"), ("num_desired", 0, "num_desired=0"),
  ("num_select", -1, "num_select=-1"), ("train_variance", 0.0, "train_variance"),
  ("label_flip", 1.0, "label_flip"),
])
def test_sizes_of_the_perceptron_are_checked(field, value, match):
  with pytest.raises(ValueError, match=match):
    Perceptron(**{field: value})


# -------------------------------------------------------------------------------------------- text


def _texts(num=40, width=9, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, width + 1, size=num).astype(np.int32)
  tokens = rng.integers(4, 20, size=(num, width)).astype(np.int32)
  tokens[:, 0] = 2
  tokens[np.arange(width) >= lengths[:, None]] = 1
  return tokens, lengths


def test_perturbation_touches_the_chosen_rows_only():
  tokens, lengths = _texts(400)
  new, new_lengths, chosen = perturb_tokens(
    3, tokens, lengths, fraction=0.5, iterations=20, vocab_size=20, special=[0, 1, 2, 3], pad_id=1)
  assert chosen.sum() == 200
  np.testing.assert_array_equal(new[~chosen], tokens[~chosen])
  np.testing.assert_array_equal(new_lengths[~chosen], lengths[~chosen])
  changed = (new != tokens).any(axis=1) | (new_lengths != lengths)
  assert changed[chosen].mean() > 0.98
  real = np.arange(9) < new_lengths[:, None]
  assert (new[~real] == 1).all() and (new[real] != 1).all()
  assert (new[:, 0] == 2).all() and new_lengths.min() >= 2 and new_lengths.max() <= 9
  assert new[real].max() < 20
  again, *_ = perturb_tokens(
    3, tokens, lengths, fraction=0.5, iterations=20, vocab_size=20, special=[0, 1, 2, 3], pad_id=1)
  np.testing.assert_array_equal(again, new)


def test_one_perturbation_is_one_of_three_edits():
  tokens, lengths = _texts(600, width=12)
  lengths[:] = 8
  tokens[:, 1:8] = np.arange(4, 11)
  tokens[:, 8:] = 1
  new, new_lengths, chosen = perturb_tokens(
    0, tokens, lengths, fraction=1.0, iterations=1, vocab_size=20, special=[0, 1, 2, 3], pad_id=1)
  kinds = Counter()
  for row, n in zip(new, new_lengths):
    words, before = row[:n].tolist(), tokens[0, :8].tolist()
    if n == 7:
      assert words == before[:7]
      kinds["delete"] += 1
    elif n == 9:
      twice = [i for i in range(8) if words[i] == words[i + 1]]
      assert len(twice) == 1 and words[:twice[0]] + words[twice[0] + 1:] == before
      kinds["repeat"] += 1
    else:
      assert sum(a != b for a, b in zip(words, before)) <= 1
      kinds["replace"] += 1
  assert chosen.all() and all(150 < kinds[k] < 250 for k in ("delete", "repeat", "replace"))


def test_the_reduced_vocabulary_keeps_the_most_frequent_tokens():
  tokens = np.array([9, 9, 9, 7, 7, 5, 5, 2, 2, 2, 2, 2, 3, 3, 3, 3])
  table = frequent_table(tokens, 12, 6, bos_id=2, eos_id=3)
  assert table[9] == 4 and table[5] == 5  # 5 and 7 come equally often: the smaller id
  assert table[7] == 0 and table[11] == 0 and table[2] == 2 and table[3] == 3


def test_padding_is_masked_and_does_not_touch_the_loss():
  tokens, lengths = _texts(6)
  batch = as_batch(tokens, lengths)
  np.testing.assert_array_equal(batch["loss_mask"].sum(axis=1), lengths - 1)
  config = dataclasses.replace(paper_transformer(16, 2, 1, 8), vocab_size=20)
  task = Task("t", 0, {p: batch for p in ("train", "dev", "select", "test")}, np.zeros(6, bool),
              lengths.astype(float), config).check()
  params = nn.unbox(task.boxed_params(jax.random.key(0)))
  losses = jax.jit(task.example_losses)
  want = np.asarray(losses(params, batch))
  other = {k: v.copy() for k, v in batch.items()}
  padded = batch["loss_mask"] == 0
  other["targets"][padded] = 7
  rows, columns = np.nonzero(padded[:, 1:])
  other["tokens"][rows, columns + 2 - 1] = 9
  np.testing.assert_array_equal(np.asarray(losses(params, other)), want)


def test_paper_transformer_has_the_published_parameters_and_initial_loss():
  config = dataclasses.replace(paper_transformer(), vocab_size=5000)
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 5000, size=(4, 65)).astype(np.int32)
  batch = as_batch(tokens, np.full(4, 65, np.int32))
  task = Task("t", 0, {p: batch for p in ("train", "dev", "select", "test")}, np.zeros(4, bool),
              np.ones(4), config).check()
  params = nn.unbox(task.boxed_params(jax.random.key(0)))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 1_682_688
  loss = float(np.mean(task.example_losses(params, batch)))
  assert 8.5 < loss < 8.9  # ln 5000 = 8.52


def test_attention_is_divided_by_the_root_of_the_width_and_sees_no_later_token():
  config = dataclasses.replace(paper_transformer(16, 4, 1, 8), vocab_size=11)
  assert config.attention_scale == 16**-0.5 != config.head_width**-0.5
  model = Transformer(config)
  tokens = np.random.default_rng(1).integers(0, 11, size=(1, 8)).astype(np.int32)
  params = nn.unbox(model.init(jax.random.key(0), tokens)["params"])

  def dense(params, tokens):  # straight from the paper's code as the specification words it
    p = params["layers"]

    def norm(x, s, b):
      return x / (np.sqrt((x**2).mean(-1, keepdims=True)) + 1e-8) * s + b

    x = np.asarray(params["embedding"])[tokens] + np.asarray(params["position_embedding"])[None, :8]
    def get(*path):  # of the only layer
      return np.asarray(functools.reduce(operator.getitem, path, p))[0]

    y = norm(x, get("attention_norm", "scale"), get("attention_norm", "bias"))
    q, k, v = (np.einsum("bsd,dhe->bhse", y, get("attention", n, "kernel"))
               for n in ("query", "key", "value"))
    scores = np.einsum("bhse,bhme->bhsm", q, k) / np.sqrt(16)
    scores = np.where(np.tril(np.ones((8, 8), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhsm,bhme->bshe", weights, v)
    x = x + np.einsum("bshe,hed->bsd", mixed, get("attention", "out", "kernel"))
    y = norm(x, get("mlp_norm", "scale"), get("mlp_norm", "bias"))
    up = np.maximum(y @ get("mlp", "up", "kernel"), 0)
    x = x + up @ get("mlp", "down", "kernel")
    x = norm(x, np.asarray(params["final_norm"]["scale"]), np.asarray(params["final_norm"]["bias"]))
    return x @ np.asarray(params["unembedding"])

  logits = np.asarray(model.apply({"params": params}, tokens, method="logits"))
  np.testing.assert_allclose(logits, dense(params, tokens), atol=2e-5)
  later = tokens.copy()
  later[0, 5:] = (later[0, 5:] + 1) % 11
  changed = np.asarray(model.apply({"params": params}, later, method="logits"))
  np.testing.assert_array_equal(changed[0, :5], logits[0, :5])
  assert np.abs(changed[0, 5:] - logits[0, 5:]).max() > 1e-3


@dataclasses.dataclass(frozen=True)
class _Stories(Corpus):
  """Documents of words; ids are their numbers."""

  num: int = 60
  first: int = 0

  def fingerprint(self):
    return f"{self.num} {self.first}"

  def read(self, counts):
    rng = np.random.default_rng(7)
    words = "the cat sat on a mat and saw one big red dog run home to its old blue house".split()
    for i in range(self.num):
      text = " ".join(rng.choice(words, size=int(rng.integers(3, 60)))) + f" number {i}."
      yield Document(self.first + i, text, "story", f"story {i}")


def _context(tmp_path):
  return pipeline.StageContext("texts/language", tmp_path, {}, lambda text: None)


@pytest.fixture(scope="module")
def vocabulary():
  from lmops_jax.data import TrainSentencePiece

  return TrainSentencePiece(vocab_size=300, sample_bytes=100_000)


def _language(vocabulary, **kwargs):
  sizes = dict(num_train=20, num_desired=6, num_select=4, length=12, min_tokens=4)
  return Language(corpus=_Stories(), vocabulary=vocabulary,
                  model=paper_transformer(16, 2, 1, 12), **(sizes | kwargs))


def test_texts_of_one_corpus_are_split_by_document(tmp_path, vocabulary):
  task_of = _language(vocabulary, pieces_per_document=2)
  context = _context(tmp_path)
  task_of.texts(context)
  with np.load(tmp_path / "texts.npz") as arrays:
    tokens, owners = arrays["train/tokens"], arrays["train/documents"]
  owner_of = {}
  for row, owner in zip(tokens, owners):
    owner_of.setdefault(tuple(row), set()).add(int(owner))
  assert np.bincount(np.unique(owners, return_inverse=True)[1]).max() <= 2
  task = task_of.make(0, tmp_path)
  assert task.is_noise.sum() == 10 and task.num_train == 20
  owners_of_part = {}
  for part, batch in task.parts.items():
    keep = ~task.is_noise if part == "train" else slice(None)
    rows = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)[keep]
    owners_of_part[part] = set().union(*(owner_of[tuple(row)] for row in rows))
  names = list(owners_of_part)
  for i, a in enumerate(names):
    for b in names[i + 1:]:
      assert not owners_of_part[a] & owners_of_part[b], (a, b)
  other = task_of.make(1, tmp_path)
  assert other.fingerprint != task.fingerprint
  assert task_of.make(0, tmp_path).fingerprint == task.fingerprint
  assert task.config.vocab_size <= 300 and task.vocab_size == task.config.vocab_size
  np.testing.assert_array_equal(task.difficulty, task.parts["train"]["loss_mask"].sum(1) + 1)


def test_desired_text_of_its_own_and_a_reduced_vocabulary(tmp_path, vocabulary):
  shared = _Stories(num=3)  # the first documents of the corpus: left out there
  task_of = _language(vocabulary, desired=_Stories(num=60, first=1000), num_frequent=40,
                      noise_fraction=0.0)
  assert set(skeleton.fingerprints("", task_of)) == {
    "corpus.fingerprint", "desired.fingerprint", "vocabulary.fingerprint"}
  context = _context(tmp_path)
  task_of = dataclasses.replace(task_of, desired=shared, num_desired=1, num_select=1)
  task_of.texts(context)
  assert context.extra["dropped"]["train"]["shared_with_desired"] == 3
  task = task_of.make(0, tmp_path)
  assert task.vocab_size == 40 and not task.is_noise.any()
  tokens, mask = task.parts["train"]["tokens"], task.parts["train"]["loss_mask"]
  assert tokens.max() < 40 and (tokens[:, 0] == language_lib.BOS).all()
  assert (task.parts["train"]["targets"][mask == 0] == language_lib.PAD).all()


def test_too_little_text_is_said(tmp_path, vocabulary):
  task_of = _language(vocabulary, num_train=500)
  task_of.texts(_context(tmp_path))
  with pytest.raises(ValueError, match="too few for 6 dev, 4 select, 6 test, 500 train"):
    task_of.make(0, tmp_path)
  with pytest.raises(ValueError, match="no text has learning_law.Language.min_tokens=900"):
    _language(vocabulary, min_tokens=900).texts(_context(tmp_path))


@pytest.mark.parametrize("kwargs, match", [
  ({"length": 1}, "length=1 must be an integer of at least 2"),
  ({"length": 13}, "beyond models.TransformerConfig"),
  ({"noise_fraction": 1.5}, "noise_fraction"), ({"num_frequent": 4}, "num_frequent=4"),
  ({"pieces_per_document": 0}, "pieces_per_document=0"), ({"num_desired": 0}, "num_desired=0"),
])
def test_settings_of_text_tasks_are_checked(vocabulary, kwargs, match):
  with pytest.raises(ValueError, match=match):
    _language(vocabulary, **kwargs)


def test_parts_that_no_run_could_use_are_refused():
  tokens, lengths = _texts(6)
  batch, config = as_batch(tokens, lengths), TransformerConfig(vocab_size=20, max_length=8)

  def task(**parts):
    full = {p: batch for p in ("train", "dev", "select", "test")} | parts
    return Task("t", 0, full, np.zeros(6, bool), np.ones(6), config)

  empty = {k: v[:0] for k, v in batch.items()}
  with pytest.raises(ValueError, match="the part 'dev' of task 't' is empty"):
    task(dev=empty).check()
  with pytest.raises(ValueError, match="part 'test' of task 't': tokens of row 0 holds id 99"):
    task(test={**batch, "tokens": np.full_like(batch["tokens"], 99)}).check()
  with pytest.raises(ValueError, match="loss_mask is 0 at every position of row 0"):
    task(select={**batch, "loss_mask": np.zeros_like(batch["loss_mask"])}).check()
  with pytest.raises(ValueError, match="sequences of 7 tokens, others of 8"):
    task(test={k: v[:, :7] for k, v in batch.items()}).check()
  with pytest.raises(ValueError, match="beyond the model's max_length of 4"):
    dataclasses.replace(task(), config=dataclasses.replace(config, max_length=4)).check()
