"""Corpora in files of the user's own: lines of text, JSON lines, Parquet, folders of text.

A document's id is a hash of its file's path, relative to the part of the pattern without wildcards,
and of its row; or it comes from a field of the data. Moving a corpus therefore keeps its ids.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lmops_jax.config.setting_types import ByteCount, Text, component
from lmops_jax.data import matching
from lmops_jax.data.documents import Corpus, Document, document_id, given_id, kind_label
from lmops_jax.data.lines import MAX_LINE_BYTES, is_text, jsonl_rows, text_lines
from lmops_jax.host import manifests
from lmops_jax.host.foreign_files import printable

_HASHED_BYTES = 2**28  # a copy of a corpus up to this size is the same corpus
_MAX_PIECES = 4096  # the most pieces that a corpus is read in


def _limit(num_bytes: int) -> int:
  """A field that does not show in `repr`: it changes no document, so no fingerprint either."""
  return dataclasses.field(default=num_bytes, repr=False)


@dataclasses.dataclass(frozen=True)
class _Files(Corpus):
  """Corpora whose `path` is a file, a folder or a pattern."""

  counts_unreadable = False  # whether files that cannot be opened are left out, not refused

  def found(self) -> matching.Found:
    """The files, by name relative to the fixed part of the pattern, and what is not read."""
    raise NotImplementedError

  def read_file(self, name: str, path: Path, counts: Counter[str]) -> Iterator[Document]:
    """The documents of one of the files."""
    raise NotImplementedError

  def left_out(self) -> dict[str, list[str]]:
    return self.found().left_out

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    found = self.found()
    counts.update(_sizes(found.left_out))
    for name, path in found.files:
      yield from self.read_file(name, path, counts)

  def pieces(self):
    """A piece for each file; if there are very many, each piece has several."""
    found = self.found()
    files = [(name, path.absolute()) for name, path in found.files]
    size = -(-len(files) // _MAX_PIECES)
    parts = [_Part(self, tuple(files[i : i + size])) for i in range(0, len(files), size)]
    return [dataclasses.replace(parts[0], beside=_sizes(found.left_out)), *parts[1:]]

  def fingerprint(self) -> str:
    """See `fingerprint`."""
    return fingerprint(repr(self), self.found().files, counts_unreadable=self.counts_unreadable)


def fingerprint(
  settings: str, files: list[tuple[str, Path]], *, counts_unreadable: bool = False
) -> str:
  """A hash of a corpus's settings, its files' names and what they hold.

  If they are more than 256 MiB together, sizes and modification times stand for the contents.

  Args:
    files: (name, path) pairs as in `matching.Found`.
    counts_unreadable: whether a file that cannot be opened counts as such; False refuses it.
  """
  state = hashlib.blake2b(settings.encode(), digest_size=16)
  is_small = sum(path.stat().st_size for _, path in files if path.is_file()) <= _HASHED_BYTES
  for name, path in files:
    try:
      status = path.stat()
      mark = (manifests.hash_file(path) if is_small
              else f"{status.st_size} {status.st_mtime_ns}")
    except OSError as error:
      if not counts_unreadable:
        raise ValueError(f"{printable(path)} cannot be read: {printable(error)}.") from error
      mark = "unreadable"
    state.update(f"{name}\0{mark}\n".encode("utf-8", "surrogateescape"))
  return state.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Part(Corpus):
  """Some files of a corpus of files; `beside` counts what stands beside the files of the corpus."""

  corpus: _Files
  files: tuple[tuple[str, Path], ...]
  beside: dict[str, int] = dataclasses.field(default_factory=dict)

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    counts.update(self.beside)
    for name, path in self.files:
      yield from self.corpus.read_file(name, path, counts)


def _sizes(left_out: dict[str, list[str]]) -> dict[str, int]:
  return {reason: len(names) for reason, names in left_out.items()}


def check_field(fields, field: str, where: str, parameter: str) -> None:
  """Refuses a row or a table without a field that a parameter names."""
  if field not in fields:
    there = printable(", ".join(sorted(map(str, fields))))
    raise ValueError(
      f"{where} has no field {field!r} (it has {there or 'none'}); set {parameter} to one of them."
    )


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TextLines(_Files):
  """Text files with one document a line, plain or compressed (`.txt`, `.txt.gz`, `.txt.zst`).

  Attributes:
    path: a file, a folder (all its text files), or a pattern with `*` and `**`.
    max_line_bytes: a longer line, decompressed, is refused.
  """

  path: Text
  max_line_bytes: ByteCount = _limit(MAX_LINE_BYTES)

  def found(self):
    return matching.matching(self.path, "data.TextLines.path", (".txt", ".txt.gz", ".txt.zst"))

  def read_file(self, name, path, counts):
    source = printable(name)
    for number, line in text_lines(path, counts, self.max_line_bytes):
      identifier = document_id(f"{name}:{number}")
      yield Document(identifier, line.strip(), "text", f"{source}:{number}")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Jsonl(_Files):
  """JSON lines: one object a line, plain or compressed (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`).

  Attributes:
    path: a file, a folder (all its JSON lines files), or a pattern with `*` and `**`.
    text_field, id_field, kind_field: names of the fields; without `id_field` an id comes from file
      and line, without `kind_field` the kind is "text".
    max_line_bytes: a longer line, decompressed, is refused.
  """

  path: Text
  text_field: Text = "text"
  id_field: Text | None = None
  kind_field: Text | None = None
  max_line_bytes: ByteCount = _limit(MAX_LINE_BYTES)

  def found(self):
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
    return matching.matching(self.path, "data.Jsonl.path", endings)

  def read_file(self, name, path, counts):
    shown, source_file = printable(path), printable(name)
    for number, row in jsonl_rows(path, counts, self.max_line_bytes):
      where = f"{shown}:{number}"
      check_field(row, self.text_field, where, "data.Jsonl.text_field")
      text = row[self.text_field]
      if text is None:
        counts["empty"] += 1
        continue
      if not isinstance(text, str):
        raise ValueError(
          f"{where}: field {self.text_field!r} holds a {type(text).__name__}, not a text."
        )
      is_whole = is_text(text)
      kind = "text"
      if self.kind_field is not None:
        check_field(row, self.kind_field, where, "data.Jsonl.kind_field")
        kind = kind_label(row[self.kind_field])
        is_whole = is_whole and is_text(kind)
      if self.id_field is None:
        identifier = document_id(f"{name}:{number}")
      else:
        check_field(row, self.id_field, where, "data.Jsonl.id_field")
        given = row[self.id_field]
        identifier = given_id(given, where, self.id_field)
        is_whole = is_whole and is_text(str(given))
      if not is_whole:
        counts["undecodable"] += 1
        continue
      yield Document(identifier, text, kind, f"{source_file}:{number}")


def _value_type(arrow_type):
  """The type of a column's values: that of the categories, or of what an extension stores."""
  import pyarrow

  if pyarrow.types.is_dictionary(arrow_type):
    return _value_type(arrow_type.value_type)
  if isinstance(arrow_type, pyarrow.BaseExtensionType):
    return _value_type(arrow_type.storage_type)
  return arrow_type


def _is_text(arrow_type) -> bool:
  """Whether a column's values are strings, or all missing."""
  from pyarrow import types

  checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
  return any(check(_value_type(arrow_type)) for check in checks)


def _is_id(arrow_type) -> bool:
  """Whether different values of a column are different ids."""
  from pyarrow import types

  checks = (
    types.is_integer, types.is_binary, types.is_large_binary, types.is_fixed_size_binary,
    types.is_binary_view,
  )
  return _is_text(arrow_type) or any(check(_value_type(arrow_type)) for check in checks)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Parquet(_Files):
  """Parquet files; only the named columns are read.

  Attributes:
    path: a file, a folder (all its `.parquet` files), or a pattern with `*` and `**`.
    text_field, id_field, kind_field: names of columns; without `id_field` an id comes from file and
      row, without `kind_field` the kind is "text".
    max_cell_bytes: a longer text is refused.
  """

  path: Text
  text_field: Text = "text"
  id_field: Text | None = None
  kind_field: Text | None = None
  max_cell_bytes: ByteCount = _limit(MAX_LINE_BYTES)

  def found(self):
    return matching.matching(self.path, "data.Parquet.path", (".parquet",))

  def read_file(self, name, path, counts):
    import pyarrow
    import pyarrow.parquet

    shown, source_file = printable(path), printable(name)
    try:
      # Opened here, since Arrow takes no name that is not UTF-8.
      with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
        self._check_columns(file.schema_arrow, shown)
        number = 0
        for batch in file.iter_batches(1024, columns=sorted(set(self._columns().values()))):
          self._check_sizes(batch.column(self.text_field), shown, number)
          for row in range(batch.num_rows):
            number += 1
            try:
              fields = self._fields(batch, row, f"{name}:{number}", f"{shown}:{number}")
            except UnicodeDecodeError:
              counts["undecodable"] += 1
              continue
            if fields is None:
              counts["empty"] += 1
            else:
              yield Document(*fields, f"{source_file}:{number}")
    except (OSError, pyarrow.ArrowException) as error:
      raise ValueError(f"{shown} cannot be read as Parquet: {printable(error)}.") from error

  def _columns(self) -> dict[str, str]:
    """The columns to read, by parameter."""
    names = {name: getattr(self, name) for name in ("text_field", "id_field", "kind_field")}
    return {name: column for name, column in names.items() if column is not None}

  def _check_columns(self, schema, shown: str) -> None:
    for parameter, column in self._columns().items():
      check_field(schema.names, column, shown, f"data.Parquet.{parameter}")
    text_type = schema.field(self.text_field).type
    if not _is_text(text_type):
      raise ValueError(
        f"{shown}: column {self.text_field!r} holds {text_type}, not text; set "
        "data.Parquet.text_field to a text column."
      )
    if self.id_field is not None and not _is_id(id_type := schema.field(self.id_field).type):
      raise ValueError(
        f"{shown}: column {self.id_field!r} holds {id_type}, which is no id; set "
        "data.Parquet.id_field to a column of texts, whole numbers or bytes."
      )

  def _check_sizes(self, texts, shown: str, num_before: int) -> None:
    """Refuses long texts before they become Python strings."""
    import pyarrow.compute

    if pyarrow.types.is_null(texts.type):
      return
    if isinstance(texts, pyarrow.ExtensionArray):
      texts = texts.storage
    if pyarrow.types.is_dictionary(texts.type):
      sizes = pyarrow.compute.binary_length(texts.dictionary).take(texts.indices)
    else:
      sizes = pyarrow.compute.binary_length(texts.cast(pyarrow.large_binary()))
    largest = pyarrow.compute.max(sizes).as_py()
    if largest is not None and largest > self.max_cell_bytes:
      number = num_before + pyarrow.compute.index(sizes, largest).as_py() + 1
      raise ValueError(
        f"{shown}:{number}: column {self.text_field!r} holds a text of {largest:,} bytes, more "
        f"than max_cell_bytes={self.max_cell_bytes:,}; leave it out, or raise "
        "data.Parquet.max_cell_bytes."
      )

  def _fields(self, batch, row: int, source: str, where: str) -> tuple[int, str, str] | None:
    """A row's id, text and kind, or None without a text; UnicodeDecodeError if not UTF-8."""
    def value(column):
      try:
        return batch.column(column)[row].as_py()
      except UnicodeDecodeError:
        raise
      except (ValueError, OverflowError) as error:  # such as times that Python cannot hold
        raise ValueError(f"{where}: column {column!r} cannot be read: {error}.") from error

    text = value(self.text_field)
    if text is None:
      return None
    kind, identifier = "text", document_id(source)
    if self.kind_field is not None:
      kind = kind_label(value(self.kind_field))
    if self.id_field is not None:
      identifier = given_id(value(self.id_field), where, self.id_field)
    return identifier, text, kind


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TextFolder(_Files):
  """A folder of text files, one document each; the kind is the name of its first subfolder.

  Files that cannot be opened and files that are not UTF-8 are left out and counted.

  Attributes:
    path: the folder.
    pattern: which of its files, with `*` and `**`.
    max_file_bytes: a larger file is refused.
  """

  path: Text
  pattern: Text = "**/*.txt"
  max_file_bytes: ByteCount = _limit(2**30)

  counts_unreadable = True

  def found(self):
    base, parts = Path(os.path.expanduser(self.path)), Path(self.pattern).parts
    if not base.is_dir():
      raise ValueError(
        f"data.TextFolder.path={self.path!r} is not a folder; check the path, which is relative to "
        f"{os.getcwd()}."
      )
    found = None
    if parts and not os.path.isabs(self.pattern):
      found = matching.search(base, parts, keep_broken=self.counts_unreadable)
    if not found or not found.files:
      raise ValueError(
        f"data.TextFolder.pattern={self.pattern!r} matches no file in {printable(base)}; set "
        'it to the names that you have, such as "**/*.md".'
      )
    return found

  def read_file(self, name, path, counts):
    try:
      num_bytes = path.stat().st_size
      if num_bytes > self.max_file_bytes:
        raise ValueError(
          f"{printable(path)} has {num_bytes:,} bytes, more than "
          f"max_file_bytes={self.max_file_bytes:,}; leave it out, or raise "
          "data.TextFolder.max_file_bytes."
        )
      data = path.read_bytes()
    except OSError:
      counts["unreadable"] += 1
      return
    try:
      text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
      text = "\0"
    if "\0" in text[:2]:  # UTF-16 without its mark
      counts["undecodable"] += 1
      return
    kind = printable(name.split("/")[0]) if "/" in name else "text"
    yield Document(document_id(name), text, kind, printable(name))
