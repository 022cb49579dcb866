"""Pairs with and without momentum attention as a user runs them, at sizes of seconds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.config import resolve
from lmops_jax.data import PythonReference
from lmops_jax.data import instances as instances_lib
from lmops_jax.data.documents import Document
from lmops_jax.evaluation import lm
from lmops_jax.host.hashing import order_key
from lmops_jax.models.transformer import TransformerConfig, num_params
from lmops_jax.pretrained import exporting
from lmops_jax.shared_stages import unseen_text
from lmops_jax.systems.meta_optimizer.momentum import pairs, texts
from lmops_jax.text import vocabulary_sources
from lmops_jax.training import language_models, loop, losses

WORDS = ("red green blue north south east west stone river cloud tree bird fish house road bridge "
         "one two three four five six seven eight nine ten").split()


def _rows(count, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(count):
    start, num = rng.integers(0, len(WORDS)), rng.integers(20, 60)
    # Successive words mostly follow each other in the list, so that there is something to learn.
    steps = np.where(rng.random(num) < 0.9, 1, rng.integers(0, len(WORDS), num))
    yield " ".join(WORDS[i % len(WORDS)] for i in start + np.cumsum(steps)) + "."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("momentum")
  corpus, task = folder / "corpus.jsonl", folder / "task.jsonl"
  corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in _rows(400)))
  rng = np.random.default_rng(1)
  task.write_text("".join(
    json.dumps({"text": WORDS[rng.integers(3)], "label": int(rng.integers(2))}) + "\n"
    for _ in range(12)))
  run = folder / "run.gin"
  run.write_text(f"""
include 'meta_optimizer/momentum.gin'
include 'data/jsonl.gin'
include 'models/tiny.gin'
MESH = None
CORPUS_PATH = {str(corpus)!r}
VOCAB_SIZE = 300
data.TrainSentencePiece.sample_bytes = 100_000
ETA = 0.5
SEEDS = [0, 1]
STEPS = 20
LENGTH = 32
BATCH_SIZE = 4
optim.warmup_cosine.warmup_steps = 2
momentum.Texts.validation_fraction = 0.1
momentum.Evaluate.num_train = 16
momentum.Evaluate.draws = (0, 1)
TASK = @tasks.choose()
tasks.choose:
  task = {str(task)!r}
  template = "{{text}} {{label}}"
  labels = ("one", "two")
