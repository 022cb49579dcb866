"""The binary corpus format of the PDS code and of other trainers: `.bin` and `.idx` (MMIDIDX).

`<prefix>.bin` holds the token ids one sequence after another; `<prefix>.idx` holds, little-endian,
9 bytes `MMIDIDX\\0\\0`, u64 version 1, u8 code of the number type, u64 count of sequences, u64
length of the document index, i32 sizes, i64 byte offsets, i64 document index. The PDS code never
ends a document, so its document index is the single number 0; others put the first sequence of each
document there.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lmops_jax.host.foreign_files import require_regular
from lmops_jax.host.whole_files import replacing

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# For vocabularies below this size the PDS code stores 16 bits a token.
UINT16_VOCAB_SIZE = 65_500
SEQUENCES_PER_SHARD = 1_000_000
_TYPES = {
  1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float32, 7: np.float64,
  8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _TYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
  """uint16 for vocabularies below 65,500, otherwise int32."""
  return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_SIZE else np.int32)


def write_shard(
  prefix: Path | str,
  sequences: Iterable[Sequence[int]],
  *,
  vocab_size: int | None = None,
  dtype: np.dtype | type | None = None,
  document_index: Sequence[int] = (0,),
) -> int:
  """Writes `<prefix>.bin` and `<prefix>.idx` and returns the number of sequences.

  Args:
    vocab_size: chooses the number type (`token_dtype`) and bounds the ids; or give `dtype`.

  Raises:
    ValueError: for both or neither of vocab_size and dtype, a type that has no code, or a token id
      that the vocabulary or the type cannot hold.
  """
  if (vocab_size is None) == (dtype is None):
    raise ValueError(f"give one of vocab_size ({vocab_size}) and dtype ({dtype}).")
  dtype = token_dtype(vocab_size) if dtype is None else np.dtype(dtype)
  if dtype not in _CODES:
    raise ValueError(f"the format has no code for {dtype}; use one of {sorted(map(str, _CODES))}.")
  limits = None
  if dtype.kind in "iu":
    top = np.iinfo(dtype).max if vocab_size is None else vocab_size - 1
    limits = (max(0, np.iinfo(dtype).min), top)
  prefix = Path(prefix)
  sizes: list[int] = []
  with _file(prefix, ".bin").open("wb") as file:
    for sequence in sequences:
      values = np.asarray(sequence)
      if limits and values.size and not (limits[0] <= values.min() and values.max() <= limits[1]):
        worst = values.min() if values.min() < limits[0] else values.max()
        raise ValueError(
          f"sequence {len(sizes)} of {prefix} holds the token id {worst}, which is not in "
          f"{limits[0]} .. {limits[1]} ({dtype})."
        )
      file.write(np.ascontiguousarray(values, dtype.newbyteorder("<")).tobytes())
      sizes.append(values.size)
  lengths = np.array(sizes, "<i4")
  ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
  offsets = np.zeros(len(sizes), "<i8")
  offsets[1:] = ends[:-1]
  with replacing(_file(prefix, ".idx")) as partial, partial.open("wb") as file:
    header = (MAGIC, VERSION, _CODES[dtype], len(sizes), len(document_index))
    file.write(_HEADER.pack(*header))
    file.write(lengths.tobytes() + offsets.tobytes() + np.array(document_index, "<i8").tobytes())
  return len(sizes)


def _file(prefix: Path, ending: str) -> Path:
  return prefix.with_name(prefix.name + ending)


class Shard:
  """A shard opened for reading: a sequence of token arrays, mapped into memory.

  Attributes:
    sizes: `[N] int32`, tokens of each sequence. dtype: type of the stored numbers.
    document_index: `[k] int64` as stored.

  Raises:
    ValueError: for a missing file, another magic number, version or type, or sizes that contradict
      each other or the files.
  """

  def __init__(self, prefix: Path | str):
    prefix = Path(prefix)
    index_path, data_path = _file(prefix, ".idx"), _file(prefix, ".bin")
    for path in (index_path, data_path):
      require_regular(path)
      if not path.is_file():
        raise ValueError(f"the shard {prefix} has no file {path}.")
    index = index_path.read_bytes()
    if index[:9] != MAGIC:
      raise ValueError(
        f"{index_path} begins with {index[:9]!r} instead of {MAGIC!r}; it is no MMIDIDX index."
      )
    if len(index) < _HEADER.size:
      raise ValueError(f"{index_path} ends inside its header ({len(index)} bytes).")
    _, version, code, count, num_documents = _HEADER.unpack_from(index)
    if version != VERSION:
      raise ValueError(f"{index_path} has version {version}; this code reads {VERSION}.")
    if code not in _TYPES:
      raise ValueError(f"{index_path} names the number type {code}, which is unknown.")
    expected = _HEADER.size + 12 * count + 8 * num_documents
    if len(index) != expected:
      raise ValueError(
        f"{index_path} is {len(index)} bytes long, but {count} sequences need {expected}."
      )
    self.dtype = np.dtype(_TYPES[code])
    self.sizes = np.frombuffer(index, "<i4", count, _HEADER.size)
    self._offsets = np.frombuffer(index, "<i8", count, _HEADER.size + 4 * count)
    self.document_index = np.frombuffer(
      index, "<i8", num_documents, _HEADER.size + 12 * count
    )
    num_bytes = data_path.stat().st_size
    ends = self._offsets + self.sizes.astype(np.int64) * self.dtype.itemsize
    inside = count == 0 or (
      self.sizes.min() >= 0 and self._offsets.min() >= 0 and ends.max() <= num_bytes
    )
    if not inside or (count == 0 and num_bytes) or (count and ends.max() != num_bytes):
      raise ValueError(
        f"{data_path} is {num_bytes} bytes long, but its index describes "
        f"{int(ends.max()) if count else 0}; one of the two files is damaged."
      )
    self._data = np.memmap(data_path, np.uint8, "r") if num_bytes else np.zeros(0, np.uint8)

  def __len__(self) -> int:
    return len(self.sizes)

  def __getitem__(self, index: int) -> np.ndarray:
    """Token ids of a sequence, `[n]`, in the stored type, read-only."""
    if not 0 <= index < len(self):
      raise IndexError(f"sequence {index} is out of range: the shard holds {len(self)}.")
    start = int(self._offsets[index])
    stop = start + int(self.sizes[index]) * self.dtype.itemsize
    return np.frombuffer(self._data[start:stop], self.dtype.newbyteorder("<"))

  def __iter__(self) -> Iterator[np.ndarray]:
    return (self[i] for i in range(len(self)))


def read_shard(prefix: Path | str) -> Shard:
  """Opens `<prefix>.bin` and `<prefix>.idx`; see `Shard`."""
  return Shard(prefix)


def write_shards(
  directory: Path | str,
  sequences: Iterable[Sequence[int]],
  *,
  vocab_size: int,
  sequences_per_shard: int = SEQUENCES_PER_SHARD,
  name: str = "data",
) -> int:
  """Writes `<name>_0`, `<name>_1`, ... as the PDS code names them; at least one shard.

  It returns the number of sequences.
  """
  if sequences_per_shard < 1:
    raise ValueError(f"sequences_per_shard={sequences_per_shard} must be 1 or more.")
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  iterator = iter(sequences)
  pending = next(iterator, None)
  total = number = 0

  def part():
    nonlocal pending
    for _ in range(sequences_per_shard):
      if pending is None:
        return
      yield pending
      pending = next(iterator, None)

  while number == 0 or pending is not None:
    total += write_shard(directory / f"{name}_{number}", part(), vocab_size=vocab_size)
    number += 1
  return total
