"""Corpora in files of the user's own: JSON lines, Parquet, folders of text.

A document's id is a hash of its file's path, relative to the part of the pattern without wildcards,
and of its row; or it comes from a field of the data. Moving a corpus therefore keeps its ids.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmops_jax import manifests
from lmops_jax.data.documents import Corpus, Document, document_id, given_id
from lmops_jax.setting_types import component

_HASHED_BYTES = 2**28  # a copy of a corpus up to this size is the same corpus
_MAX_PIECES = 4096  # that a corpus is read in


@dataclasses.dataclass(frozen=True)
class _Files(Corpus):
  """Corpora whose `path` is a file, a folder or a pattern."""

  def _paths(self) -> list[tuple[str, Path]]:
    """(name relative to the fixed part of the pattern, path), sorted by name."""
    raise NotImplementedError

  def read_file(self, name: str, path: Path, counts: Counter[str]) -> Iterator[Document]:
    """The documents of one of the files."""
    raise NotImplementedError

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    for name, path in self._paths():
      yield from self.read_file(name, path, counts)

  def pieces(self):
    """One a file; of very many files, several."""
    files = [(name, path.absolute()) for name, path in self._paths()]
    size = -(-len(files) // _MAX_PIECES)
    return [_Part(self, tuple(files[i : i + size])) for i in range(0, len(files), size)]

  def fingerprint(self) -> str:
    """A hash of the settings, the files' names and what they hold.

    Of more than 256 MiB together, sizes and modification times stand for the contents.
    """
    state = hashlib.blake2b(repr(self).encode(), digest_size=16)
    paths = self._paths()
    is_small = sum(path.stat().st_size for _, path in paths if path.is_file()) <= _HASHED_BYTES
    for name, path in paths:
      try:
        status = path.stat()
        mark = (manifests.hash_file(path) if is_small
                else f"{status.st_size} {status.st_mtime_ns}")
      except OSError:
        mark = "unreadable"
      state.update(f"{name}\0{mark}\n".encode())
    return state.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Part(Corpus):
  """Some files of a corpus of files."""

  corpus: _Files
  files: tuple[tuple[str, Path], ...]

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    for name, path in self.files:
      yield from self.corpus.read_file(name, path, counts)


def _matching(path: str, field: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
  """Files that a path or pattern stands for; a folder stands for its files with these endings."""
  pattern = os.path.expanduser(path)
  if os.path.isdir(pattern):
    base = Path(pattern)
    paths = [p for p in base.rglob("*") if p.is_file() and p.name.endswith(suffixes)]
  elif glob.has_magic(pattern) and not os.path.exists(pattern):
    fixed = []
    for part in Path(pattern).parts:
      if glob.has_magic(part):
        break
      fixed.append(part)
    base = Path(*fixed) if fixed else Path()
    paths = [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
  else:
    base, paths = Path(pattern).parent, [Path(pattern)] if os.path.exists(pattern) else []
  if not paths:
    raise ValueError(
      f"{field}={path!r} matches no file ({' or '.join(suffixes)} in a folder); check the path, "
      f"which is relative to {os.getcwd()}."
    )
  return sorted((p.relative_to(base).as_posix(), p) for p in paths)


def _check_field(fields, field: str, where: str, parameter: str) -> None:
  if field not in fields:
    raise ValueError(
      f"{where} has no field {field!r} (it has {', '.join(sorted(map(str, fields))) or 'none'}); "
      f"set {parameter} to one of them."
    )


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Jsonl(_Files):
  """JSON lines: one object a line, plain or compressed (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`).

  Attributes:
    path: a file, a folder (all its JSON lines files), or a pattern with `*` and `**`.
    text_field, id_field, kind_field: names of the fields; without `id_field` an id comes from file
      and line, without `kind_field` the kind is "text".
  """

  path: str
  text_field: str = "text"
  id_field: str | None = None
  kind_field: str | None = None

  def _paths(self):
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
    return _matching(self.path, "data.Jsonl.path", endings)

  def read_file(self, name, path, counts):
    for number, row in jsonl_rows(path, counts):
      where = f"{path}:{number}"
      _check_field(row, self.text_field, where, "data.Jsonl.text_field")
      text = row[self.text_field]
      if not isinstance(text, str):
        raise ValueError(
          f"{where}: field {self.text_field!r} holds a {type(text).__name__}, not a text."
        )
      source = f"{name}:{number}"
      kind = "text"
      if self.kind_field is not None:
        _check_field(row, self.kind_field, where, "data.Jsonl.kind_field")
        kind = str(row[self.kind_field])
      identifier = document_id(source)
      if self.id_field is not None:
        _check_field(row, self.id_field, where, "data.Jsonl.id_field")
        identifier = given_id(row[self.id_field], where, self.id_field)
      if _has_surrogates(text):
        counts["undecodable"] += 1
        continue
      yield Document(identifier, text, kind, source)


def jsonl_rows(
  path: Path | str, counts: Counter[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
  """The objects of one file of JSON lines (`.gz`, `.zst` or plain) and their line numbers, from 1.

  Args:
    path: of the file.
    counts: gets the lines that are not UTF-8 under "undecodable"; without it they are an error.

  Raises:
    ValueError: naming file and line, for what cannot be read or is not an object.
  """
  for number, line in _lines(Path(path).expanduser()):
    where = f"{path}:{number}"
    try:
      row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
      if counts is None:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason}).") from error
      counts["undecodable"] += 1
      continue
    except json.JSONDecodeError as error:
      raise ValueError(f"{where} is not valid JSON: {error.msg}.") from error
    if not isinstance(row, dict):
      raise ValueError(f"{where} holds a {type(row).__name__}, not an object with fields.")
    yield number, row


def _has_surrogates(text: str) -> bool:
  """Whether a JSON escape made half a character, which no encoding can hold."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return True
  return False


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """Non-blank lines with their numbers, from 1; a file that cannot be read is named."""
  try:
    with _open(path) as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} cannot be read: {error}.") from error
  except Exception as error:
    if type(error).__name__ != "ZstdError":  # zstandard is imported only where it is needed
      raise
    raise ValueError(f"{path} cannot be read: {error}.") from error


def _open(path: Path) -> BinaryIO:
  if path.name.endswith(".gz"):
    return gzip.open(path, "rb")
  if path.name.endswith(".zst"):
    import zstandard

    reader = _ZstdFile(zstandard, path.open("rb"))
    return io.BufferedReader(reader, 1 << 20)
  return path.open("rb")


class _ZstdFile(io.RawIOBase):
  """A stream of zstd frames that notices when the last one is cut off."""

  def __init__(self, zstandard, file: BinaryIO):
    self._new = zstandard.ZstdDecompressor().decompressobj
    self._frame, self._file, self._ready = None, file, b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
      if data or self._frame is None or self._frame.eof:
        data = data or self._file.read(1 << 20)
        if not data:
          return 0
        self._frame = self._new()
      else:
        data = self._file.read(1 << 20)
        if not data:
          raise EOFError("compressed file ended before the end of its last frame")
      self._ready = self._frame.decompress(data)
    taken = self._ready[: len(buffer)]
    buffer[: len(taken)] = taken
    self._ready = self._ready[len(taken) :]
    return len(taken)

  def close(self) -> None:
    self._file.close()
    super().close()


def _is_text(arrow_type) -> bool:
  """Whether a column's values are strings, categories of strings included."""
  from pyarrow import types

  if types.is_dictionary(arrow_type):
    arrow_type = arrow_type.value_type
  return any(
    check(arrow_type) for check in (types.is_string, types.is_large_string, types.is_string_view)
  )


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Parquet(_Files):
  """Parquet files; only the named columns are read.

  Attributes:
    path: a file, a folder (all its `.parquet` files), or a pattern with `*` and `**`.
    text_field, id_field, kind_field: names of columns; without `id_field` an id comes from file and
      row, without `kind_field` the kind is "text".
  """

  path: str
  text_field: str = "text"
  id_field: str | None = None
  kind_field: str | None = None

  def _paths(self):
    return _matching(self.path, "data.Parquet.path", (".parquet",))

  def read_file(self, name, path, counts):
    import pyarrow
    import pyarrow.parquet

    wanted = {
      name: column
      for name in ("text_field", "id_field", "kind_field")
      if (column := getattr(self, name)) is not None
    }
    number = 0
    try:
      with pyarrow.parquet.ParquetFile(path) as file:
        for parameter, column in wanted.items():
          _check_field(file.schema_arrow.names, column, str(path), f"data.Parquet.{parameter}")
        text_type = file.schema_arrow.field(self.text_field).type
        if not _is_text(text_type):
          raise ValueError(
            f"{path}: column {self.text_field!r} holds {text_type}, not text; set "
            "data.Parquet.text_field to a text column."
          )
        for batch in file.iter_batches(1024, columns=sorted(set(wanted.values()))):
          columns = {column: batch.column(column) for column in wanted.values()}
          for row in range(batch.num_rows):
            number += 1
            where = f"{name}:{number}"
            try:
              values = {column: array[row].as_py() for column, array in columns.items()}
            except UnicodeDecodeError:
              counts["undecodable"] += 1
              continue
            text = values[self.text_field]
            if text is None:
              counts["empty"] += 1
              continue
            identifier = document_id(where)
            if self.id_field is not None:
              identifier = given_id(values[self.id_field], f"{path}:{number}", self.id_field)
            kind = "text" if self.kind_field is None else str(values[self.kind_field])
            yield Document(identifier, text, kind, where)
    except (OSError, pyarrow.ArrowException) as error:
      raise ValueError(f"{path} cannot be read as Parquet: {error}.") from error


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TextFolder(_Files):
  """A folder of text files, one document each; the kind is the name of its first subfolder.

  Files that cannot be opened and files that are not UTF-8 are left out and counted.

  Attributes:
    path: the folder.
    pattern: which of its files, with `*` and `**`.
  """

  path: str
  pattern: str = "**/*.txt"

  def _paths(self):
    base = Path(os.path.expanduser(self.path))
    if not base.is_dir():
      raise ValueError(
        f"data.TextFolder.path={self.path!r} is not a folder; check the path, which is relative to "
        f"{os.getcwd()}."
      )
    # A link that leads nowhere is kept, so that it is counted as unreadable.
    paths = [p for p in base.glob(self.pattern) if not p.is_dir()]
    if not paths:
      raise ValueError(
        f"data.TextFolder.pattern={self.pattern!r} matches no file in {base}; set it to the names "
        'that you have, such as "**/*.md".'
      )
    return sorted((p.relative_to(base).as_posix(), p) for p in paths)

  def read_file(self, name, path, counts):
    try:
      text = path.read_bytes().decode("utf-8-sig")
    except OSError:
      counts["unreadable"] += 1
      return
    except UnicodeDecodeError:
      counts["undecodable"] += 1
      return
    kind = name.split("/")[0] if "/" in name else "text"
    yield Document(document_id(name), text, kind, name)
