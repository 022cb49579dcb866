"""The append-only log of a run: each call before it is sent and each reply as it comes.

A line is JSON with a version, a kind and a checksum, and is on the disk before the run goes on.
Kinds: `run` (the configuration), `call`, `reply`, `human` (what a person decided), `tool` (what
tools found), `note`, `end`. Since the engine repeats itself exactly when it is given the same
replies, this log is all that a resumed run needs: answered calls are answered from it, and the
first that is not goes to the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lmops_jax.host import foreign_files, whole_files
from lmops_jax.systems.socratic.backends import Reply, Usage
from lmops_jax.systems.socratic.problems import canonical

VERSION = 1
LOG, LOCK = "log.jsonl", "lock"


class Log(Protocol):
  """Where a run keeps what it did."""

  def reply(self, key: str) -> Reply | None:
    """The reply that is known for a call."""

  def human(self, key: str) -> dict[str, Any] | None:
    """What a person decided there."""

  def write(self, kind: str, **fields: Any) -> None:
    """Appends a line, unless a call or an end is there already."""


class NoLog:
  """Keeps nothing: simulations, which cost nothing to repeat."""

  def reply(self, key: str) -> None:
    """Nothing is known."""

  def human(self, key: str) -> None:
    """Nothing is known."""

  def write(self, kind: str, **fields: Any) -> None:
    """Nothing is written."""


class Journal:
  """The log of one folder, which one process writes at a time.

  Memory holds a place in the file for each call, not its texts.

  Attributes:
    config: what the last `run` line holds; None for a new log.
  """

  def __init__(self, folder: Path | str, *, writes: bool = True):
    """Opens or begins a log; a last line that was not written to its end is cut off.

    Args:
      writes: False reads what is there, also while another process writes.

    Raises:
      ValueError: if another process writes it, or a line is damaged, by its number.
    """
    self.path = Path(folder) / LOG
    self._lock = _locked(self.path.parent) if writes else contextlib.nullcontext()
    self.config: dict[str, Any] | None = None
    self._calls: dict[str, int] = {}
    self._replies: dict[str, int] = {}
    self._humans: dict[str, int] = {}
    self._tools: set[str] = set()
    self._end: dict[str, Any] | None = None
    with contextlib.ExitStack() as opened:
      opened.enter_context(self._lock)
      foreign_files.require_regular(self.path)
      self._file = opened.enter_context(open(self.path, "a+b" if writes else "rb"))
      self._size = 0
      for line, end in _lines(self.path):
        self._index(line, self._size)
        self._size = end
      if writes:
        self._file.truncate(self._size)
      self._opened = opened.pop_all()

  def _index(self, line: dict[str, Any], offset: int) -> None:
    kind = line["kind"]
    if kind == "run":
      self.config = line["config"]
    elif kind == "end":
      self._end = line
    elif kind == "tool":
      self._tools.add(line["key"])
    elif kind in ("call", "reply", "human"):
      {"call": self._calls, "reply": self._replies, "human": self._humans}[kind].setdefault(
        line["key"], offset)

  def __enter__(self) -> Journal:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def close(self) -> None:
    """Lets another process write."""
    self._opened.close()

  @property
  def end(self) -> dict[str, Any] | None:
    """The line that ends a finished run."""
    return self._end

  def reply(self, key: str) -> Reply | None:
    """The reply to a call, None if it has none."""
    line = self._at(self._replies.get(key))
    if line is None:
      return None
    return Reply(line["text"], line["finish"], Usage(**line["usage"]), line["model"])

  def call(self, key: str) -> dict[str, Any] | None:
    """The request of a call: its messages and where it belongs."""
    return self._at(self._calls.get(key))

  def human(self, key: str) -> dict[str, Any] | None:
    """What a person decided."""
    line = self._at(self._humans.get(key))
    return None if line is None else line["action"]

  def _at(self, offset: int | None) -> dict[str, Any] | None:
    if offset is None:
      return None
    self._file.seek(offset)
    return json.loads(self._file.readline())

  def write(self, kind: str, **fields: Any) -> None:
    """Appends a line and waits until it is on the disk.

    A call that is there already, as it is if its reply was lost, is not written again, nor is what
    tools found.

    Raises:
      OSError: if the disk is full; nothing more may be sent then.
    """
    if (kind == "call" and fields["key"] in self._calls) or (kind == "end" and self._end) or (
        kind == "tool" and fields["key"] in self._tools):
      return
    line = {"v": VERSION, "kind": kind, **{k: _plain(v) for k, v in fields.items()}}
    data = encoded(line)
    self._file.write(data)
    self._file.flush()
    os.fsync(self._file.fileno())
    if not self._size:
      whole_files.sync_folder(self.path.parent)
    self._index(line, self._size)
    self._size += len(data)


def _locked(folder: Path):
  """The lock file of a folder, held until it is closed."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "ab")
  except OSError as error:
    raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another folder."
                     ) from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    lock.close()
    raise ValueError(f"{folder} is being written by another process; wait until it has ended, or "
                     "choose another folder.") from None
  return lock


def _plain(value: Any) -> Any:
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def encoded(line: dict[str, Any]) -> bytes:
  """A line of the log with its checksum."""
  text = json.dumps({**line, "sum": _checksum(line)}, ensure_ascii=False, sort_keys=True)
  try:
    return text.encode() + b"\n"
  except UnicodeEncodeError:  # half a character from a model
    return json.dumps({**line, "sum": _checksum(line)}, sort_keys=True).encode() + b"\n"


def _checksum(line: dict[str, Any]) -> str:
  body = canonical({k: v for k, v in line.items() if k != "sum"})
  return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
  """Lines of a log and where each ends; a last line without its end is passed over.

  Raises:
    ValueError: a damaged line or another version, by line number.
  """
  end = 0
  with path.open("rb") as file:
    for number, data in enumerate(file, 1):
      if not data.endswith(b"\n"):
        return
      where = f"{path}:{number}"
      try:
        line = foreign_files.parse_json(data, where)
      except ValueError as error:
        raise ValueError(f"{error} {_SALVAGE}") from None
      if not isinstance(line, dict) or line.get("v") != VERSION:
        found = line.get("v") if isinstance(line, dict) else None
        raise ValueError(f"{where} has version {found!r} of the log, and this program writes and "
                         f"reads version {VERSION}. {_SALVAGE}")
      if line.get("sum") != _checksum(line):
        raise ValueError(f"{where} does not hold what was written. {_SALVAGE}")
      end += len(data)
      yield line, end


_SALVAGE = "Resume with --salvage to go on from the lines before it."


def read(folder: Path | str) -> Iterator[dict[str, Any]]:
  """The lines of a folder's log, which may be being written.

  Raises:
    ValueError: if there is none, or a line is damaged.
  """
  path = Path(folder) / LOG
  if not path.is_file():
    raise ValueError(f"{folder} holds no {LOG}; give the folder of a run.")
  return (line for line, _ in _lines(path))


def salvage(folder: Path | str) -> int:
  """Keeps the lines of a log before the first damaged one; the old file stays as `log.damaged`.

  Returns:
    How many lines were kept.
  """
  path = Path(folder) / LOG
  kept, end = 0, 0
  try:
    for _, end in _lines(path):  # noqa: B007
      kept += 1
  except ValueError:
    pass
  data = path.read_bytes()[:end]
  os.replace(path, path.with_name("log.damaged"))
  with whole_files.replacing(path) as partial:
    partial.write_bytes(data)
  return kept
