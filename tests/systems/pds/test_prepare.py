"""The stage that turns text into instances: nothing lost, parts apart, labels apart."""

import collections
import json

import numpy as np
import pytest

from lmops_jax.data import PythonReference, documents, files
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import prepare
from lmops_jax.text import vocabulary_sources


class Texts(documents.Corpus):
  """A corpus held in memory."""

  def __init__(self, prefix, num, words=60):
    rng = np.random.default_rng(len(prefix))
    letters = np.array(list("etaoinshrdlucmfw"))
    self.rows = [
      documents.Document(
        documents.document_id(f"{prefix}{i}"),
        " ".join("".join(rng.choice(letters, 6)) for _ in range(words)), "abc"[i % 3],
        f"{prefix}{i}",
      )
      for i in range(num)
    ]

  def read(self, counts):
    yield from self.rows

  def fingerprint(self):
    return "fixed"


def _prepare(folder, **kwargs):
  folder.mkdir()
  settings = {
    "corpus": Texts("corpus", 90), "target": Texts("target!", 20), "length": 32,
    "vocabulary": vocabulary_sources.TrainSentencePiece(vocab_size=320, sample_bytes=50_000),
    "num_held_out": 10,
  } | kwargs
  config = prepare.Prepare(**settings)
  context = pipeline.StageContext("prepare", folder, {}, lambda text: None)
  prepare.run(context, config)
  return prepare.Prepared(folder), config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  return _prepare(tmp_path_factory.mktemp("prepare") / "out")


def test_every_token_of_the_corpus_is_in_one_instance(prepared):
  parts, config = prepared
  vocabulary = parts.vocabulary
  stream = []
  for instances in (parts.corpus, parts.held_out):
    for i in range(len(instances)):
      stream += instances.instance(i).tokens[1:].tolist()
  want = []
  for document in config.corpus.documents():
    want += [*vocabulary.encode(document.text), vocabulary.eos_id]
  assert stream == want
  assert len(parts.held_out) == 10
  statistics = parts.statistics()["corpus"]
  assert statistics["num_documents"] == 90
  assert statistics["num_tokens"] == len(want) + len(parts.corpus) + 10  # a BOS an instance


def test_dev_and_test_share_no_document(prepared):
  parts, config = prepared

  def owners(instances):
    return {int(d) for i in range(len(instances)) for d in instances.documents(i)[0]}

  dev, test = owners(parts.target_dev), owners(parts.target_test)
  assert dev and test and not dev & test
  assert dev | test == {row.id for row in config.target.rows}


def test_labels_are_complete_and_in_their_own_file(prepared):
  parts, config = prepared
  assert parts.labels() == {row.id: (row.kind, row.source) for row in config.corpus.rows}
  for name in ("corpus", "target_dev", "target_test", "held_out"):
    info = json.loads((parts.directory / name / "features.json").read_text())
    assert "kind" not in json.dumps(info)


def test_a_document_an_instance(tmp_path):
  parts, config = _prepare(tmp_path / "out", pack_target=False)
  statistics = parts.statistics()
  for name in ("target_dev", "target_test"):
    part = getattr(parts, name)
    assert len(part) == statistics[name]["num_documents"]
    assert statistics[name]["cut_documents"] > 0 and statistics[name]["cut_tokens"] > 0
  row = parts.target_dev.instance(0)
  assert row.tokens[0] == parts.vocabulary.bos_id and len(row.tokens) == 33


def test_a_cap_on_the_target_is_counted(tmp_path):
  parts, _ = _prepare(tmp_path / "out", max_target_instances=5)
  statistics = parts.statistics()["target_dev"]
  assert statistics["num_instances"] == len(parts.target_dev) == 5
  assert statistics["num_unused"] > 0


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [({"length": 1}, "length=1"), ({"test_fraction": 1.0}, "test_fraction=1.0"),
   ({"num_held_out": -1}, "num_held_out=-1")],
)
def test_settings_are_checked(kwargs, message):
  corpus = PythonReference()
  base = {"corpus": corpus, "target": corpus, "vocabulary": vocabulary_sources.TrainSentencePiece()}
  with pytest.raises(ValueError, match=message):
    prepare.Prepare(**base | kwargs)


def test_counts_of_both_readings_agree(prepared):
  """The corpus is read twice; what is dropped is counted once."""
  parts, config = prepared
  counts: collections.Counter[str] = collections.Counter()
  list(config.corpus.documents(counts))
  assert parts.statistics()["corpus"]["dropped"] == dict(counts)


def test_files_that_are_not_read_are_told_and_counted(tmp_path):
  (tmp_path / "corpus").mkdir()
  rows = "".join(json.dumps({"text": d.text}) + "\n" for d in Texts("corpus", 90).rows)
  for name in ("part.jsonl", "._part.jsonl", "notes.md", "late.JSONL"):
    (tmp_path / "corpus" / name).write_text(rows)
  config = prepare.Prepare(
    files.Jsonl(str(tmp_path / "corpus")), Texts("target!", 20),
    vocabulary_sources.TrainSentencePiece(vocab_size=320, sample_bytes=50_000), length=32,
    num_held_out=10,
  )
  (tmp_path / "out").mkdir()
  told = []
  prepare.run(pipeline.StageContext("prepare", tmp_path / "out", {}, told.append), config)
  dropped = prepare.Prepared(tmp_path / "out").statistics()["corpus"]["dropped"]
  assert dropped == {"hidden": 1, "other_ending": 2}
  assert "prepare: corpus: 1 left out (hidden): ._part.jsonl" in told
  assert "prepare: corpus: 2 left out (other_ending): late.JSONL, notes.md" in told
