"""Selections exported in parts are those that one process exports."""

import shutil

import numpy as np
import pytest

from lmops_jax.data import TrainSentencePiece, export, instance_writing, packing, shards
from lmops_jax.data import instances as instances_lib
from lmops_jax.data.distributed import export as distributed

TEXTS = [f"Document {i}: value = {i * i};\n  indented line {i}.\n" * (1 + i % 4) for i in range(60)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  return TrainSentencePiece(vocab_size=320).build(TEXTS, tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def corpus(vocabulary, tmp_path_factory):
  packed = packing.pack(
    ((1000 + i, vocabulary.encode(text)) for i, text in enumerate(TEXTS)), length=32,
    bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
  )
  directory = tmp_path_factory.mktemp("corpus")
  instance_writing.write_encoded(directory, packed, vocabulary, 32)
  return instances_lib.open_instances(directory)


def _tree(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("part", [5, 1000])
@pytest.mark.parametrize("format", ["jsonl", "parquet", "mmididx", "tfds"])
def test_parts_make_the_same_files(
  corpus, vocabulary, here, tmp_path, monkeypatch, format, part
):
  monkeypatch.setattr(export, "BLOCK", 4)
  indices = np.flatnonzero(np.arange(len(corpus)) % 3 > 0)[:54]
  np.save(tmp_path / "indices.npy", indices)
  if format in ("tfds", "mmididx"):  # whose files are the parts
    monkeypatch.setattr(shards, "SEQUENCES_PER_SHARD", part)
    for writer in (distributed, instance_writing):
      monkeypatch.setitem(writer.write_instances.__kwdefaults__, "instances_per_shard", part)
    monkeypatch.setitem(shards.write_shards.__kwdefaults__, "sequences_per_shard", part)
  export.export_selection(corpus, corpus.ids[indices], tmp_path / "want", format, vocabulary)
  distributed.export_selection(
    here, tmp_path / "scratch", corpus, tmp_path / "indices.npy", tmp_path / "got", format,
    vocabulary, part=part,
  )
  assert _tree(tmp_path / "got") == _tree(tmp_path / "want")
  assert len(indices) == 54  # of several parts, the last is smaller


def test_text_needs_the_vocabulary_of_the_corpus(corpus, here, tmp_path):
  np.save(tmp_path / "indices.npy", np.arange(3))
  other = TrainSentencePiece(vocab_size=330).build(TEXTS, tmp_path / "other")
  for vocabulary, message in ((None, "needs the vocabulary"), (other, "another vocabulary")):
    with pytest.raises(ValueError, match=message):
      distributed.export_selection(
        here, tmp_path / "scratch", corpus, tmp_path / "indices.npy", tmp_path / "got", "jsonl",
        vocabulary,
      )


@pytest.mark.parametrize("format, damaged", [
  ("jsonl", "part-*"), ("parquet", "part-*"), ("mmididx", "part-*.bin"), ("mmididx", "part-*.idx"),
  ("tfds", "instances-*[0-9]"), ("tfds", "instances-*.npz"),
])
def test_a_part_with_a_flipped_bit_is_made_again(
  corpus, vocabulary, here, tmp_path, monkeypatch, format, damaged
):
  """What an interrupted export left in its scratch folder; parts that were moved already too."""
  monkeypatch.setitem(distributed.write_instances.__kwdefaults__, "instances_per_shard", 5)
  monkeypatch.setattr(shards, "SEQUENCES_PER_SHARD", 5)
  np.save(tmp_path / "indices.npy", np.arange(17))

  def attempt():
    distributed.export_selection(
      here, tmp_path / "scratch", corpus, tmp_path / "indices.npy", tmp_path / "got", format,
      vocabulary, part=5)
    return _tree(tmp_path / "got")

  def stopped(directory):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(distributed, "_clear", stopped)
    attempt()
  victim = sorted((tmp_path / "scratch").glob(damaged))[-1]
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  got = attempt()
  shutil.rmtree(tmp_path / "scratch")
  assert got == attempt()
  assert attempt() == got  # after which moved parts are gone from the scratch folder
