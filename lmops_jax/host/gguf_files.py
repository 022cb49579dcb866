"""Tensors and metadata of a GGUF file; quantised tensors become float32 one at a time.

Block formats and their dequantisers are those of the gguf package. The header is read here: the
package's reader makes an array of every string of a vocabulary and takes seconds for it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_LENGTH_BYTES = 8
_MAX_NAME_BYTES = (1 << 16) - 1  # of a key, says the format
_MAX_SHOWN = 60  # characters of a broken name
_MAX_HEADER_BYTES = 1 << 27  # a vocabulary of a million tokens takes a quarter
_MIN_KEY_BYTES = _LENGTH_BYTES + 4 + 1  # no name, its kind, the shortest value
_MIN_TENSOR_BYTES = _LENGTH_BYTES + 4 + 4 + 8  # no name, no dimensions, its kind, its offset
_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT = "general.alignment", 32
_CHUNK_ELEMENTS = 1 << 17  # fits a cache; the package's own 16 rows are up to ten times slower
_PLAIN = {
  "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64,
  "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}
_SCALARS = {
  "UINT8": "<u1", "INT8": "<i1", "UINT16": "<u2", "INT16": "<i2", "UINT32": "<u4", "INT32": "<i4",
  "UINT64": "<u8", "INT64": "<i8", "FLOAT32": "<f4", "FLOAT64": "<f8", "BOOL": "?",
}
_FETCH = "fetch the file again"


class QuantizedTensor(NamedTuple):
  """A tensor in blocks, which `read` turns into float32.

  Attributes:
    shape: as NumPy has it; numbers of the last axis are neighbours in the file.
    data: its blocks, a `uint8` view of the mapped file.
    quantization: a `gguf.GGMLQuantizationType`.
  """

  shape: tuple[int, ...]
  data: np.ndarray
  quantization: Any

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float32)

  def read(self) -> np.ndarray:
    """The whole tensor, `float32`."""
    import gguf

    block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.quantization]
    blocks = self.data.reshape(-1, block_bytes)
    values = np.empty((len(blocks), block_size), np.float32)
    step = _CHUNK_ELEMENTS // block_size
    for i in range(0, len(blocks), step):
      part = blocks[i : i + step].reshape(1, -1)
      values[i : i + step] = gguf.dequantize(part, self.quantization).reshape(-1, block_size)
    return values.reshape(self.shape)


def map_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray | QuantizedTensor]]:
  """Metadata and tensors of a file; only the header is read.

  Returns:
    The decoded keys and values (strings, numbers, lists of them), and every tensor: a view of the
    mapped file if it is not quantised.

  Raises:
    ValueError: no GGUF file, an unknown version, a damaged or truncated file, one part of several,
      or a quantisation that the gguf package cannot undo.
  """
  data = np.memmap(path, np.uint8, mode="r")
  cursor = _Cursor(path, data)
  num_tensors, num_keys = _counts(path, cursor)
  metadata: dict[str, Any] = {}
  for _ in range(num_keys):
    key = cursor.name()
    if key in metadata:
      raise ValueError(f"{path} gives the key {key} twice; {_FETCH}.")
    metadata[key] = cursor.value(key)
  num_parts = metadata.get("split.count", 1)
  if num_parts != 1 and num_parts != 0:
    raise ValueError(
      f"{path} is one of {num_parts} parts of a model; join them with "
      "llama-gguf-split --merge and give the result."
    )
  infos: dict[str, _TensorInfo] = {}
  for _ in range(num_tensors):
    info = _TensorInfo.read(cursor)
    if info.name in infos:
      raise ValueError(f"{path} gives the tensor {info.name} twice; {_FETCH}.")
    infos[info.name] = info
  alignment = _alignment(path, metadata)
  start = math.ceil(cursor.at / alignment) * alignment
  readable: set[int] = set()
  spans = [_span(path, info, readable) for info in infos.values()]
  tensors = {span.name: _tensor(path, data, start, span) for span in spans}
  _check_spans(path, spans, alignment)
  return metadata, tensors


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
  alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
  if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
    raise ValueError(
      f"{path} gives {_ALIGNMENT_KEY} as {alignment!r}, not as a power of two of at least 8; "
      f"{_FETCH}."
    )
  return alignment


def _counts(path: Path, cursor: _Cursor) -> tuple[int, int]:
  if cursor.size < len(_MAGIC) or bytes(cursor.take(len(_MAGIC))) != _MAGIC:
    raise ValueError(f"{path} is not a GGUF file (it does not start with GGUF); {_FETCH}.")
  version = cursor.number("<u4")
  if version not in _VERSIONS:
    big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
    kind = "big-endian" if big_endian else f"of version {version}"
    raise ValueError(
      f"{path} is a GGUF file {kind}, but little-endian versions 2 and 3 are read; convert the "
      "model anew with llama.cpp."
    )
  num_tensors, num_keys = cursor.number("<u8"), cursor.number("<u8")
  if num_tensors * _MIN_TENSOR_BYTES + num_keys * _MIN_KEY_BYTES > cursor.size - cursor.at:
    raise ValueError(
      f"{path} is truncated: its header goes on after its {cursor.size} bytes, for it announces "
      f"{num_keys} keys and {num_tensors} tensors; {_FETCH}."
    )
  return num_tensors, num_keys


class _Cursor:
  """Reads the header from front to back."""

  def __init__(self, path: Path, data: np.ndarray):
    self.path, self._data = path, memoryview(data)
    self.at, self.size = 0, len(data)

  def take(self, num_bytes: int) -> memoryview:
    self._require(num_bytes)
    part = self._data[self.at : self.at + num_bytes]
    self.at += num_bytes
    return part

  def _require(self, num_bytes: int) -> None:
    end = self.at + num_bytes
    if end > self.size:
      raise ValueError(
        f"{self.path} is truncated: its header goes on after its {self.size} bytes; {_FETCH}."
      )
    if end > _MAX_HEADER_BYTES:
      raise ValueError(
        f"{self.path} has a header of more than {_MAX_HEADER_BYTES:,} bytes, which no model needs; "
        f"{_FETCH}."
      )

  def number(self, dtype: str):
    return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

  def string(self) -> str:
    size = struct.unpack("<Q", self.take(_LENGTH_BYTES))[0]
    return str(self.take(size), "utf-8", "surrogateescape")  # a token may be any bytes

  def name(self) -> str:
    before = self.at
    name = self.string()
    size = self.at - before - _LENGTH_BYTES
    if size > _MAX_NAME_BYTES:
      raise ValueError(
        f"{self.path} has a name of {size} bytes, more than GGUF's {_MAX_NAME_BYTES}; {_FETCH}."
      )
    if not name.isprintable():
      raise ValueError(f"{self.path} has the name {name[:_MAX_SHOWN]!r}, no text; {_FETCH}.")
    return name

  def value(self, key: str):
    kind = self._kind(key)
    if kind == "STRING":
      return self.string()
    if kind != "ARRAY":
      return self.number(_SCALARS[kind])
    kind, length = self._kind(key), self.number("<u8")
    if kind == "STRING":
      self._require(length * _LENGTH_BYTES)
      return [self.string() for _ in range(length)]
    if kind == "ARRAY":
      raise ValueError(f"{self.path} nests lists in its key {key}, which GGUF does not allow.")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()

  def _kind(self, key: str) -> str:
    import gguf

    number = self.number("<u4")
    try:
      return gguf.GGUFValueType(number).name
    except ValueError as error:
      raise ValueError(
        f"{self.path} gives its key {key} a value of the unknown kind {number}; {_FETCH}."
      ) from error


class _TensorInfo(NamedTuple):
  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int

  @classmethod
  def read(cls, cursor: _Cursor) -> _TensorInfo:
    name, num_dimensions = cursor.name(), cursor.number("<u4")
    if num_dimensions > _MAX_DIMENSIONS:
      raise ValueError(
        f"{cursor.path} gives its tensor {name} {num_dimensions} dimensions, more than GGUF's "
        f"{_MAX_DIMENSIONS}; {_FETCH}."
      )
    shape = [cursor.number("<u8") for _ in range(num_dimensions)]  # the fastest first
    return cls(name, tuple(reversed(shape)), cursor.number("<u4"), cursor.number("<u8"))


class _Span(NamedTuple):
  """Where a tensor lies, in bytes of the data."""

  begin: int
  end: int
  name: str
  shape: tuple[int, ...]
  kind: Any  # a gguf.GGMLQuantizationType


def _span(path: Path, info: _TensorInfo, readable: set[int]) -> _Span:
  import gguf

  try:
    kind = gguf.GGMLQuantizationType(info.kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if kind.name not in _PLAIN and kind not in readable:
      gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
      readable.add(kind)
  except (ValueError, KeyError, NotImplementedError) as error:
    name = kind.name if info.kind in set(gguf.GGMLQuantizationType) else f"number {info.kind}"
    raise ValueError(
      f"{path} stores the tensor {info.name} in the quantisation {name}, which the gguf package "
      "cannot undo; take a file in F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant, or update gguf."
    ) from error
  row = info.shape[-1] if info.shape else 1
  if row % block_size:
    raise ValueError(
      f"{path} stores rows of {row} numbers of the tensor {info.name} in {kind.name}, whose blocks "
      f"hold {block_size}; {_FETCH}."
    )
  if math.prod(n for n in info.shape if n) > np.iinfo(np.intp).max // 8:
    raise ValueError(
      f"{path} gives its tensor {info.name} the shape {list(info.shape)}, which no array can "
      f"have; {_FETCH}."
    )
  size = math.prod(info.shape) // block_size * block_bytes
  return _Span(info.offset, info.offset + size, info.name, info.shape, kind)


def _check_spans(path: Path, spans: list[_Span], alignment: int) -> None:
  """Each tensor begins at a multiple of the alignment, and every byte between belongs to one."""
  reached, before, gaps = 0, None, []
  for span in sorted(spans, key=lambda span: (span.begin, span.end)):
    if span.begin % alignment:
      raise ValueError(
        f"{path} places its tensor {span.name} at byte {span.begin} of the data, which is no "
        f"multiple of its alignment, {alignment}; {_FETCH}."
      )
    if span.begin < reached:
      raise ValueError(
        f"{path} places the tensors {before} and {span.name} on the same bytes; {_FETCH}."
      )
    if span.begin - reached >= alignment:
      gaps.append((span.begin - reached, span.name))
    reached, before = span.end, span.name
  if gaps:
    size, name = gaps[0]
    raise ValueError(
      f"{path} holds {size} bytes before its tensor {name} that belong to no tensor; {_FETCH}."
    )


def _tensor(path: Path, data: np.ndarray, start: int, span: _Span) -> np.ndarray | QuantizedTensor:
  begin, end = start + span.begin, start + span.end
  if end > len(data):
    raise ValueError(
      f"{path} is truncated: its tensor {span.name} ends at byte {end}, the file at {len(data)}; "
      f"{_FETCH}."
    )
  if span.kind.name in _PLAIN:
    return np.ndarray(span.shape, _PLAIN[span.kind.name], buffer=data, offset=begin)
  return QuantizedTensor(span.shape, np.asarray(data[begin:end]), span.kind)
