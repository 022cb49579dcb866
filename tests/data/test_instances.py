import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from lmops_jax.data import instance_writing, packing
from lmops_jax.data.instance_writing import write_instances
from lmops_jax.data.instances import open_instances
from lmops_jax.data.packing import Instance

PAD, EOS, BOS, VOCAB, LENGTH = 0, 1, 3, 300, 12
SPECIAL = {"length": LENGTH, "vocab_size": VOCAB, "pad_id": PAD, "eos_id": EOS, "bos_id": BOS}


def make(count=50, seed=0):
  generator = np.random.default_rng(seed)
  documents = [
    (int(generator.integers(2**40, 2**62)), generator.integers(4, VOCAB, size).tolist())
    for size in generator.integers(1, 30, count)
  ]
  packed = list(packing.pack(documents, length=LENGTH, bos_id=BOS, eos_id=EOS))
  single = packing.one_per_document(
    [(i + 1, ids) for i, ids in documents[:10]], length=LENGTH, bos_id=BOS, eos_id=EOS)
  return [*packed, *single]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("instances")
  instances = make()
  count = write_instances(directory, instances, instances_per_shard=20,
                          vocabulary_fingerprint="abc", description="A test.", **SPECIAL)
  assert count == len(instances)
  return directory, instances


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_round_trip(written, cache_bytes):
  directory, want = written
  got = open_instances(directory, cache_bytes=cache_bytes)
  assert len(got) == len(want) > 40
  assert (got.length, got.vocab_size, got.pad_id, got.eos_id, got.bos_id) == (12, 300, 0, 1, 3)
  assert got.vocabulary_fingerprint == "abc" and got.description == "A test."
  assert got.total_tokens == sum(len(i.tokens) for i in want)
  np.testing.assert_array_equal(got.ids, [i.id for i in want])
  order = np.random.default_rng(1).permutation(len(want))
  tokens = got.tokens(order)
  assert tokens.dtype == np.int32 and tokens.shape == (len(want), LENGTH + 1)
  for row, index in zip(tokens, order):
    padding = [PAD] * (LENGTH + 1 - len(want[index].tokens))
    assert row.tolist() == want[index].tokens.tolist() + padding
    for a, b in zip(got.instance(int(index)), want[index]):
      np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(got.num_tokens(order), [len(want[i].tokens) for i in order])
  learned = got.batch(order)["loss_mask"].sum(axis=1)
  np.testing.assert_array_equal(got.num_learned(order), learned)


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_batch_masks_padding_and_what_follows_eos(written, cache_bytes):
  directory, want = written
  got = open_instances(directory, cache_bytes=cache_bytes)
  indices = np.array([len(want) - 1, 0, 7, 7, len(want) - 4])
  batch = got.batch(indices)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    "tokens": ((5, 12), np.int32), "targets": ((5, 12), np.int32),
    "loss_mask": ((5, 12), np.float32), "example_id": ((5,), np.int64),
  }
  np.testing.assert_array_equal(batch["example_id"], [want[i].id for i in indices])
  num_eos_inputs = 0
  for row, index in enumerate(indices):
    stored = want[index].tokens.tolist()
    for position in range(LENGTH):
      real = position + 1 < len(stored)
      token = stored[position] if position < len(stored) else PAD
      assert batch["tokens"][row, position] == token
      assert batch["targets"][row, position] == (stored[position + 1] if real else PAD)
      assert batch["loss_mask"][row, position] == (real and token not in (PAD, EOS))
      num_eos_inputs += real and token == EOS
  assert num_eos_inputs > 0
  batch["tokens"][:] = 5  # a caller's change stays in its batch
  assert not np.array_equal(got.batch(indices)["tokens"], batch["tokens"])


def test_documents(written):
  directory, want = written
  for cache_bytes in (1 << 30, 0):
    got = open_instances(directory, cache_bytes=cache_bytes)
    for index in (0, 5, len(want) - 1):
      ids, counts = got.documents(index)
      np.testing.assert_array_equal(ids, want[index].document_ids)
      np.testing.assert_array_equal(counts, want[index].document_num_tokens)
      assert ids.dtype == np.int64 and counts.dtype == np.int32


