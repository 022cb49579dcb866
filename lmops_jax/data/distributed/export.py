"""Instances and selections written by many workers: the files of `data.instances` and
`data.export`, byte for byte."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from lmops_jax.data import export, instance_writing, shards
from lmops_jax.data import instances as instances_lib
from lmops_jax.data.distributed.engine import Engine
from lmops_jax.data.packing import Instance
from lmops_jax.host import seals


def write_instances(
  engine: Engine,
  scratch: Path,
  directory: Path,
  num: int,
  read: Callable[[int, int], Iterable[Instance]],
  *,
  instances_per_shard: int = instance_writing.INSTANCES_PER_SHARD,
  **settings,
) -> int:
  """`instance_writing.write_instances` with a worker for each shard.

  Args:
    scratch: folder on the file system of `directory`, for shards until all are there; those of an
      earlier attempt are kept.
    num: number of instances.
    read: the instances `start .. stop`, called on workers.
    settings: of `instance_writing.write_instances`.

  Returns:
    The number of tokens, BOS included.
  """
  scratch.mkdir(parents=True, exist_ok=True)
  numbers = range(-(-num // instances_per_shard))
  engine.each(
    functools.partial(
      _write_shard, scratch, read, num, instances_per_shard, settings["length"],
      settings["vocab_size"],
    ),
    _missing(numbers, lambda n: [_info(scratch, n), scratch / instance_writing.shard_file(n)]),
  )
  _clear(directory)
  for number in numbers:
    name = instance_writing.shard_file(number)
    os.replace(scratch / name, directory / name)
  instance_writing.finish(directory, (_read_info(scratch, n) for n in numbers), **settings)
  return instances_lib.open_instances(directory).total_tokens


def _missing(numbers: Iterable[int], files: Callable[[int], list[Path]]) -> list[int]:
  """Numbers whose files are not there as an interrupted attempt has written them."""
  numbers = list(numbers)
  whole = seals.all_whole(map(files, numbers))
  return [number for number, is_whole in zip(numbers, whole) if not is_whole]


def _info(scratch: Path, number: int) -> Path:
  return scratch / f"{instance_writing.shard_file(number)}.npz"


def _read_info(scratch: Path, number: int) -> instance_writing.ShardInfo:
  with np.load(_info(scratch, number)) as arrays:
    return instance_writing.ShardInfo(arrays["ids"], *arrays["sizes"].tolist())


def _write_shard(scratch, read, num, per_shard, length, vocab_size, number) -> None:
  start, stop = number * per_shard, min((number + 1) * per_shard, num)
  with seals.replacing_shared(scratch / instance_writing.shard_file(number)) as partial:
    info = instance_writing.write_shard(
      partial, read(start, stop), length=length, vocab_size=vocab_size
    )
  if len(info.ids) != stop - start:
    raise ValueError(
      f"shard {number} has {len(info.ids)} instances instead of {stop - start}: files in {scratch} "
      "changed meanwhile; run the stage again."
    )
  with seals.replacing_shared(_info(scratch, number)) as partial, partial.open("wb") as file:
    np.savez(file, ids=info.ids, sizes=np.array(info[1:], np.int64))


def _clear(directory: Path) -> None:
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir(parents=True)


def export_selection(
  engine: Engine, scratch: Path, instances: instances_lib.Instances, indices: Path,
  directory: Path, format: str, vocabulary, *, part: int = instance_writing.INSTANCES_PER_SHARD,
) -> None:
  """`export.export_selection` with workers for parts of the selection.

  Args:
    scratch: folder on the file system of `directory`, for this export alone.
    indices: array file of ascending positions in `instances`.
    part: instances that a worker takes together, if the format does not say.
  """
  if format in ("jsonl", "parquet"):
    export.check_vocabulary(instances, vocabulary, format)
  scratch.mkdir(parents=True, exist_ok=True)
  num = len(np.load(indices, mmap_mode="r"))
  if format == "tfds":
    write_instances(
      engine, scratch, directory, num,
      functools.partial(_selected, instances.directory, indices),
      **export.dataset_settings(instances, num),
    )
    return
  if format == "mmididx":
    part = shards.SEQUENCES_PER_SHARD
  elif format == "parquet":
    part = -(-part // export.BLOCK) * export.BLOCK
  numbers = range(-(-num // part))
  endings = ("", ".bin", ".idx") if format == "mmididx" else ("",)
  write = {"jsonl": _write_jsonl, "parquet": _write_tables, "mmididx": _write_sequences}[format]
  engine.each(
    functools.partial(_write_part, write, scratch, indices, part),
    _missing(numbers, lambda n: [Path(f"{_part(scratch, n)}{ending}") for ending in endings]),
    setup=functools.partial(
      _open, instances.directory, None if format == "mmididx" else vocabulary.directory
    ),
  )
  _clear(directory)
  if format == "jsonl":
    with (directory / export.JSONL_FILE).open("wb") as file:
      append(file, (_part(scratch, n) for n in numbers))
  elif format == "parquet":
    export.write_parquet(directory / export.PARQUET_FILE, _tables(scratch, numbers))
  else:
    for number in numbers:
      for ending in (".bin", ".idx"):
        os.replace(f"{_part(scratch, number)}{ending}", directory / f"data_{number}{ending}")


def append(file, parts: Iterable[Path]) -> None:
  """Writes files one after another to an open one."""
  for part in parts:
    with part.open("rb") as source:
      shutil.copyfileobj(source, file, 1 << 20)


def _part(scratch: Path, number: int) -> Path:
  return scratch / f"part-{number:06d}"


def _open(directory: Path, vocabulary: Path | None):
  from lmops_jax.text import vocabularies

  opened = None if vocabulary is None else vocabularies.load_vocabulary(vocabulary)
  return instances_lib.open_instances(directory, cache_bytes=0), opened


def _selected(directory: Path, indices: Path, start: int, stop: int) -> Iterable[Instance]:
  instances, _ = _open(directory, None)
  return map(instances.instance, np.load(indices, mmap_mode="r")[start:stop])


def _write_part(write, scratch: Path, indices: Path, part: int, opened, number: int) -> None:
  rows = np.load(indices, mmap_mode="r")[number * part : (number + 1) * part]
  with seals.replacing_shared(_part(scratch, number)) as partial:
    write(partial, _part(scratch, number), *opened, rows)


def _write_jsonl(partial, path, instances, vocabulary, indices) -> None:
  export.write_jsonl(partial, export.rows(instances, indices, vocabulary))


def _write_sequences(partial, path, instances, vocabulary, indices) -> None:
  """Writes two files with endings; the one without tells that they are there."""
  tokens = (instances.instance(i).tokens for i in indices)
  shards.write_shard(partial, tokens, vocab_size=instances.vocab_size)
  for ending in (".bin", ".idx"):
    os.replace(f"{partial}{ending}", f"{path}{ending}")
    seals.seal(Path(f"{path}{ending}"))
  partial.touch()


def _write_tables(partial, path, instances, vocabulary, indices) -> None:
  import pyarrow

  with pyarrow.OSFile(str(partial), "wb") as file:
    with pyarrow.ipc.new_stream(file, export.parquet_schema()) as writer:
      for table in export.tables(export.rows(instances, indices, vocabulary)):
        writer.write_table(table)


def _tables(scratch: Path, numbers: Iterable[int]):
  """The tables that `_write_tables` wrote, one at a time."""
  import pyarrow

  for number in numbers:
    with pyarrow.OSFile(str(_part(scratch, number))) as file:
      with pyarrow.ipc.open_stream(file) as reader:
        for batch in reader:
          yield pyarrow.Table.from_batches([batch])
