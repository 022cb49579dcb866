"""A small model trained for want of a published one, and the choice between them."""

import dataclasses
import importlib
import json
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.data import Jsonl, TrainSentencePiece
from lmops_jax.mesh import meshes
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.shared_stages import small_model
from lmops_jax.shared_stages.small_model import ModelChoice, SmallModel
from lmops_jax.stages import pipeline, skeleton
from tests import model_folders

WORDS = "red green blue stone river cloud tree bird fish house road bridge one two three".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  path, rng = tmp_path_factory.mktemp("corpus") / "corpus.jsonl", np.random.default_rng(0)
  with path.open("w") as file:
    for _ in range(120):
      file.write(json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(20, 40)))}) + "\n")
  return path


def _small(corpus, **changes):
  return SmallModel(**{**dict(
    corpus=Jsonl(str(corpus)), vocabulary=TrainSentencePiece(vocab_size=300),
    model=TransformerConfig(width=16, num_layers=1, num_heads=2, mlp_width=24, max_length=32),
    optimizer=optax.adam(1e-2), num_steps=12, batch_size=4), **changes})


def _train(small, workdir):
  stage = pipeline.Stage(
    small_model.STAGE, lambda context: small.run(context, meshes.single_device()),
    settings=skeleton.fingerprints("small", small))
  record, = pipeline.run_stages([stage], workdir, system="test")
  return record, workdir / small_model.STAGE


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
  return _train(_small(corpus), tmp_path_factory.mktemp("small") / "w")


def test_the_folder_opens_as_a_model_with_its_tokenizer(finished):
  record, folder = finished
  assert record.status == "ran" and record.flops > 0
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if "loss" in line]
  assert losses[-1] < losses[0]
  source = pretrained.load(str(folder))
  tokenizer = source.tokenizer()
  assert source.config.vocab_size >= 270 and source.config.max_length == 32
  ids = tokenizer.encode("red green blue", False)
  assert tokenizer.decode(ids).strip() == "red green blue"
  assert tokenizer.eos_id is not None
  logits = source.model.apply(
    {"params": source.params()}, np.array([ids], np.int32), method="logits")
  assert logits.shape == (1, len(ids), source.config.vocab_size) and np.isfinite(logits).all()


def test_interrupted_training_goes_on(finished, corpus, tmp_path, monkeypatch):
  def killed(*args, **kwargs):
    raise KeyboardInterrupt

  describe = small_model.trained_vocabulary.describe_trained
  monkeypatch.setattr(small_model.trained_vocabulary, "describe_trained", killed)
  with pytest.raises(KeyboardInterrupt):
    _train(_small(corpus, checkpoint_every=5), tmp_path / "w")
  monkeypatch.setattr(small_model.trained_vocabulary, "describe_trained", describe)
  record, folder = _train(_small(corpus, checkpoint_every=5), tmp_path / "w")
  assert record.status == "resumed"
  want, got = (pretrained.load(str(f)).params() for f in (finished[1], folder))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("changes, match", [
  (dict(num_steps=0), "num_steps=0 must be an integer of at least 1"),
  (dict(batch_size=0), "batch_size=0 must be an integer of at least 1"),
  (dict(length=33), "length=33 are longer than models.TransformerConfig.max_length=32"),
])
def test_refuses_sizes_out_of_range(corpus, changes, match):
  with pytest.raises(ValueError, match=match):
    _small(corpus, **changes)


def test_refuses_a_corpus_smaller_than_a_batch(corpus, tmp_path):
  with pytest.raises(ValueError, match="fewer than one batch of training.SmallModel.batch_size=9"):
    _train(_small(corpus, batch_size=9000), tmp_path / "w")


# ------------------------------------------------------------------------------------ the choice