def test_tfds_reads_the_folder(written):
  import tensorflow_datasets as tfds

  directory, want = written
  builder = tfds.builder_from_directory(directory)
  source = builder.as_data_source("train")
  assert len(source) == len(want) == builder.info.splits["train"].num_examples
  for index in (0, 20, len(want) - 1):
    example = source[index]
    assert int(example["id"]) == want[index].id
    np.testing.assert_array_equal(example["tokens"], want[index].tokens)
    np.testing.assert_array_equal(example["document_ids"], want[index].document_ids)
    np.testing.assert_array_equal(
      example["document_num_tokens"], want[index].document_num_tokens)


def test_reading_and_writing_need_no_tensorflow_and_repeat_bytes(written, tmp_path):
  """Another process, another hash seed: the same bytes, and no TensorFlow on the way."""
  directory, want = written
  program = (
    "import pickle, sys\n"
    "from lmops_jax.data import instance_writing, instances\n"
    "source, target = sys.argv[1:]\n"
    "old = instances.open_instances(source)\n"
    "instance_writing.write_instances(target, (old.instance(i) for i in range(len(old))),\n"
    "  length=12, vocab_size=300, pad_id=0, eos_id=1, bos_id=3, instances_per_shard=20,\n"
    "  vocabulary_fingerprint='abc', description='A test.')\n"
    "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
  )
  environment = {**os.environ, "PYTHONHASHSEED": "123"}
  subprocess.run([sys.executable, "-c", program, str(directory), str(tmp_path)], check=True,
                 env=environment)
  digests = [
    {p.name: hashlib.blake2b(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    for folder in (directory, tmp_path)
  ]
  assert digests[0] == digests[1] and len(digests[0]) >= 6


def test_writing_again_replaces_old_shards(tmp_path):
  instances = make()
  write_instances(tmp_path, instances, instances_per_shard=10, **SPECIAL)
  write_instances(tmp_path, instances[:15], instances_per_shard=10, **SPECIAL)
  assert len(list(tmp_path.glob("*array_record*"))) == 2
  assert len(open_instances(tmp_path)) == 15


def test_interrupted_writing_is_not_opened(tmp_path):
  write_instances(tmp_path, make()[:5], **SPECIAL)

  def broken():
    yield from make()[:3]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_instances(tmp_path, broken(), **SPECIAL)
  with pytest.raises(ValueError, match="holds no finished instances"):
    open_instances(tmp_path)


def test_no_instances(tmp_path):
  assert write_instances(tmp_path, [], **SPECIAL) == 0
  got = open_instances(tmp_path)
  assert len(got) == 0 and len(got.ids) == 0
  assert got.batch([])["tokens"].shape == (0, LENGTH)
  with pytest.raises(IndexError, match="instance 0 is out of range"):
    got.tokens([0])
  with pytest.raises(ValueError, match="has no instance"):
    got.indices_of([0])


@pytest.mark.parametrize("tokens,message", [
  ([BOS, VOCAB], "token id 300.*vocab_size=300"),
  ([BOS, -1], "token id -1"),
  ([BOS], "has 1 tokens"),
  ([BOS] * 14, "has 14 tokens; with length=12 it must have 2 to 13"),
])
def test_instances_that_do_not_fit_are_refused(tokens, message, tmp_path):
  bad = Instance(0, np.array(tokens, np.int32), np.array([1]), np.array([len(tokens) - 1]))
  with pytest.raises(ValueError, match=message):
    write_instances(tmp_path, [bad], **SPECIAL)


@pytest.fixture
def damaged(tmp_path):
  directory = tmp_path / "corpus"
  write_instances(directory, make(2000), instances_per_shard=500, **SPECIAL)
  shard = directory / "instances-train.array_record-00001"
  return directory, shard


def test_missing_and_truncated_shards_are_named(damaged):
  directory, shard = damaged
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  with pytest.raises(ValueError, match=f"{shard.name} is .* bytes long instead of"):
    open_instances(directory)
  shard.unlink()
  with pytest.raises(ValueError, match=f"{shard.name} is missing"):
    open_instances(directory)


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
@pytest.mark.parametrize("where", ["records", "footer", "everything"])
def test_damaged_shards_are_named(damaged, where, cache_bytes):
  directory, shard = damaged
  data = bytearray(shard.read_bytes())
  if where == "records":
    data[5000:5400] = b"\xff" * 400
  elif where == "footer":
    data[-66_000:] = bytes(66_000)
  else:
    data[:] = bytes(len(data))
  shard.write_bytes(data)
  instances = open_instances(directory, cache_bytes=cache_bytes)
  with pytest.raises(ValueError, match=f"{shard.name} is damaged and cannot be read"):
    instances.tokens(np.arange(500, 1000))


def test_shards_in_another_order_are_noticed(damaged):
  directory, shard = damaged
  path = directory / "instances.json"
  metadata = json.loads(path.read_text())
  metadata["shards"][0]["count"] -= 1
  metadata["shards"][1]["count"] += 1
  path.write_text(json.dumps(metadata))
  with pytest.raises(ValueError, match="damaged"):
    open_instances(directory).tokens([0])


@pytest.mark.parametrize("version", [1, 9])
def test_unknown_version(written, tmp_path, version):
  directory, _ = written
  metadata = json.loads((directory / "instances.json").read_text())
  (tmp_path / "instances.json").write_text(json.dumps({**metadata, "version": version}))
  with pytest.raises(ValueError, match=f"format version {version}; this code reads 2. Write"):
    open_instances(tmp_path)


@pytest.mark.parametrize("together", [1, 7, 1 << 25])
def test_two_instances_with_one_id_are_refused(tmp_path, monkeypatch, together):
  monkeypatch.setattr(instance_writing, "_IDS_TOGETHER", together)
  monkeypatch.setattr(instance_writing, "_BLOCK_OF_IDS", together)
  instances = make()
  write_instances(tmp_path, instances, **SPECIAL)
  instances[21] = instances[21]._replace(id=instances[4].id)
  with pytest.raises(ValueError, match=f"instances 4 and 21 .* the id {instances[4].id}; an id is"):
    write_instances(tmp_path, instances, instances_per_shard=10, **SPECIAL)
  with pytest.raises(ValueError, match="holds no finished instances"):
    open_instances(tmp_path)


def test_ids_that_are_not_those_of_the_instances_are_noticed(tmp_path):
  write_instances(tmp_path, make(), **SPECIAL)
  np.save(tmp_path / "ids.npy", np.arange(3))
  with pytest.raises(ValueError, match="ids.npy holds 3 ids of"):
    open_instances(tmp_path)
  (tmp_path / "ids.npy").unlink()
  with pytest.raises(ValueError, match="ids.npy cannot be read"):
    open_instances(tmp_path)


def test_indices(written):
  directory, want = written
  got = open_instances(directory)
  for bad in ([len(want)], [-1]):
    with pytest.raises(IndexError, match="out of range"):
      got.tokens(bad)
  for bad in (3, [[1]], [0.5]):
    with pytest.raises(ValueError, match="list of integers"):
      got.tokens(bad)
  with pytest.raises(ValueError, match="no instance with the id 999"):
    got.indices_of([want[0].id, 999])


def test_indices_of_ids(tmp_path):
  chosen = make()[1::3][::-1]
  write_instances(tmp_path, chosen, **SPECIAL)
  got = open_instances(tmp_path)
  np.testing.assert_array_equal(got.ids, [i.id for i in chosen])
  np.testing.assert_array_equal(got.indices_of(got.ids[[4, 0, 2]]), [4, 0, 2])


def test_instances_can_be_pickled(written):
  directory, want = written
  for cache_bytes in (1 << 30, 0):
    got = open_instances(directory, cache_bytes=cache_bytes)
    got.tokens([0])
    again = pickle.loads(pickle.dumps(got))
    np.testing.assert_array_equal(again.tokens([3]), got.tokens([3]))


def test_full_disk_is_named(tmp_path, monkeypatch):
  from array_record.python import array_record_module

  class FullDisk:
    def __init__(self, path, options):
      self.path = path

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device; writing " + self.path)

    def close(self):
      pass

  monkeypatch.setattr(array_record_module, "ArrayRecordWriter", FullDisk)
  with pytest.raises(OSError, match="No space left on device.*array_record-00000"):
    write_instances(tmp_path, make(), **SPECIAL)
