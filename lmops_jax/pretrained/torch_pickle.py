"""Tensors of a file that `torch.save` wrote, without torch and without running what it asks for.

Such a file is a pickle, and a pickle names functions to call. Here a name is looked up in a short
table of what plain tensors need, and any other one is refused before anything is called, or, if one
says so, stands for an object that does nothing: fairseq keeps its settings beside the tensors. The
table makes descriptions, checked after the pickle is read; the numbers stay in the file, mapped.
Both layouts are read: the zip archive (torch 1.6 and later) and the plain file before it.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from lmops_jax.pretrained import pickle_bounds, torch_archive
from lmops_jax.pretrained.torch_archive import CONVERT, RefusedError

_STORAGES = {
  "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
  "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
  "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
_DTYPES = {
  **{name: np.dtype(name) for name in _STORAGES.values() if name != "bfloat16"},
  **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", *_FLOAT8)},
  **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64")},
}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_INFLATED_BYTES = 1 << 28
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_MAX_DIMENSIONS = 64  # of NumPy
_COUNT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class CompressedTensor:
  """A tensor of a compressed entry, which `read` inflates; NumPy takes it for an array."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self.read(), dtype)


def map_torch_file(
  path: Path, max_inflated_bytes: int = MAX_INFLATED_BYTES, inert_objects: bool = False
) -> dict[str, np.ndarray | CompressedTensor]:
  """Every tensor of a saved state dict as a read-only view of the mapped file.

  Values that are not tensors (an epoch, options) are left out. A state dict inside another dict is
  found under state_dict, model_state_dict, model or module. Strides are kept, and tensors that
  share storage share it here. torch itself compresses nothing; what another tool compressed is
  inflated when it is read.

  Args:
    max_inflated_bytes: the most that the pickle and the compressed entries may hold together.
    inert_objects: let what plain tensors do not need be objects that do nothing, whatever it is
      called, instead of refusing it; nothing of it is run or imported.

  Raises:
    ValueError: if the file asks for more than plain tensors need, is damaged or truncated, was
      written on a big-endian machine, inflates to more than it may, or holds no named tensors.
  """
  data = np.memmap(path, np.uint8, mode="r")
  is_archive = data[:4].tobytes() == torch_archive.MAGIC
  try:
    if is_archive:
      pickled, storage_of = torch_archive.read(path, data, max_inflated_bytes)
      content, _ = _load(io.BytesIO(pickled), path, inert_objects)
    else:
      content, storage_of = _read_legacy(path, data, inert_objects)
    tensors = _named_tensors(path, content)
    return {
      name: _view(path, name, tensor, storage_of, len(data)) for name, tensor in tensors.items()
    }
  except RefusedError:
    raise
  except zipfile.BadZipFile as error:
    raise ValueError(
      f"{path} is damaged or truncated: the directory that ends its zip archive cannot be read; "
      "fetch the file again."
    ) from error
  except Exception as error:  # damaged bytes can make pickle raise any
    raise ValueError(
      f"{path} is not a readable file of torch.save ({type(error).__name__}: {error}); fetch the "
      "file again."
    ) from error


class _Kind(NamedTuple):
  """A dtype, also standing for the storage classes of that dtype."""

  dtype: np.dtype


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  size: int  # in elements, as are the next two
  first: int  # not 0 for the views of old files
  end: int


class _Tensor(NamedTuple):
  storage: _Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Function:
  """What a name in the pickle stands for. A pickle can call it but not change it."""

  __slots__ = ("_make",)

  def __init__(self, make: Callable):
    self._make = make

  def __call__(self, *args):
    return self._make(*args)

  def __setstate__(self, state):
    raise ValueError("it tries to change a function")


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
  if not isinstance(storage, _Storage):
    raise ValueError("a tensor without storage")
  return _checked(storage, storage.dtype, offset, shape, strides, metadata)


def _tensor_of_dtype(
  storage, offset, shape, strides, requires_grad, hooks, kind, metadata=None
):
  if not isinstance(storage, _Storage) or not isinstance(kind, _Kind):
    raise ValueError("a tensor without storage or dtype")
  return _checked(storage, kind.dtype, offset, shape, strides, metadata)


def _checked(storage, dtype, offset, shape, strides, metadata) -> _Tensor:
  shape, strides = tuple(shape), tuple(strides)
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
    raise ValueError("a tensor without valid offset, shape and strides")
  if metadata:
    raise ValueError(f"a tensor with the flags {sorted(map(str, dict(metadata)))}")
  return _Tensor(storage, dtype, offset, shape, strides)


def _parameter(tensor, requires_grad=True, hooks=None):
  return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
  ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_of_dtype),
  ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
  ("torch", "Size"): _Function(tuple),
  ("torch", "device"): _Function(lambda *args: None),
  ("torch.storage", "UntypedStorage"): _Kind(np.dtype(np.uint8)),
  ("torch", "UntypedStorage"): _Kind(np.dtype(np.uint8)),
  **{("torch", name): _Kind(dtype) for name, dtype in _DTYPES.items()},
  **{
    (module, name): _Kind(_DTYPES[dtype])
    for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")
  },
}


class _Inert:
  """Stands for any class, function or object of another library, and takes what it is given.

  A pickle can make instances and fill them; it keeps nothing and cannot change this class.
  """

  __slots__ = ()

  def __new__(cls, *args, **kwargs):
    return super().__new__(cls)

  def __init__(self, *args, **kwargs):
    pass

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def append(self, value):
    pass

  def extend(self, values):
    pass

  def add(self, value):
    pass


