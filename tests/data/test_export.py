import json

import numpy as np
import pyarrow.parquet
import pytest

from lmops_jax.data import TrainSentencePiece, export, packing, shards
from lmops_jax.data.instance_writing import write_instances
from lmops_jax.data.instances import open_instances

TEXTS = [f"Document number {i} says: value = {i * i};\n    indented line {i}.\n" * (1 + i % 4)
         for i in range(30)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  return TrainSentencePiece(vocab_size=320).build(TEXTS, tmp_path_factory.mktemp("v"))


@pytest.fixture(scope="module")
def corpus(vocabulary, tmp_path_factory):
  documents = [(1000 + i, vocabulary.encode(text)) for i, text in enumerate(TEXTS)]
  packed = packing.pack(documents, length=64, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id)
  directory = tmp_path_factory.mktemp("corpus")
  write_instances(
    directory, packed, length=64, vocab_size=vocabulary.vocab_size, pad_id=vocabulary.pad_id,
    eos_id=vocabulary.eos_id, bos_id=vocabulary.bos_id,
    vocabulary_fingerprint=vocabulary.fingerprint)
  return open_instances(directory)


INDICES = np.array([7, 2, 11, 3])


@pytest.fixture(scope="module")
def ids(corpus):
  return corpus.ids[INDICES]


def test_ids(corpus, ids, tmp_path):
  assert export.export_selection(corpus, ids, tmp_path / "x") == 4
  assert np.load(tmp_path / "x" / "ids.npy").tolist() == corpus.ids[[2, 3, 7, 11]].tolist()


def test_tfds_copy_is_exact_and_in_corpus_order(corpus, ids, tmp_path):
  export.export_selection(corpus, ids, tmp_path, "tfds")
  copy = open_instances(tmp_path)
  assert copy.ids.tolist() == corpus.ids[[2, 3, 7, 11]].tolist()
  np.testing.assert_array_equal(copy.tokens(np.arange(4)), corpus.tokens([2, 3, 7, 11]))
  np.testing.assert_array_equal(copy.documents(2)[0], corpus.documents(7)[0])
  assert copy.vocabulary_fingerprint == corpus.vocabulary_fingerprint
  assert copy.batch([1])["example_id"].tolist() == [corpus.ids[3]]
  # A selection can be narrowed again by the same ids.
  export.export_selection(copy, corpus.ids[[11, 3]], tmp_path / "again", "tfds")
  assert open_instances(tmp_path / "again").ids.tolist() == corpus.ids[[3, 11]].tolist()


def test_mmididx_copy_is_exact(corpus, ids, tmp_path):
  export.export_selection(corpus, ids, tmp_path, "mmididx")
  shard = shards.read_shard(tmp_path / "data_0")
  assert shard.dtype == np.uint16
  for row, index in zip(shard, [2, 3, 7, 11], strict=True):
    np.testing.assert_array_equal(row, corpus.instance(index).tokens)


def test_text_of_all_instances_is_the_corpus(corpus, vocabulary, tmp_path):
  export.export_selection(corpus, corpus.ids, tmp_path, "jsonl", vocabulary)
  rows = [json.loads(line) for line in (tmp_path / "selection.jsonl").open()]
  assert [row["id"] for row in rows] == corpus.ids.tolist()
  assert rows[0]["document_ids"] == corpus.documents(0)[0].tolist()
  squeezed = "".join(row["text"] for row in rows).replace("\n", "")
  assert squeezed == "".join(TEXTS).replace("\n", "")


def test_documents_of_an_instance_are_kept_apart(vocabulary):
  ids = [vocabulary.encode(text) for text in ("one end", "whole", "begin")]
  tokens = np.array([vocabulary.bos_id, *ids[0], vocabulary.eos_id, *ids[1], vocabulary.eos_id,
                     *ids[2]])
  assert export.instance_texts(tokens, vocabulary) == ["one end", "whole", "begin"]


def test_parquet_equals_jsonl(corpus, ids, vocabulary, tmp_path):
  export.export_selection(corpus, ids, tmp_path, "parquet", vocabulary)
  export.export_selection(corpus, ids, tmp_path, "jsonl", vocabulary)
  rows = pyarrow.parquet.read_table(tmp_path / "selection.parquet").to_pylist()
  assert rows == [json.loads(line) for line in (tmp_path / "selection.jsonl").open()]


def test_errors(corpus, ids, vocabulary, tmp_path):
  def run(ids=ids, format="ids", **kwargs):
    export.export_selection(corpus, ids, tmp_path / "x", format, **kwargs)

  with pytest.raises(ValueError, match="format='csv'"):
    run(format="csv")
  with pytest.raises(ValueError, match="selection is empty"):
    run(ids=[])
  with pytest.raises(ValueError, match="twice"):
    run(ids=corpus.ids[[1, 2, 1]])
  with pytest.raises(ValueError, match="no instance with the id 4000"):
    run(ids=[corpus.ids[1], 4000])
  with pytest.raises(ValueError, match="needs the vocabulary"):
    run(format="jsonl")
  other = TrainSentencePiece(vocab_size=310).build(TEXTS, tmp_path / "other")
  with pytest.raises(ValueError, match="another vocabulary"):
    run(format="parquet", vocabulary=other)
  assert not (tmp_path / "x").exists()