SHOTS = (0, 2)
models.TransformerConfig.max_length = 64
""")
  return run


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "run"
  assert cli.main(["run", str(files), "--workdir", str(workdir)]) == 0
  return workdir


def _summary(workdir):
  return json.loads((workdir / "report" / "summary.json").read_text())


def test_the_summary_is_complete(finished):
  summary = _summary(finished)
  assert summary["eta"] == 0.5 and summary["seeds"] == [0, 1] and summary["lengths"] == [8, 16, 32]
  assert list(summary["perplexity"]) == [
    "train_32", "validation_8", "validation_16", "validation_32"]
  for of in summary["perplexity"].values():
    assert len(of["vanilla"]) == len(of["momentum"]) == 2
    got = of["loss_difference"]
    want = np.log(of["momentum"]) - np.log(of["vanilla"])
    np.testing.assert_allclose(got["values"], want, rtol=1e-6)
    assert got["interval"][0] < got["mean"] < got["interval"][1]
    assert np.all(want != 0)
  assert set(summary["in_context"]) == {"0", "2"}
  few = summary["in_context"]["2"]
  assert (few["num_rows"], few["num_draws"]) == (10, 2)
  assert {s["name"].split("/")[0] for s in summary["stages"]} == {"texts", "train", "evaluate"}
  assert 0 < summary["texts"]["validation_documents"] < summary["texts"]["train_documents"]


def test_the_page_shows_both(finished):
  page = (finished / "report" / "index.html").read_text()
  assert page.count("data:image/png;base64,") == 2
  for text in ("Momentum attention", "validation_16", "2 demonstrations", "t distribution"):
    assert text in page


def test_a_second_run_is_free_and_another_decay_trains_the_momentum_arm_only(
    finished, files, capsys):
  assert cli.main(["run", str(files), "--workdir", str(finished)]) == 0
  printed = "".join(capsys.readouterr())
  assert "running" not in printed and "validation_32" in printed
  assert cli.main(["run", str(files), "--workdir", str(finished), "--gin.ETA=0.25",
                   "--gin.STAGES=['train']"]) == 0
  printed = "".join(capsys.readouterr())
  assert "train/momentum/seed0: running" in printed and "eta" in printed
  assert "train/vanilla/seed0: running" not in printed
  assert cli.main(["run", str(files), "--workdir", str(finished)]) == 0


def test_a_pair_starts_from_the_same_numbers_and_reads_the_same_batches(finished):
  first = {}
  for arm in ("vanilla", "momentum"):
    folder = finished / "train" / arm / "seed0"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first[arm] = [r["num_tokens"] for r in records]
  assert first["vanilla"] == first["momentum"]
  own = texts.Texts(PythonReference(), vocabulary_sources.TrainSentencePiece(), 32)
  system = pairs.Pairs(0.5, own, pairs.Training(
    TransformerConfig(vocab_size=9, width=16, num_layers=2, num_heads=2, mlp_width=16,
                      max_length=64), optax.sgd(0.1), 2), pairs.Evaluate())
  made = [
    loop.initializer(language_models.language_model(system.training.arm(eta).model, 9, 32))(
      jax.random.key(0)) for eta in system.arms().values()]
  jax.tree.map(np.testing.assert_array_equal, *made)


def test_models_load_with_their_decay_and_are_not_exported(finished, tmp_path):
  folder = finished / "train" / "momentum" / "seed0"
  source = pretrained.load(str(folder))
  assert source.config.momentum == 0.5
  prepared = texts.Prepared(finished / "texts")
  unseen = prepared.validation(32)
  batch = unseen.batch(np.arange(len(unseen)))
  nats = losses.lm_example_losses(source.model).token_losses(source.params(), batch)
  mean = float(jnp.sum(nats * batch["loss_mask"]) / batch["loss_mask"].sum())
  found = _summary(finished)["perplexity"]["validation_32"]["momentum"][0]
  np.testing.assert_allclose(lm.perplexity(mean), found, rtol=1e-5)
  with pytest.raises(ValueError, match="has momentum attention .*which no model of transformers"):
    exporting.export(tmp_path / "out", source)
  assert not (tmp_path / "out").exists()
  plain = pretrained.load(str(finished / "train" / "vanilla" / "seed0"))
  assert plain.config.momentum is None
  exporting.export(tmp_path / "out", plain)


def test_unseen_text_is_the_same_at_every_length(finished):
  prepared = texts.Prepared(finished / "texts")
  read = []
  for length in (8, 16, 32):
    unseen = prepared.validation(length)
    rows = unseen.tokens(np.arange(len(unseen)))
    counts = unseen.num_tokens(np.arange(len(unseen)))
    read.append(np.concatenate([row[1:n] for row, n in zip(rows, counts)]))
  np.testing.assert_array_equal(read[0], read[1])
  np.testing.assert_array_equal(read[0], read[2])
  train = instances_lib.open_instances(finished / "texts" / "train")
  documents = {int(i) for n in range(len(train)) for i in train.documents(n)[0]}
  unseen = prepared.validation(8)
  assert not documents & {int(i) for n in range(len(unseen)) for i in unseen.documents(n)[0]}


def test_the_unseen_share_is_that_of_a_sampled_corpus_too():
  """Corpora such as `data.InstalledText` keep the documents whose first key is smallest."""
  ids = sorted(range(4000), key=order_key)[:1000]
  unseen = [unseen_text.is_unseen(Document(i, "", "", ""), 0.1, 0) for i in ids]
  assert 70 < sum(unseen) < 130


@pytest.mark.parametrize("binding, message", [
  ("--gin.ETA=1.0", "eta=1.0 must be a number above 0 and below 1"),
  ("--gin.ETA=0", "eta=0 must be a number above 0 and below 1"),
  ("--gin.ETA=-0.5", "eta=-0.5 must be a number above 0"),
  ("--gin.SEEDS=[]", "seeds=[] must be a list of one or more different"),
  ("--gin.SEEDS=[1, 1]", "seeds=[1, 1] must be a list of one or more different"),
  ("--gin.LENGTH=30", "and a multiple of 4"),
  ("--gin.LENGTH=128", "raise the latter"),
  ("--gin.STEPS=0", "must be"),
  ("--gin.BATCH_SIZE=0", "batch_size=0 must be an integer of at least 1"),
  ("--gin.TASK='task'", "task='task' must be a component such as @tasks.choose()"),
  ("--gin.models.TransformerConfig.momentum=0.3", "leave it None"),
  ("--gin.models.TransformerConfig.sliding_window=8", "hides them"),
  ("--gin.momentum.Evaluate.normalisation='x'", "normalisation='x' must be 'sum', 'token'"),
  ("--gin.momentum.Texts.validation_fraction=1.0", "fraction=1.0 must be a number above 0"),
])
def test_bad_input_is_one_sentence(files, tmp_path, capsys, binding, message):
  code = cli.main(["run", str(files), "--workdir", str(tmp_path / "w"), binding])
  printed = "".join(capsys.readouterr())
  assert code == 2 and message in printed and printed.count("lmops: error:") == 1
  assert not (tmp_path / "w").exists()


def test_the_decay_must_be_given():
  with pytest.raises(TypeError, match="eta"):
    pairs.Pairs(texts=None, training=None, evaluate=None)
  with pytest.raises(resolve.ConfigError, match="ETA"):
    resolve.load(["meta_optimizer/momentum_paper.gin"], [
      "CORPUS_PATH = '/data/corpus'", "VOCABULARY_PATH = '/data/tokenizer.json'"])


def test_the_papers_setting_is_as_published():
  system = resolve.load(["meta_optimizer/momentum_paper.gin"], [
    "ETA = 0.5", "CORPUS_PATH = '/data/corpus'", "VOCABULARY_PATH = '/data/tokenizer.json'",
  ]).build()
  training = system.training
  model = training.arm(system.eta).model
  assert (model.num_layers, model.width, model.num_heads, model.mlp_width) == (24, 1024, 16, 4096)
  assert model.momentum == 0.5 and system.texts.lengths() == (256, 512, 1024)
  d, f, v = 1024, 4096, 50_257
  layer = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
  assert num_params(dataclasses.replace(model, vocab_size=v)) == 24 * layer + 2 * d + v * d
  assert 340e6 < 24 * layer + v * d < 360e6
  assert training.num_steps == 500_000
  assert training.batch_size * system.texts.length == 512 * 1024
  rate = resolve.load(["meta_optimizer/momentum_paper.gin"], [
    "ETA = 0.5", "CORPUS_PATH = '/data/corpus'", "VOCABULARY_PATH = '/data/tokenizer.json'",
  ]).tree.child("system", "training", "optimizer", "learning_rate").build()
  for step, want in {0: 0, 10_000: 1.5e-4, 20_000: 3e-4, 260_000: 1.5e-4, 500_000: 0}.items():
    assert float(rate(step)) == pytest.approx(want, rel=1e-6, abs=1e-12)
