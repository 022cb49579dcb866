"""Packed instances on disk, with random access: what `instance_writing` has written.

Reading uses the array_record module and the protocol buffers alone, and imports no TensorFlow.
"""

import functools
import json
from pathlib import Path

import numpy as np

from lmops_jax.data.packing import Instance

METADATA_FILE, IDS_FILE = "instances.json", "ids.npy"
FORMAT_VERSION = 2  # in version 1 an instance's id was its row number
_BLOCK = 4096


def open_instances(directory: Path | str, *, cache_bytes: int = 1 << 30) -> "Instances":
  """Opens what `instance_writing.write_instances` has written.

  Args:
    cache_bytes: token arrays up to this size are read once and kept in memory; larger data is read
      from disk row by row.

  Raises:
    ValueError: no finished instances there, or a shard that is missing or has another size.
  """
  return Instances(directory, cache_bytes=cache_bytes)


class Instances:
  """Instances by index, `0 .. len - 1`, in the order they were written.

  Attributes:
    length: `S`, tokens of an input. vocab_size, pad_id, eos_id, bos_id: of the vocabulary.
    vocabulary_fingerprint: `Vocabulary.fingerprint` of it, "" if unknown.
    total_tokens: stored tokens of all instances, BOS included.
  """

  def __init__(self, directory: Path | str, *, cache_bytes: int = 1 << 30):
    self.directory = Path(directory)
    path = self.directory / METADATA_FILE
    try:
      metadata = json.loads(path.read_text(encoding="utf-8"))
      version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{self.directory} holds no finished instances ({path.name}: {error})."
      ) from error
    if version != FORMAT_VERSION:
      raise ValueError(
        f"{path} has format version {version}; this code reads {FORMAT_VERSION}. Write the "
        "instances again: delete the folder of the stage that wrote them and run it again."
      )
    self.length: int = metadata["length"]
    self.vocab_size: int = metadata["vocab_size"]
    self.pad_id: int = metadata["pad_id"]
    self.eos_id: int = metadata["eos_id"]
    self.bos_id: int = metadata["bos_id"]
    self.vocabulary_fingerprint: str = metadata["vocabulary_fingerprint"]
    self.description: str = metadata["description"]
    self.total_tokens: int = metadata["num_tokens"]
    self._shards = metadata["shards"]
    self._starts = np.cumsum([0] + [shard["count"] for shard in self._shards])
    for shard in self._shards:
      file = self.directory / shard["file"]
      size = file.stat().st_size if file.is_file() else None
      if size != shard["bytes"]:
        found = "missing" if size is None else f"{size:,} bytes long"
        raise ValueError(
          f"{file} is {found} instead of {shard['bytes']:,} bytes long; write the instances again."
        )
    if len(self.ids) != len(self):
      raise ValueError(
        f"{self.directory / IDS_FILE} holds {len(self.ids)} ids of {len(self)} instances; write "
        "the instances again."
      )
    bytes_each = (self.length + 1) * self._dtype.itemsize
    self._in_memory = len(self) * bytes_each <= cache_bytes

  @property
  def _dtype(self) -> np.dtype:
    return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

  def __len__(self) -> int:
    return int(self._starts[-1])

  @functools.cached_property
  def ids(self) -> np.ndarray:
    """The ids of all instances by index, `[N] int64`, mapped, not read; see `packing.instance_id`.

    Raises:
      ValueError: the file of the ids is missing or damaged.
    """
    path = self.directory / IDS_FILE
    try:
      return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
      raise ValueError(f"{path} cannot be read ({error}); write the instances again.") from error

  def tokens(self, indices) -> np.ndarray:
    """Stored tokens, padded with `pad_id`, `[n, length + 1] int32`."""
    return self._rows(indices)[0].astype(np.int32)

  def num_tokens(self, indices) -> np.ndarray:
    """Number of stored tokens, BOS included and padding not, `[n] int32`."""
    return self._rows(indices)[1].copy()

  def batch(self, indices) -> dict[str, np.ndarray]:
    """Examples of a language model.

    Returns:
      tokens `[n,S] int32`: inputs, padded with `pad_id`. targets `[n,S] int32`: the next tokens.
      loss_mask `[n,S] float32`: 1 if the input token is followed by a stored token and is
      neither pad nor EOS (spec 2.2: what follows EOS cannot be known). example_id `[n] int64`:
      the stable ids.
    """
    stored, num_tokens = self._rows(indices)
    stored = stored.astype(np.int32)
    tokens, targets = stored[:, :-1], stored[:, 1:]
    real = np.arange(self.length) < (num_tokens - 1)[:, None]
    mask = real & (tokens != self.pad_id) & (tokens != self.eos_id)
    return {
      "tokens": np.ascontiguousarray(tokens),
      "targets": np.ascontiguousarray(targets),
      "loss_mask": mask.astype(np.float32),
      "example_id": np.array(self.ids[np.asarray(indices, np.int64)]),
    }

  def num_learned(self, indices) -> np.ndarray:
    """Learned tokens of instances, those of `batch`'s mask, `[n] int64`."""
    return (self.batch(indices)["loss_mask"] != 0).sum(axis=1, dtype=np.int64)

  def documents(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of an instance's documents, `[k] int64`, and how many tokens each has, `[k] int32`."""
    (index,) = self._checked([index])
    if self._in_memory:
      cache = self._cache
      part = slice(cache.document_starts[index], cache.document_starts[index + 1])
      return cache.document_ids[part].copy(), cache.document_num_tokens[part].copy()
    (features,) = self._parsed([index])
    return features["document_ids"], features["document_num_tokens"].astype(np.int32)

  def instance(self, index: int) -> Instance:
    """An instance as it was written."""
    ((tokens,), (count,)) = self._rows([index])
    return Instance(int(self.ids[index]), tokens[:count].astype(np.int32), *self.documents(index))

  def indices_of(self, ids) -> np.ndarray:
    """Indices of instances by id, `[n] int64`.

    Raises:
      ValueError: an id that no instance has.
    """
    ids = np.asarray(ids, np.int64)
    own = self.ids
    order = self._id_order
    if len(own) == 0 and len(ids):
      raise ValueError(f"{self.directory} is empty and has no instance {int(ids[0])}.")
    positions = np.minimum(np.searchsorted(own, ids, sorter=order), max(len(own) - 1, 0))
    indices = order[positions]
    missing = ids[own[indices] != ids]
    if len(missing):
      raise ValueError(f"{self.directory} has no instance with the id {int(missing[0])}.")
    return indices

  @functools.cached_property
  def _id_order(self) -> np.ndarray:
    return np.argsort(self.ids, kind="stable")

  def _checked(self, indices) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
      raise ValueError(
        f"indices must be one list of integers, not {indices.dtype} of shape {indices.shape}."
      )
    indices = indices.astype(np.int64)
    if indices.size and not (0 <= indices.min() and indices.max() < len(self)):
      worst = int(indices.min() if indices.min() < 0 else indices.max())
      raise IndexError(
        f"instance {worst} is out of range: {self.directory} holds {len(self)} instances."
      )
    return indices

  def _rows(self, indices) -> tuple[np.ndarray, np.ndarray]:
    """Padded tokens `[n, length + 1]` of any integer type, and the number of tokens, `[n]`."""
    indices = self._checked(indices)
    if self._in_memory:
      cache = self._cache
      return cache.tokens[indices], cache.num_tokens[indices]
    tokens = np.full((len(indices), self.length + 1), self.pad_id, np.int32)
    num_tokens = np.zeros(len(indices), np.int32)
    for i, features in enumerate(self._parsed(indices)):
      row = features["tokens"]
      num_tokens[i] = len(row)
      tokens[i, : len(row)] = row
    return tokens, num_tokens

  def _parsed(self, indices) -> list[dict[str, np.ndarray]]:
    """Records by index, in the order asked for."""
    indices = np.asarray(indices)
    results: list = [None] * len(indices)
    owners = np.searchsorted(self._starts, indices, side="right") - 1
    for number in np.unique(owners):
      where = np.flatnonzero(owners == number)
      rows = (indices[where] - self._starts[number]).tolist()
      for i, record in zip(where, self._read(int(number), rows), strict=True):
        results[i] = self._parse(record, int(number))
    return results

  def _read(self, number: int, rows) -> list[bytes]:
    """Raw records of a shard; `rows` is a list or a range."""
    path = self.directory / self._shards[number]["file"]
    try:
      reader = self._reader(number)
      if isinstance(rows, range):
        return reader.read(rows.start, rows.stop)
      return reader.read(rows)
    except (RuntimeError, IndexError) as error:
      reason = str(error).split(";")[0]
      raise ValueError(
        f"{path} is damaged and cannot be read ({reason}); write the instances again."
      ) from error

  @functools.cached_property
  def _readers(self) -> dict:
    return {}

  def _reader(self, number: int):
    from array_record.python import array_record_module

    if number not in self._readers:
      shard = self._shards[number]
      path = str(self.directory / shard["file"])
      options = "readahead_buffer_size:0,max_parallelism:0"
      reader = array_record_module.ArrayRecordReader(path, options)
      if not reader.ok():
        reader.read_all()  # raises the reason
      if reader.num_records() != shard["count"]:
        raise RuntimeError(f"{reader.num_records()} records instead of {shard['count']}")
      self._readers[number] = reader
    return self._readers[number]

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "ids")}

  def _parse(self, record: bytes, number: int) -> dict[str, np.ndarray]:
    from tensorflow_datasets.proto import tf_example_pb2

    try:
      features = tf_example_pb2.Example.FromString(record).features.feature
      return {name: np.array(features[name].int64_list.value, np.int64) for name in _FEATURES}
    except Exception as error:  # protobuf's DecodeError differs between its implementations
      path = self.directory / self._shards[number]["file"]
      raise ValueError(f"{path} holds a record that is no instance ({error}).") from error

  @functools.cached_property
  def _cache(self) -> "_Cache":
    count = len(self)
    tokens = np.full((count, self.length + 1), self.pad_id, self._dtype)
    num_tokens = np.zeros(count, np.int32)
    document_ids, document_num_tokens = [], []
    document_starts = np.zeros(count + 1, np.int64)
    for i, features in enumerate(self._scan()):
      row = features["tokens"]
      if not 2 <= len(row) <= self.length + 1 or row.max() >= self.vocab_size:
        raise ValueError(
          f"instance {i} in {self.directory} does not fit length={self.length} and "
          f"vocab_size={self.vocab_size}; write the instances again."
        )
      tokens[i, : len(row)] = row
      num_tokens[i] = len(row)
      document_ids.append(features["document_ids"])
      document_num_tokens.append(features["document_num_tokens"])
      document_starts[i + 1] = document_starts[i] + len(document_ids[-1])
    empty = [np.zeros(0, np.int64)]
    return _Cache(
      tokens, num_tokens, document_starts, np.concatenate(document_ids or empty),
      np.concatenate(document_num_tokens or empty).astype(np.int32),
    )

  def _scan(self):
    """All records in order, a block at a time."""
    for number, shard in enumerate(self._shards):
      for start in range(0, shard["count"], _BLOCK):
        rows = range(start, min(start + _BLOCK, shard["count"]))
        for record in self._read(number, rows):
          yield self._parse(record, number)


_FEATURES = ("tokens", "document_ids", "document_num_tokens")


class _Cache:
  """All instances in memory."""

  def __init__(self, tokens, num_tokens, document_starts, document_ids, document_num_tokens):
    self.tokens, self.num_tokens = tokens, num_tokens
    self.document_starts = document_starts
    self.document_ids, self.document_num_tokens = document_ids, document_num_tokens
