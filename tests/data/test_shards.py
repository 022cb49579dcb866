import os
import struct

import numpy as np
import pytest

from lmops_jax.data import shards

SEQUENCES = [[3, 500, 1], [7], [], [65_499, 0, 2, 9]]


def test_bytes_of_a_shard(tmp_path):
  """Against bytes put together by hand from the description of the format."""
  assert shards.write_shard(tmp_path / "data_0", SEQUENCES, vocab_size=65_499 + 1, dtype=None) == 4
  # vocab_size 65,500 needs int32 by the reference's rule; below it is uint16.
  assert (tmp_path / "data_0.idx").read_bytes()[17] == 4
  shards.write_shard(tmp_path / "data_0", SEQUENCES, dtype=np.uint16)
  want = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 1)
  want += struct.pack("<4i", 3, 1, 0, 4) + struct.pack("<4q", 0, 6, 8, 8) + struct.pack("<q", 0)
  assert (tmp_path / "data_0.idx").read_bytes() == want
  data = struct.pack("<8H", 3, 500, 1, 7, 65_499, 0, 2, 9)
  assert (tmp_path / "data_0.bin").read_bytes() == data


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_round_trip(tmp_path, dtype):
  sequences = [[1, 2, 3], [], [120]]
  shards.write_shard(tmp_path / "x", sequences, dtype=dtype, document_index=(0, 2, 3))
  shard = shards.read_shard(tmp_path / "x")
  assert len(shard) == 3 and shard.dtype == dtype
  assert [row.tolist() for row in shard] == sequences
  assert all(row.dtype == dtype for row in shard)
  assert shard.document_index.tolist() == [0, 2, 3]
  with pytest.raises(IndexError, match="sequence 3"):
    shard[3]


def test_reads_a_shard_with_sequences_in_another_place(tmp_path):
  """Offsets, not sizes, say where a sequence begins."""
  (tmp_path / "x.bin").write_bytes(struct.pack("<4i", 9, 8, 7, 6))
  index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2, 1)
  index += struct.pack("<2i", 1, 3) + struct.pack("<2q", 12, 0) + struct.pack("<q", 0)
  (tmp_path / "x.idx").write_bytes(index)
  assert [row.tolist() for row in shards.read_shard(tmp_path / "x")] == [[6], [9, 8, 7]]


def test_empty_shard(tmp_path):
  assert shards.write_shard(tmp_path / "x", [], vocab_size=100) == 0
  assert len(shards.read_shard(tmp_path / "x")) == 0
  assert (tmp_path / "x.bin").stat().st_size == 0


def test_number_type_follows_the_vocabulary():
  assert shards.token_dtype(65_499) == np.uint16
  assert shards.token_dtype(65_500) == np.int32


@pytest.mark.parametrize("settings,sequence,message", [
  ({"vocab_size": 100}, [5, 100], "token id 100, which is not in 0 .. 99"),
  ({"vocab_size": 100}, [-1], "token id -1"),
  ({"dtype": np.uint16}, [65_536], "token id 65536.*uint16"),
  ({}, [1], "give one of vocab_size"),
  ({"vocab_size": 10, "dtype": np.int32}, [1], "give one of"),
  ({"dtype": np.uint32}, [1], "no code for uint32"),
])
def test_bad_tokens(tmp_path, settings, sequence, message):
  with pytest.raises(ValueError, match=message):
    shards.write_shard(tmp_path / "x", [[1], sequence], **settings)
  assert not (tmp_path / "x.idx").exists()


def damage(path, change):
  data = bytearray(path.read_bytes())
  path.write_bytes(bytes(change(data)))


@pytest.mark.parametrize("ending,change,message", [
  (".idx", lambda d: b"TNTIDX\x00\x00\x00" + d[9:], "begins with .*TNTIDX"),
  (".idx", lambda d: d[:9] + struct.pack("<Q", 2) + d[17:], "version 2"),
  (".idx", lambda d: d[:17] + b"\x09" + d[18:], "number type 9"),
  (".idx", lambda d: d[:-1], "bytes long, but 4 sequences need"),
  (".idx", lambda d: d[:20], "ends inside its header"),
  (".bin", lambda d: d[:-2], "14 bytes long, but its index describes 16"),
  (".bin", lambda d: d + b"xx", "18 bytes long"),
  (".idx", lambda d: d[:34] + struct.pack("<i", -3) + d[38:], "damaged"),
])
def test_damaged_files_are_named(tmp_path, ending, change, message):
  shards.write_shard(tmp_path / "x", SEQUENCES, dtype=np.uint16)
  damage(tmp_path / ("x" + ending), change)
  with pytest.raises(ValueError, match=message):
    shards.read_shard(tmp_path / "x")


def test_missing_file_is_named(tmp_path):
  shards.write_shard(tmp_path / "x", SEQUENCES, dtype=np.uint16)
  (tmp_path / "x.bin").unlink()
  with pytest.raises(ValueError, match=r"no file .*x\.bin"):
    shards.read_shard(tmp_path / "x")


@pytest.mark.parametrize("count,per_shard,sizes", [
  (0, 3, [0]), (3, 3, [3]), (4, 3, [3, 1]), (7, 2, [2, 2, 2, 1]),
])
def test_shard_boundaries(tmp_path, count, per_shard, sizes):
  sequences = [[i, i + 1] for i in range(count)]
  written = shards.write_shards(
    tmp_path, iter(sequences), vocab_size=100, sequences_per_shard=per_shard)
  assert written == count
  parts = [shards.read_shard(tmp_path / f"data_{i}") for i in range(len(sizes))]
  assert [len(part) for part in parts] == sizes
  assert [row.tolist() for part in parts for row in part] == sequences
  assert not (tmp_path / f"data_{len(sizes)}.idx").exists()


def test_special_files_are_refused(tmp_path):
  os.mkfifo(tmp_path / "data_0.idx")
  with pytest.raises(ValueError, match="data_0.idx is a FIFO"):
    shards.read_shard(tmp_path / "data_0")
