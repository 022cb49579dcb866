"""Packed instances on disk: ArrayRecord files that are a tfds dataset, with random access.

`write_instances` stores one `tf.train.Example` a record in the layout of
`tfds.core.SequentialWriter`, so `tfds.builder_from_directory(directory).as_data_source("train")`
reads them too, adds `ids.npy` with the ids of all instances by index, and `instances.json` as the
last file, without which the folder counts as unfinished. Reading uses the array_record module and
the protocol buffers alone; neither direction imports TensorFlow. The same instances give the same
bytes in every file: records are serialised deterministically (the map in an Example has no order of
its own), and nothing holds a date.
"""

import errno
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmops_jax.data.growing_arrays import growing
from lmops_jax.data.packing import Instance
from lmops_jax.host.whole_files import write_text

METADATA_FILE, IDS_FILE = "instances.json", "ids.npy"
FORMAT_VERSION = 2  # in version 1 an instance's id was its row number
INSTANCES_PER_SHARD = 50_000
_DATASET, _SPLIT = "instances", "train"
_BLOCK = 4096
_IDS_TOGETHER = 1 << 25  # about so many ids are compared with each other at a time, 256 MiB
_BLOCK_OF_IDS = 1 << 20


def write_instances(
  directory: Path | str,
  instances: Iterable[Instance],
  *,
  length: int,
  vocab_size: int,
  pad_id: int,
  eos_id: int,
  bos_id: int,
  instances_per_shard: int = INSTANCES_PER_SHARD,
  description: str = "Packed token ids.",
  vocabulary_fingerprint: str = "",
) -> int:
  """Writes instances in the order given and returns how many there were.

  Shards of an earlier attempt in `directory` are replaced.

  Args:
    length: tokens of an instance's input, `S`; at most `length + 1` are stored.
    description: what the data is, for people.

  Raises:
    ValueError: a token outside of the vocabulary, an instance that is too short or too long, two
      instances with one id.
  """
  if length < 1 or instances_per_shard < 1:
    raise ValueError(
      f"length={length} and instances_per_shard={instances_per_shard} must be 1 or more."
    )
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / METADATA_FILE).unlink(missing_ok=True)
  for old in directory.glob(f"{_DATASET}-{_SPLIT}.array_record-*"):
    old.unlink()

  def shards() -> Iterator[ShardInfo]:
    rest = iter(instances)
    for number, first in enumerate(rest):
      rows = itertools.chain([first], itertools.islice(rest, instances_per_shard - 1))
      path = directory / shard_file(number)
      yield write_shard(path, rows, length=length, vocab_size=vocab_size)

  return finish(
    directory, shards(), length=length, vocab_size=vocab_size, pad_id=pad_id, eos_id=eos_id,
    bos_id=bos_id, description=description, vocabulary_fingerprint=vocabulary_fingerprint,
  )


class ShardInfo(NamedTuple):
  """A shard that is written.

  Attributes:
    ids: of its instances, `[n] int64`.
    bytes: of the file. record_bytes: of its records.
    num_tokens: that it stores, BOS included.
  """

  ids: np.ndarray
  bytes: int
  record_bytes: int
  num_tokens: int


def shard_file(number: int) -> str:
  """The name of a shard."""
  return f"{_DATASET}-{_SPLIT}.array_record-{number:05d}"


def write_shard(
  path: Path | str, instances: Iterable[Instance], *, length: int, vocab_size: int
) -> ShardInfo:
  """Writes one shard; a folder of shards becomes readable by `finish`.

  Raises:
    ValueError: a token outside of the vocabulary, an instance that is too short or too long.
    OSError: the file cannot be written.
  """
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  ids, record_bytes, num_tokens = [], 0, 0
  try:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for instance in instances:
      _check(instance, length, vocab_size)
      example = tf_example_pb2.Example()
      features = example.features.feature
      features["id"].int64_list.value.append(int(instance.id))
      features["tokens"].int64_list.value.extend(instance.tokens.tolist())
      features["document_ids"].int64_list.value.extend(np.asarray(instance.document_ids).tolist())
      features["document_num_tokens"].int64_list.value.extend(
        np.asarray(instance.document_num_tokens).tolist()
      )
      record = example.SerializeToString(deterministic=True)
      writer.write(record)
      ids.append(instance.id)
      record_bytes += len(record)
      num_tokens += len(instance.tokens)
    writer.close()
  except RuntimeError as error:  # array_record's only kind of error
    if "No space left on device" in str(error):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    raise OSError(f"{path} cannot be written: {error}.") from error
  return ShardInfo(
    np.array(ids, np.int64), Path(path).stat().st_size, record_bytes, num_tokens
  )


