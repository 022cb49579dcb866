import importlib.util
from pathlib import Path

import gin
import pytest

import lmops_jax.data as data
from lmops_jax.config import resolve

FOLDER = Path(__file__).parents[2] / "gin" / "data"
REQUIRED = {
  "CORPUS_PATH": "'/corpus'", "CORPUS_NAME": "'lm1b'", "TARGET_PATH": "'/target'",
  "VOCABULARY_PATH": "'/vocabulary'",
}


@gin.register(module="test_data_gin")
def holder(corpus=None, target=None, vocabulary=None):
  return corpus, target, vocabulary


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def build(name, *bindings):
  """What the macros of a file build, with a value for each macro that it requires."""
  text = (FOLDER / f"{name}.gin").read_text()
  own = [f"{k} = {v}" for k, v in REQUIRED.items() if f"{k} = %gin.REQUIRED" in text]
  fields = [f"test_data_gin.holder.{m.lower()} = %{m}" for m in ("CORPUS", "TARGET", "VOCABULARY")
            if f"\n{m} = " in text]
  gin.parse_config([text, *own, *fields, *bindings])
  return gin.get_configurable("test_data_gin.holder")()


EXPECTED = {
  "installed_text": (data.InstalledText(), data.PythonReference(), data.TrainSentencePiece()),
  "jsonl": (data.Jsonl("/corpus"), None, data.TrainSentencePiece(32_000, 50_000_000)),
  "parquet": (data.Parquet("/corpus"), None, data.TrainSentencePiece(32_000, 50_000_000)),
  "text_folder": (data.TextFolder("/corpus"), None, data.TrainSentencePiece(32_000, 50_000_000)),
  "tfds": (data.Tfds("lm1b"), None, data.TrainSentencePiece(32_000, 50_000_000)),
  "target_jsonl": (None, data.Jsonl("/target"), None),
  "target_text_folder": (None, data.TextFolder("/target"), None),
  "sentencepiece": (None, None, data.SentencePieceFile("/vocabulary")),
  "hugging_face": (None, None, data.HuggingFaceTokenizer("/vocabulary")),
  "model_tokenizer": (None, None, data.ModelTokenizer("/vocabulary")),
}


def test_every_file_is_expected():
  own_test = {"beam"}
  assert {path.stem for path in FOLDER.glob("*.gin")} == set(EXPECTED) | own_test


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_file_builds_what_it_says(name):
  assert build(name) == EXPECTED[name]
  first = (FOLDER / f"{name}.gin").read_text().splitlines()[0]
  assert first.startswith(f"# gin/data/{name}.gin: defines ")


def test_beam_is_bound_to_a_system(monkeypatch):
  """The engine needs no Beam to be built, only to be asked whether it is there."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  text = (FOLDER / "beam.gin").read_text()
  assert text.startswith("# gin/data/beam.gin: defines ENGINE")
  options = ["BEAM_OPTIONS = ['--runner=FlinkRunner']"]
  run = resolve.load(["pds/smoke.gin", "data/beam.gin"], options)
  assert "engine = @beam.Engine()" in run.text()
  gin.parse_config([text, "test_data_gin.holder.corpus = %ENGINE", "BUCKETS = 9"])
  engine, _, _ = gin.get_configurable("test_data_gin.holder")()
  assert engine == data.Engine([], 9)


def test_knobs():
  corpus, _, vocabulary = build("installed_text", "CORPUS_BYTES = 5_000", "VOCAB_SIZE = 600")
  assert corpus.max_bytes == 5000 and vocabulary.vocab_size == 600
  gin.clear_config()
  corpus, _, _ = build("jsonl", "TEXT_FIELD = 'body'")
  assert corpus.text_field == "body"


def test_corpora_can_be_wrapped():
  corpus, _, _ = build("jsonl", "CORPUS = @data.Deduplicated()",
                       "data.Deduplicated.corpus = @data.Jsonl()")
  assert corpus == data.Deduplicated(data.Jsonl("/corpus"))


def test_required_macros_are_required():
  with pytest.raises(ValueError, match="CORPUS_PATH"):
    gin.parse_config_files_and_bindings([str(FOLDER / "jsonl.gin")], [])
