"""Writes packed instances: ArrayRecord files that are a tfds dataset, with random access.

`write_instances` stores one `tf.train.Example` a record in the layout of
`tfds.core.SequentialWriter`, so `tfds.builder_from_directory(directory).as_data_source("train")`
reads them too, adds `ids.npy` with the ids of all instances by index, and `instances.json` as the
last file, without which the folder counts as unfinished. `instances` reads them; neither direction
imports TensorFlow. The same instances give the same bytes in every file: records are serialised
deterministically (the map in an Example has no order of its own), and nothing holds a date.
"""

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmops_jax.data.growing_arrays import growing
from lmops_jax.data.instances import FORMAT_VERSION, IDS_FILE, METADATA_FILE
from lmops_jax.data.packing import Instance
from lmops_jax.host.whole_files import write_text

INSTANCES_PER_SHARD = 50_000
_DATASET, _SPLIT = "instances", "train"
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
