"""JSON lines that others wrote, plain or compressed, read line by line; errors name the line."""

import functools
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmops_jax.host.foreign_files import parse_json, printable, require_regular

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_LINE_BYTES = 2**28
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WINDOW_BYTES = 2**31  # the longest window that zstd writes
# A byte of zstd can stand for 32 KiB, so that this many give 128 MiB at most.
_COMPRESSED_BYTES = 4096


def jsonl_rows(
  path: Path | str, counts: Counter[str] | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, dict[str, Any]]]:
  """The objects of one file of JSON lines (`.gz`, `.zst` or plain) and their line numbers, from 1.

  Args:
    path: the file.
    counts: gets the number of lines that are not UTF-8 under "undecodable"; without it they are an
      error. Half a character (`\\ud800`) anywhere in a row always is.
    max_line_bytes: longer lines, decompressed, are refused before they are held in memory.

  Raises:
    ValueError: for a line that cannot be read or is no object; it names file and line.
  """
  name = printable(Path(path).expanduser())
  for number, text in text_lines(path, counts, max_line_bytes):
    where = f"{name}:{number}"
    row = object_of(text, where)
    if counts is None and ("\\ud" in text or "\\uD" in text) and _has_halves(row):
      raise ValueError(
        f"{where} holds half a character (an escape such as \\ud800 alone), which is no text; "
        "repair the line."
      )
    yield number, row


def text_lines(
  path: Path | str, counts: Counter[str] | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
  """The lines of one file (`.gz`, `.zst` or plain) that are not blank, and their numbers, from 1.

  Args:
    path, max_line_bytes: see `jsonl_rows`.
    counts: gets the number of lines that are not UTF-8 under "undecodable"; without it they are an
      error.

  Raises:
    ValueError: for a line that cannot be read; it names file and line.
  """
  path = Path(path).expanduser()
  for number, line in _lines(path, max_line_bytes):
    try:
      yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
      if counts is None:
        raise ValueError(
          f"{printable(path)}:{number} is not UTF-8 text ({error.reason}).") from error
      counts["undecodable"] += 1


def object_of(text: str, where: str) -> dict[str, Any]:
  """The object that a line of JSON lines holds.

  Raises:
    ValueError: for anything else; it begins with `where`.
  """
  row = parse_json(text, where)
  if not isinstance(row, dict):
    raise ValueError(f"{where} holds a {type(row).__name__}, not an object with fields.")
  return row


def is_text(value: str) -> bool:
  """Whether a string can be written; a JSON escape can make half a character."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _has_halves(value: Any) -> bool:
  if isinstance(value, str):
    return not is_text(value)
  if isinstance(value, dict):
    return any(map(_has_halves, value)) or any(map(_has_halves, value.values()))
  return isinstance(value, list) and any(map(_has_halves, value))


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
  """Non-blank lines with their numbers, from 1; a file that cannot be read is named."""
  require_regular(path)
  name = printable(path)
  try:
    with _open(path) as file:
      read = functools.partial(file.readline, max_line_bytes + 1)
      for number, line in enumerate(iter(read, b""), 1):
        if len(line) > max_line_bytes:
          raise ValueError(
            f"{name}:{number} is longer than max_line_bytes={max_line_bytes:,}; leave the line "
            "out, or, of a corpus, raise data.Jsonl.max_line_bytes."
          )
        if number == 1 and (0 in line[:2] or line[:2] in (b"\xff\xfe", b"\xfe\xff")):
          raise ValueError(f"{name} is UTF-16 text, or none at all; save it as UTF-8.")
        line = line.removeprefix(_BYTE_ORDER_MARK)  # each of several files joined may begin with it
        if line.strip():
          yield number, line
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{name} cannot be read: {printable(error)}.") from error
  except Exception as error:
    if type(error).__name__ != "ZstdError":  # zstandard is imported only if it is needed
      raise
    raise ValueError(f"{name} cannot be read: {error}.") from error


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
    self._new = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj
    self._frame, self._file, self._ready = None, file, memoryview(b"")
    self._data, self._taken = b"", 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      if self._taken == len(self._data):
        self._data, self._taken = self._file.read(1 << 20), 0
        if not self._data:
          if self._frame is not None and not self._frame.eof:
            raise EOFError("compressed file ended before the end of its last frame")
          return 0
      if self._frame is None or self._frame.eof:
        self._frame = self._new()
      piece = self._data[self._taken : self._taken + _COMPRESSED_BYTES]
      self._ready = memoryview(self._frame.decompress(piece))
      self._taken += len(piece) - len(self._frame.unused_data)
    size = min(len(buffer), len(self._ready))
    buffer[:size] = self._ready[:size]
    self._ready = self._ready[size:]
    return size

  def close(self) -> None:
    self._file.close()
    super().close()