def _load(
  file: BinaryIO, path: Path, inert_objects: bool = False
) -> tuple[Any, dict[str, int]]:
  """One pickled object, and the bytes of an element of each storage that it mentions."""
  start = file.tell()
  pickle_bounds.check(file)
  file.seek(start)
  unpickler = _Unpickler(file, path, inert_objects)
  return unpickler.load(), unpickler.widths


class _Unpickler(pickle.Unpickler):
  """Finds only the names of `_ALLOWED`. One object is read by one instance."""

  def __init__(self, file: BinaryIO, path: Path, inert_objects: bool):
    super().__init__(file, encoding="utf-8")
    self._path, self._inert_objects = path, inert_objects
    self.widths: dict[str, int] = {}

  def find_class(self, module, name):
    try:
      return _ALLOWED[module, name]
    except KeyError:
      if self._inert_objects:
        return _Inert
      raise RefusedError(
        f"{self._path} asks for {module}.{name}, which plain tensors do not need, so it was "
        "refused and nothing was run; take the model as safetensors, or pass such objects over "
        f"with pretrained.load.inert_objects, or, {CONVERT}."
      ) from None

  def persistent_load(self, pid):
    tag, kind, key, _, num_elements, *view = pid
    if tag != "storage" or not isinstance(kind, _Kind) or type(key) is not str:
      raise ValueError("a reference to something else where a storage was expected")
    first, end = 0, num_elements
    if view and view[0] is not None:
      _, first, num_viewed = view[0]
      end = first + num_viewed
    if any(type(n) is not int or n < 0 for n in (first, end, num_elements)) or end > num_elements:
      raise ValueError(f"storage {key} without valid size")
    self.widths.setdefault(key, kind.dtype.itemsize)
    return _Storage(key, kind.dtype, num_elements, first, end)


def _read_legacy(path: Path, data: np.ndarray, inert_objects: bool) -> tuple[Any, Callable]:
  """The pickled object, and a function that gives the bytes of a storage.

  Such a file holds five pickles, then for each storage its number of elements and its bytes."""
  with path.open("rb") as file:
    try:
      known = [_load(file, path)[0] for _ in range(2)] == [_LEGACY_MAGIC, _LEGACY_PROTOCOL]
    except RefusedError:
      raise
    except Exception:  # any bytes can come here
      known = False
    if not known:
      raise RefusedError(
        f"{path} is not a file of torch.save (neither its zip archive nor its older layout); fetch "
        "the file again, or take the model as safetensors."
      )
    system, _ = _load(file, path)
    if not system.get("little_endian", True):
      raise torch_archive.big_endian(path)
    content, widths = _load(file, path, inert_objects)
    keys, _ = _load(file, path)
    at = file.tell()
  spans: dict[str, tuple[int, int]] = {}
  for key in keys:
    header = data[at : at + _COUNT_BYTES].tobytes()
    if len(header) < _COUNT_BYTES:
      break  # the tensors behind this are missed below, by name
    at += _COUNT_BYTES
    end = at + struct.unpack("<Q", header)[0] * widths[key]
    spans[key] = at, end
    at = end
  return content, lambda key: data[slice(*spans.get(key, (0, 0)))]


def _named_tensors(path: Path, content) -> dict[str, _Tensor]:
  """The state dict, looked for in the object itself and then under the usual names."""
  candidates = [content]
  if isinstance(content, dict):
    candidates += [dict.get(content, name) for name in _WRAPPERS]
  for candidate in candidates:
    if isinstance(candidate, dict):
      named = {
        name: value for name, value in dict.items(candidate)
        if isinstance(name, str) and isinstance(value, _Tensor)
      }
      if named:
        return named
  raise RefusedError(
    f"{path} holds no dict from names to tensors; save the model's state_dict(), best as "
    "safetensors."
  )


def _view(
  path: Path, name: str, tensor: _Tensor,
  storage_of: Callable[[str], np.ndarray | torch_archive.Compressed], file_bytes: int,
) -> np.ndarray | CompressedTensor:
  """The tensor as a strided view, checked against the storage that is really there."""
  storage, width = tensor.storage, tensor.dtype.itemsize
  if 0 in tensor.shape:
    return np.empty(tensor.shape, tensor.dtype)
  raw = storage_of(storage.key)
  size, first, end = (
    n * storage.dtype.itemsize for n in (storage.size, storage.first, storage.end)
  )
  if size > len(raw):
    raise RefusedError(
      f"{path} is truncated: the storage of its tensor {name} should have {size} bytes and has "
      f"{len(raw)}; fetch the file again."
    )
  if size + storage.dtype.itemsize <= len(raw):
    raise RefusedError(
      f"{path} gives the storage of its tensor {name} {size} bytes, but it has {len(raw)}; fetch "
      "the file again."
    )
  last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides))
  if first + (last + 1) * width > end:
    raise RefusedError(
      f"{path} lets its tensor {name} reach beyond the end of its storage; fetch the file again."
    )
  if len(tensor.shape) > _MAX_DIMENSIONS or math.prod(tensor.shape) * width > max(
    file_bytes, len(raw)
  ):
    raise RefusedError(
      f"{path} repeats the {len(raw)} bytes of its tensor {name} so often that they would take "
      "more than the whole file; fetch the file again."
    )

  def strided(raw: np.ndarray) -> np.ndarray:
    return np.ndarray(
      tensor.shape, tensor.dtype, buffer=raw, offset=first + tensor.offset * width,
      strides=[stride * width for stride in tensor.strides],
    )

  if isinstance(raw, np.ndarray):
    return strided(raw)
  return CompressedTensor(tensor.shape, tensor.dtype, lambda: strided(raw.read()))