def finish(
  directory: Path | str,
  shards: Iterable[ShardInfo],
  *,
  length: int,
  vocab_size: int,
  pad_id: int,
  eos_id: int,
  bos_id: int,
  description: str = "Packed token ids.",
  vocabulary_fingerprint: str = "",
) -> int:
  """Writes what makes a folder of shards readable; arguments and result as of `write_instances`.

  Args:
    shards: in order; each is looked at once.

  Raises:
    ValueError: two instances with one id.
  """
  directory = Path(directory)
  files, record_bytes, num_tokens = [], 0, 0
  with growing(directory / IDS_FILE) as append:
    for number, shard in enumerate(shards):
      append(shard.ids)
      files.append({"file": shard_file(number), "count": len(shard.ids), "bytes": shard.bytes})
      record_bytes += shard.record_bytes
      num_tokens += shard.num_tokens
  _check_distinct(np.load(directory / IDS_FILE, mmap_mode="r"), directory)
  _write_dataset_info(directory, files, record_bytes, description)
  metadata = {
    "version": FORMAT_VERSION,
    "count": sum(file["count"] for file in files),
    "num_tokens": num_tokens,
    "length": length,
    "vocab_size": vocab_size,
    "pad_id": pad_id,
    "eos_id": eos_id,
    "bos_id": bos_id,
    "vocabulary_fingerprint": vocabulary_fingerprint,
    "description": description,
    "shards": files,
  }
  write_text(directory / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")
  return metadata["count"]


def write_encoded(directory: Path | str, instances: Iterable[Instance], vocabulary, length: int):
  """`write_instances` with the special ids of the tokens' vocabulary."""
  return write_instances(directory, instances, length=length, **encoded_with(vocabulary))


def encoded_with(vocabulary) -> dict[str, int | str]:
  """What `write_instances` and `finish` are told about the vocabulary of the tokens."""
  return {
    "vocab_size": vocabulary.vocab_size, "pad_id": vocabulary.pad_id, "bos_id": vocabulary.bos_id,
    "eos_id": vocabulary.eos_id, "vocabulary_fingerprint": vocabulary.fingerprint,
  }


def _check(instance: Instance, length: int, vocab_size: int) -> None:
  tokens = instance.tokens
  if not 2 <= len(tokens) <= length + 1:
    raise ValueError(
      f"instance {instance.id} has {len(tokens)} tokens; with length={length} it must have 2 to "
      f"{length + 1}."
    )
  low, high = int(tokens.min()), int(tokens.max())
  if low < 0 or high >= vocab_size:
    raise ValueError(
      f"instance {instance.id} holds the token id {low if low < 0 else high}, which is not in the "
      f"vocabulary (vocab_size={vocab_size}); tokenise with the vocabulary that is named here."
    )


def _check_distinct(ids: np.ndarray, directory: Path) -> None:
  """Refuses two instances with one id.

  The ids are compared range by range, so that memory stays bounded.
  """
  num_ranges = max(-(-len(ids) // _IDS_TOGETHER), 1)
  for number in range(num_ranges):
    low, high = ((number + i) * (1 << 63) // num_ranges for i in (0, 1))
    part = np.concatenate([
      block[(block >= low) & (block <= high - 1)]
      for block in np.split(ids, range(_BLOCK_OF_IDS, len(ids), _BLOCK_OF_IDS))
    ])
    part.sort()
    twice = part[1:][part[1:] == part[:-1]]
    if len(twice):
      first, second = np.flatnonzero(ids == twice[0])[:2]
      raise ValueError(
        f"instances {first} and {second} in {directory} both have the id {twice[0]}; an id is a "
        "hash of an instance's first document and its place in it, so leave out one of these two "
        "documents or give it another id."
      )


def _write_dataset_info(
  directory: Path, shards: Sequence[dict], num_bytes: int, description: str
) -> None:
  """Writes `dataset_info.json` and `features.json`, which make the folder a tfds dataset."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info as dataset_info_lib

  numbers = {"id": ((), np.int64), "tokens": ((None,), np.int32),
             "document_ids": ((None,), np.int64), "document_num_tokens": ((None,), np.int32)}
  info = tfds.core.DatasetInfo(
    builder=dataset_info_lib.DatasetIdentity(
      name=_DATASET, version=tfds.core.Version("1.0.0"), data_dir=str(directory),
      module_name=__name__,
    ),
    description=description,
    features=tfds.features.FeaturesDict({
      name: tfds.features.Tensor(shape=shape, dtype=dtype)
      for name, (shape, dtype) in numbers.items()
    }),
  )
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  template = tfds.core.ShardedFileTemplate(
    dataset_name=_DATASET, data_dir=directory, split=_SPLIT, filetype_suffix="array_record",
    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
  )
  info.set_splits(tfds.core.splits.SplitDict([
    tfds.core.SplitInfo(
      name=_SPLIT, shard_lengths=[shard["count"] for shard in shards], num_bytes=num_bytes,
      filename_template=template,
    )
  ]))
  info.write_to_directory(directory)


def open_instances(directory: Path | str, *, cache_bytes: int = 1 << 30) -> "Instances":
  """Opens what `write_instances` has written.

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