def test_a_path_comes_first_then_the_package_then_the_small_model(corpus, tmp_path, monkeypatch):
  folder = model_folders.write(tmp_path / "named")
  small = _small(corpus)
  by_path = ModelChoice(str(folder), small, package=None)
  assert (by_path.label, by_path.family) == ("named", "llama")
  assert by_path.config == pretrained.load(str(folder)).config
  assert by_path.stages("model", None) == [] and by_path.opened() is by_path._source

  trained = ModelChoice(None, small, package=None)
  assert (trained.label, trained.family) == ("a small model trained here", "small")
  assert trained.config == small.model

  package = tmp_path / "gguf_of_a_test"
  package.mkdir()
  (package / "__init__.py").write_text("")
  monkeypatch.syspath_prepend(str(tmp_path))
  importlib.invalidate_caches()
  assert small_model.packaged("gguf_of_a_test") is None  # there, and without a file
  assert small_model.packaged("no_such_package") is None and small_model.packaged(None) is None
  (package / "b.gguf").write_bytes(b"")
  (package / "a.gguf").write_bytes(b"")
  assert small_model.packaged("gguf_of_a_test") == package / "a.gguf"

  loaded = []

  def load(path, **kwargs):
    loaded.append((path, kwargs))
    return types.SimpleNamespace(config="config", path=Path(path), family="llama")

  monkeypatch.setattr(small_model.model_lib, "load", load)
  packed = ModelChoice(None, small, package="gguf_of_a_test", dtype="bfloat16")
  assert (packed.config, packed.label) == ("config", "a.gguf")
  (path, kwargs), = loaded
  assert path.endswith("a.gguf") and kwargs["dtype"] == "bfloat16"
  monkeypatch.setattr(small_model, "packaged", lambda _: package / "model")
  assert ModelChoice(None, small, package="gguf_of_a_test").label == "gguf_of_a_test"
  assert ModelChoice(str(folder), small, package=None).label == folder.name


def test_refuses_none_at_all_and_a_path_without_a_model(corpus, tmp_path):
  with pytest.raises(ValueError, match="there is no model: set MODEL"):
    ModelChoice(None, None, package=None)
  with pytest.raises(ValueError, match="path='.*absent' must be an existing path, or None"):
    ModelChoice(str(tmp_path / "absent"), _small(corpus), package=None)


def test_execution_choices_reach_the_model(corpus, tmp_path, finished):
  choice = ModelChoice(None, _small(corpus), package=None, dtype="bfloat16")
  assert choice.opened(finished[1]).config.dtype == "bfloat16"
  assert dataclasses.replace(choice, dtype="float32").opened(finished[1]).config.dtype == "float32"


@pytest.mark.slow
def test_a_study_trains_the_small_model_first(corpus, tmp_path, capsys):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(
    json.dumps({"text": WORDS[i % 5], "label": i % 2}) + "\n" for i in range(12)))
  (tmp_path / "run.gin").write_text(f"""
include 'structured_prompting/default.gin'
MESH = None
pretrained.choose.package = None
training.SmallModel.corpus = @data.Jsonl()
data.Jsonl.path = {str(corpus)!r}
small/data.TrainSentencePiece.vocab_size = 300
models.TransformerConfig.max_length = 64
SMALL_STEPS = 2
small/optim.warmup_cosine.warmup_steps = 1
TASK = {str(rows)!r}
tasks.choose.template = "{{text}}: {{label}}"
LABELS = ("one", "two")
ROWS = 6
COUNTS = [0, 4]
SEEDS = [0]
GROUP_TOKENS = 32
""")
  arguments = ["run", str(tmp_path / "run.gin"), "--workdir", str(tmp_path / "w")]
  assert cli.main(arguments) == 0, "".join(capsys.readouterr())
  summary = json.loads((tmp_path / "w" / "report" / "summary.json").read_text())
  assert summary["model"] == "a small model trained here"
  assert [stage["name"] for stage in summary["stages"]] == [
    "task/rows", "model", "prompt/rows/seed0"]
  capsys.readouterr()
  assert cli.main([*arguments, "--gin.SMALL_STEPS=3"]) == 0
  printed = "".join(capsys.readouterr())
  assert "model: running" in printed and "prompt/rows/seed0: running" in printed
  assert "task/rows: running" not in printed
