"""Where published weights are read from: one interface over safetensors, PyTorch and GGUF files.

Opening reads headers only. A tensor is a view of its mapped file wherever the format allows it, so
that slicing one reads just the part that is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmops_jax.host.foreign_files import checked, is_there, mapped, read_json
from lmops_jax.host.gguf_files import QuantizedTensor, map_gguf
from lmops_jax.host.words import listed
from lmops_jax.pretrained.safetensors_files import map_safetensors, write_safetensors
from lmops_jax.pretrained.torch_pickle import MAX_INFLATED_BYTES, CompressedTensor, map_torch_file

__all__ = [
  "MAX_INFLATED_BYTES", "WEIGHTS", "GGUFSource", "TensorSource", "open_source", "write_safetensors",
]

_SAFETENSORS, _TORCH, _GGUF = ".safetensors", (".bin", ".pt", ".pth"), ".gguf"
Tensors = Mapping[str, np.ndarray | QuantizedTensor | CompressedTensor]
_FOLDER_FILES = (  # the first that is there is read, as transformers does it
  "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
WEIGHTS = (_SAFETENSORS, *_TORCH)
_SUFFIXES = (*WEIGHTS, _GGUF)
_MAX_LISTED = 8


class TensorSource:
  """Named tensors of a checkpoint, read one at a time. Also a context manager.

  Attributes:
    where: the path, for error messages.
  """

  def __init__(self, where: Path | str, tensors: Tensors):
    self.where = str(where)
    self._tensors: Tensors | None = tensors

  def names(self) -> list[str]:
    """Every tensor's name, in the order of the checkpoint."""
    return list(self._opened())

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape as NumPy has it: a matrix of PyTorch or GGUF is `(outputs, inputs)`."""
    return tuple(self._find(name).shape)

  def dtype(self, name: str) -> np.dtype:
    """The dtype of what `read` gives: bfloat16 and float8 of ml_dtypes, float32 if quantised."""
    return self._find(name).dtype

  def read(self, name: str) -> np.ndarray:
    """The tensor, read-only: a mapped view that reads nothing yet, unless it is quantised or
    compressed.

    Raises:
      ValueError: no tensor of that name, or a compressed one that cannot be inflated.
    """
    found = self._find(name)
    return found if isinstance(found, np.ndarray) else found.read()

  def close(self) -> None:
    """Lets go of the files; a file stays mapped as long as an array of it is in use."""
    self._tensors = None

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _opened(self) -> Tensors:
    if self._tensors is None:
      raise ValueError(f"{self.where} was closed; open it again to read from it.")
    return self._tensors

  def _find(self, name: str) -> np.ndarray | QuantizedTensor | CompressedTensor:
    tensors = self._opened()
    if name not in tensors:
      raise ValueError(
        f"{self.where} holds no tensor {name}; its {len(tensors)} tensors are "
        f"{listed(list(tensors), _MAX_LISTED)}."
      )
    return tensors[name]


class GGUFSource(TensorSource):
  """The tensors of a GGUF file.

  Attributes:
    metadata: its keys and values, decoded: strings, numbers, lists of them.
  """

  def __init__(self, where: Path | str, tensors, metadata: dict[str, Any]):
    super().__init__(where, tensors)
    self.metadata = metadata


def open_source(
  path: Path | str, max_inflated_bytes: int = MAX_INFLATED_BYTES, inert_objects: bool = False,
  names: Sequence[str] = _FOLDER_FILES,
) -> TensorSource:
  """Opens a checkpoint and checks that it is complete.

  Args:
    path: a folder with `model.safetensors`, `pytorch_model.bin` or the index of a sharded one (or
      what `names` says), or one `.safetensors`, `.bin`, `.pt`, `.pth` or `.gguf` file (this gives a
      `GGUFSource`).
    max_inflated_bytes: the most that a PyTorch file's pickle and compressed entries may hold.
    inert_objects: see `torch_pickle.map_torch_file`.
    names: files that a folder's weights may be in; the first that is there is read.

  Raises:
    ValueError: nothing readable there, or a file that is missing, damaged or truncated.
  """
  path = Path(path)
  if not path.is_dir():
    if path.suffix == _GGUF:
      metadata, tensors = mapped(path, map_gguf)
      return GGUFSource(path, tensors, metadata)
    return TensorSource(path, _map_file(path, max_inflated_bytes, inert_objects))
  for name in names:
    if is_there(path / name):
      if name.endswith(".json"):
        return TensorSource(path, _map_shards(path / name, max_inflated_bytes, inert_objects))
      return TensorSource(path, _map_file(path / name, max_inflated_bytes, inert_objects))
  there = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
  found = "it has none"
  if there:
    found = f"it holds {listed(there, _MAX_LISTED)}, of which one can be named itself"
  raise ValueError(f"{path} should hold one of {', '.join(names)}, but {found}.")


def _map_file(path: Path, max_inflated_bytes: int, inert_objects: bool) -> Tensors:
  if path.suffix == _SAFETENSORS:
    return mapped(path, map_safetensors)
  if path.suffix in _TORCH:
    return mapped(path, functools.partial(
      map_torch_file, max_inflated_bytes=max_inflated_bytes, inert_objects=inert_objects))
  raise ValueError(
    f"{path} is neither a folder nor a file that ends in one of {', '.join(_SUFFIXES)}; name one "
    "of these."
  )


def _map_shards(index: Path, max_inflated_bytes: int, inert_objects: bool) -> Tensors:
  """The tensors of all files that an index names."""
  weight_map = _weight_map(index)
  for file in sorted(set(weight_map.values())):
    if not is_there(index.parent / file):
      name = next(name for name, of in weight_map.items() if of == file)
      raise ValueError(
        f"{index} places {name} and others in {file}, but there is no such file in its folder; "
        "fetch the missing file."
      )
  tensors = {}
  holder: dict[str, str] = {}
  for file in sorted(set(weight_map.values())):
    for name, tensor in _map_file(
      index.parent / file, max_inflated_bytes, inert_objects
    ).items():
      if name in holder:
        raise ValueError(
          f"{index.parent} holds the tensor {name} twice, in {holder[name]} and in {file}; fetch "
          "the files of one model anew, into an empty folder."
        )
      tensors[name], holder[name] = tensor, file
  for name, file in weight_map.items():
    if holder.get(name) != file:
      there = f"it is in {holder[name]}" if name in holder else "it is in no file"
      raise ValueError(
        f"{index} places the tensor {name} in {file}, but {there}; fetch {index.name} and {file} "
        "again."
      )
  return tensors


@functools.cache
def _index_schema():
  from pydantic import BaseModel

  class Index(BaseModel):
    weight_map: dict[str, Any]

  return Index


def _weight_map(index: Path) -> dict[str, str]:
  """Tensor name to file name."""
  weight_map = checked(_index_schema(), read_json(index), index).weight_map
  weight_map = checked(dict[str, str], weight_map, f"{index}: weight_map")
  if not weight_map:
    raise ValueError(f"{index} places no tensor in any file; fetch the file again.")
  for name, file in weight_map.items():
    if not file or Path(file).name != file or "\0" in file:
      raise ValueError(
        f"{index} places the tensor {name} in {file!r}, outside of its folder; an index may name "
        "files beside it only."
      )
  return weight_map
