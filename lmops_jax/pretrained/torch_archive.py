"""The zip archive of `torch.save`: which entries it has, where they lie, what they inflate to.

torch stores its entries, so that they can be mapped. An entry that another tool compressed is
inflated when it is read, after the sizes in the archive's directory were checked against a limit.
"""

from __future__ import annotations

import bisect
import functools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

MAGIC = b"PK\x03\x04"
CONVERT = "if you trust it, load it with torch and save its state dict as safetensors"
_LOCAL_HEADER_BYTES, _ORDER_BYTES = 30, 8
_ENCRYPTED = 1  # a flag of an entry


class RefusedError(ValueError):
  """A sentence for the user that must not be wrapped in another."""


class Compressed:
  """A compressed entry in the place of its bytes."""

  def __init__(self, path: Path, entry: zipfile.ZipInfo):
    self._path, self._entry = path, entry
    self._last = functools.lru_cache(maxsize=1)(self._inflated)  # parts of a tensor come in a row

  def __len__(self) -> int:
    return self._entry.file_size

  def read(self) -> np.ndarray:
    return self._last()

  def _inflated(self) -> np.ndarray:
    try:
      with zipfile.ZipFile(self._path) as archive:
        return np.frombuffer(_inflated(archive, self._entry), np.uint8)
    except Exception as error:  # damaged bytes can make zlib raise any
      raise ValueError(
        f"{self._path} has a damaged entry {self._entry.filename} ({error}); fetch the file again."
      ) from error


def read(
  path: Path, data: np.ndarray, max_inflated_bytes: int
) -> tuple[bytes, Callable[[str], np.ndarray | Compressed]]:
  """The pickle, and a function that gives the bytes of a storage by its key.

  Args:
    data: the mapped file.
    max_inflated_bytes: the most that the pickle and the compressed entries may hold together.

  Raises:
    RefusedError: if they hold more, if there is no pickle or several, if entries cannot be read or
      contradict themselves, or if a big-endian machine wrote the file.
  """
  with zipfile.ZipFile(path) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    names = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
    if len(names) != 1:
      raise RefusedError(
        f"{path} is a zip archive without the one data.pkl that torch.save writes; give a file of "
        "torch.save or of safetensors."
      )
    _check_entries(path, archive, names[0], max_inflated_bytes)
    folder = names[0].removesuffix("data.pkl")
    order = folder + "byteorder"
    if order in entries:
      with archive.open(order) as file:
        if file.read(_ORDER_BYTES) != b"little":
          raise big_endian(path)
    pickled = _inflated(archive, entries[names[0]])
    end = archive.start_dir
  begins = sorted(entry.header_offset for entry in entries.values()) + [end]

  @functools.cache
  def storage_of(key: str) -> np.ndarray | Compressed:
    entry = entries.get(f"{folder}data/{key}")
    if entry is None:
      raise ValueError(f"no entry data/{key}")
    if entry.compress_type != zipfile.ZIP_STORED:
      return Compressed(path, entry)
    header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER_BYTES].tobytes()
    if header[:4] != MAGIC:
      raise ValueError(f"no entry data/{key} at byte {entry.header_offset}")
    begin = entry.header_offset + _LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
    following = begins[bisect.bisect_right(begins, entry.header_offset)]
    if begin < following < begin + entry.file_size:
      raise ValueError(f"the entry data/{key} reaches into the one behind it")
    return data[begin : begin + entry.file_size]

  return pickled, storage_of


def _check_entries(
  path: Path, archive: zipfile.ZipFile, pickled: str, max_inflated_bytes: int
) -> None:
  """Refuses an archive by its directory, before anything is inflated."""
  entries = archive.infolist()
  seen: set[str] = set()
  for entry in entries:
    is_stored = entry.compress_type == zipfile.ZIP_STORED
    is_known = is_stored or entry.compress_type == zipfile.ZIP_DEFLATED
    if entry.filename in seen:
      raise RefusedError(
        f"{path} has two entries {entry.filename} in its zip archive; fetch the file again.")
    seen.add(entry.filename)
    if entry.flag_bits & _ENCRYPTED or not is_known:
      raise RefusedError(
        f"{path} has an entry {entry.filename} that is encrypted, or compressed in a way that "
        f"torch does not read; {CONVERT}."
      )
    if is_stored and entry.compress_size != entry.file_size:
      raise RefusedError(
        f"{path} gives its entry {entry.filename} two sizes, {entry.compress_size} and "
        f"{entry.file_size}; fetch the file again."
      )
  inflated = {
    entry.filename: entry.file_size for entry in entries
    if entry.compress_type != zipfile.ZIP_STORED or entry.filename == pickled
  }
  total = sum(inflated.values())
  if total > max_inflated_bytes:
    largest = max(inflated, key=inflated.get)
    raise RefusedError(
      f"{path} takes {total:,} bytes when it is inflated, its entry {largest} alone "
      f"{inflated[largest]:,}, and pretrained.load.max_inflated_bytes={max_inflated_bytes:,} is "
      "all that it may; take the model as safetensors, or raise the limit if you trust the file."
    )


def _inflated(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
  """What an entry holds, and not a byte more than the directory says."""
  with archive.open(entry) as file:
    content = file.read(entry.file_size)
  if len(content) != entry.file_size:
    raise ValueError(f"{len(content)} bytes instead of {entry.file_size}")
  return content


def big_endian(path: Path) -> RefusedError:
  """The refusal of a file that a big-endian machine wrote."""
  return RefusedError(
    f"{path} was written on a big-endian machine; save the model anew on a little-endian one, or "
    "take it as safetensors."
  )
