"""Tensors in the safetensors format, mapped from the file or written one at a time.

A file is eight bytes with the length of a JSON header, the header (name -> dtype, shape, first and
last byte), then the data without gaps. The safetensors package copies what it reads and knows
neither bfloat16 nor float8 in NumPy; here a tensor is a view of the mapped file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ml_dtypes
import numpy as np

from lmops_jax.host.foreign_files import checked, parse_json

_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
  "BOOL": np.bool_, "C64": np.complex64,
}
_DTYPES = {code: np.dtype(kind) for code, kind in _DTYPES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_MAX_DIMENSIONS = 64  # of NumPy
_MAX_SHOWN = 60  # characters of a dtype
_FETCH = "fetch the file again"


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
  """Every tensor of a file as a read-only view of the mapped file; only the header is read.

  Raises:
    ValueError: no safetensors file, a damaged or truncated one, or a dtype that NumPy lacks.
  """
  data = np.memmap(path, np.uint8, mode="r")
  header, start = _header(path, data)
  tensors, spans = {}, []
  for name, fields in header.items():
    dtype, shape, begin, end = _entry(path, name, fields)
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
      raise ValueError(
        f"{path} gives the tensor {name} {end - begin} bytes, but {dtype} {list(shape)} takes "
        f"{size}; {_FETCH}."
      )
    if start + end > len(data):
      raise ValueError(
        f"{path} is truncated: its tensor {name} ends at byte {start + end}, the file at "
        f"{len(data)}; {_FETCH}."
      )
    spans.append((begin, end, name))
    try:
      tensors[name] = np.ndarray(shape, dtype, buffer=data, offset=start + begin)
    except (ValueError, OverflowError) as error:
      raise ValueError(
        f"{path} gives its tensor {name} the shape {list(shape)}, which no array can have; "
        f"{_FETCH}."
      ) from error
  _check_spans(path, spans, len(data) - start)
  return tensors


def _header(path: Path, data: np.ndarray) -> tuple[dict, int]:
  """The header without its metadata, and where the data starts."""
  where = f"{path}: its header"
  length = struct.unpack("<Q", data[:_LENGTH_BYTES].tobytes().ljust(_LENGTH_BYTES, b"\xff"))[0]
  if length > _MAX_HEADER_BYTES:
    raise ValueError(f"{path} is not a safetensors file (no header at its start); {_FETCH}.")
  start = _LENGTH_BYTES + length
  if start > len(data):
    raise ValueError(
      f"{path} is truncated: its header ends at byte {start}, the file at {len(data)}; {_FETCH}."
    )
  header = parse_json(
    data[_LENGTH_BYTES:start].tobytes(), where,
    object_pairs_hook=functools.partial(_without_repeats, path),
  )
  header = checked(dict[str, Any], header, where)
  header.pop(_METADATA, None)
  return header, start


def _without_repeats(path, pairs):
  fields = dict(pairs)
  if len(fields) < len(pairs):
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise ValueError(f"{path} has {twice} twice in its header; {_FETCH}.")
  return fields


@functools.cache
def _schema():
  """The schema of one tensor in the header."""
  from pydantic import BaseModel, Field

  Size = Annotated[int, Field(ge=0)]

  class Entry(BaseModel):
    dtype: str
    shape: Annotated[list[Size], Field(fail_fast=True)]
    data_offsets: Annotated[list[Size], Field(min_length=2, max_length=2, fail_fast=True)]

  return Entry


def _entry(path: Path, name: str, fields) -> tuple[np.dtype, tuple[int, ...], int, int]:
  entry = checked(_schema(), fields, f"{path}: its tensor {name}")
  begin, end = entry.data_offsets
  if begin > end or len(entry.shape) > _MAX_DIMENSIONS:
    raise ValueError(
      f"{path} describes its tensor {name} with {len(entry.shape)} dimensions from byte {begin} to "
      f"{end}, which no tensor has; {_FETCH}."
    )
  if entry.dtype not in _DTYPES:
    raise ValueError(
      f"{path} stores the tensor {name} as {entry.dtype[:_MAX_SHOWN]}, which is not one of "
      f"{', '.join(_DTYPES)}; take a copy of the model in one of these."
    )
  return _DTYPES[entry.dtype], tuple(entry.shape), begin, end


def _check_spans(path: Path, spans: list[tuple[int, int, str]], num_bytes: int) -> None:
  """The format wants every byte of the data in exactly one tensor."""
  reached, before = 0, None
  for begin, end, name in sorted(spans):
    if begin < reached:
      raise ValueError(
        f"{path} places the tensors {before} and {name} on the same bytes; {_FETCH}."
      )
    if begin > reached:
      raise ValueError(
        f"{path} holds {begin - reached} bytes before its tensor {name} that belong to no tensor; "
        f"{_FETCH}."
      )
    reached, before = end, name
  if reached != num_bytes:
    raise ValueError(
      f"{path} holds {num_bytes - reached} bytes after its last tensor that belong to no tensor; "
      f"{_FETCH}."
    )


class _Tensor(NamedTuple):
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
  path: Path | str,
  tensors: Iterable[tuple[str, Sequence[int], np.dtype, Callable[[], np.ndarray]]],
  metadata: Mapping[str, str] | None = None,
  max_shard_bytes: int | None = None,
) -> list[Path]:
  """Writes tensors one after the other; files become visible only when all are complete.

  Args:
    path: such as `model.safetensors`; shards are `model-00001-of-00002.safetensors`, beside the
      index `model.safetensors.index.json`.
    tensors: `(name, shape, dtype, make)`; `make()` gives the array when its turn comes, and nothing
      holds it afterwards.
    metadata: strings for the header; None is `{"format": "pt"}`, which transformers wants.
    max_shard_bytes: largest data of one file, except for a single larger tensor; None is one file.

  Returns:
    The files written, the index last.

  Raises:
    ValueError: if something of that name is there, the disk is full or not writable, the format
      lacks a dtype, or an array is not what was announced. No file is left behind.
  """
  path = Path(path)
  planned = _planned(tensors)
  shards = _shards(planned, max_shard_bytes)
  names = _file_names(path, len(shards))
  index = path.with_name(path.name + ".index.json")
  _check_target(path, index, sum(t.num_bytes for t in planned))
  metadata = {"format": "pt"} if metadata is None else dict(metadata)
  partials = {name: name.with_name(f".{name.name}.partial") for name in names}
  renamed = []
  try:
    for name, shard in zip(names, shards):
      _write_file(partials[name], path, shard, metadata)
    if len(shards) > 1:
      partials[index] = index.with_name(f".{index.name}.partial")
      _write_index(partials[index], path, names, shards)
    for name, partial in partials.items():
      with _as_sentence(path):
        os.replace(partial, name)
      renamed.append(name)
  except BaseException:
    for leftover in (*partials.values(), *renamed):
      leftover.unlink(missing_ok=True)
    raise
  return renamed


def _planned(tensors) -> list[_Tensor]:
  planned, seen = [], {_METADATA}
  for name, shape, dtype, make in tensors:
    tensor = _Tensor(name, tuple(int(n) for n in shape), np.dtype(dtype), make)
    if tensor.dtype not in _CODES:
      raise ValueError(
        f"The tensor {name} has dtype {dtype}, which safetensors does not store; convert it to one "
        f"of {', '.join(str(kind) for kind in _CODES)}."
      )
    if name in seen:
      raise ValueError(f"Two tensors are named {name}; each needs a name of its own.")
    seen.add(name)
    planned.append(tensor)
  return planned


def _shards(tensors: list[_Tensor], max_bytes: int | None) -> list[list[_Tensor]]:
  """Fills one file after the other in the given order."""
  if max_bytes is not None and max_bytes < 1:
    raise ValueError(f"max_shard_bytes={max_bytes} is not positive; give a number of bytes.")
  shards, size = [[]], 0
  for tensor in tensors:
    if max_bytes is not None and shards[-1] and size + tensor.num_bytes > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.num_bytes
  return shards


def _file_names(path: Path, num_shards: int) -> list[Path]:
  if num_shards == 1:
    return [path]
  return [
    path.with_name(f"{path.stem}-{i + 1:05d}-of-{num_shards:05d}{path.suffix}")
    for i in range(num_shards)
  ]


def _check_target(path: Path, index: Path, num_bytes: int) -> None:
  if not path.parent.is_dir():
    raise ValueError(f"{path} cannot be written: {path.parent} is not a folder; make it first.")
  old = [p for p in (path, index) if os.path.lexists(p)]
  old += path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")  # would mix with the new shards
  if old:
    raise ValueError(f"{old[0]} exists already; choose another folder, or delete it first.")
  free = shutil.disk_usage(path.parent).free
  if num_bytes > free:
    raise ValueError(
      f"{path} needs {num_bytes:,} bytes, but only {free:,} are free there; make room, or choose "
      "another disk."
    )


def _write_file(partial: Path, path: Path, tensors: list[_Tensor], metadata) -> None:
  """One file; wide dtypes first, so that each tensor lies at a multiple of its own width."""
  tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)
  header, end = {_METADATA: metadata} if metadata else {}, 0
  for tensor in tensors:
    begin, end = end, end + tensor.num_bytes
    header[tensor.name] = {
      "dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
    }
  text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _LENGTH_BYTES)
  with _as_sentence(path), open(partial, "wb", buffering=0) as file:
    _write_all(file, struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
      _write_all(file, _bytes_of(tensor))
    os.fsync(file.fileno())


def _bytes_of(tensor: _Tensor) -> np.ndarray:
  array = np.asarray(tensor.make())
  if array.shape != tensor.shape or array.dtype != tensor.dtype:
    raise ValueError(
      f"The tensor {tensor.name} was announced as {tensor.dtype} {list(tensor.shape)}, but is "
      f"{array.dtype} {list(array.shape)}; make both the same."
    )
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _write_all(file, data) -> None:
  """`file` is not buffered, and the system takes at most some 2 GB at once."""
  left = memoryview(data)
  while left:
    left = left[file.write(left) :]


def _write_index(partial: Path, path: Path, names: list[Path], shards) -> None:
  weight_map = {t.name: file.name for file, shard in zip(names, shards) for t in shard}
  planned = [t for shard in shards for t in shard]
  metadata = {
    "total_parameters": sum(math.prod(t.shape) for t in planned),
    "total_size": sum(t.num_bytes for t in planned),
  }
  text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
  with _as_sentence(path):
    partial.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _as_sentence(path: Path):
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"{path} cannot be written ({error.strerror or error}); make room or choose another folder; "
      "nothing was left there."
    ) from error
