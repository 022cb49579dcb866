"""Seals of unfinished work: a later attempt reads back what an earlier one wrote, or nothing.

Files of a finished stage are in its manifest. Those that an interrupted attempt leaves have a seal
beside them, which holds their sizes and hashes; without one, or with another content, they are made
again. Seals go when the stage is finished.
"""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.host import foreign_files, whole_files
from lmops_jax.host.manifests import hash_all, hash_file, hash_files, list_files
from lmops_jax.host.whole_files import SEAL

Contents = dict[str, tuple[int, str]]  # bytes and hash by path below a folder; "" is a file itself


def contents(path: Path) -> Contents:
  """What a seal holds of a file, or of all files in a folder."""
  return {"": (path.stat().st_size, hash_file(path))} if path.is_file() else hash_files(path)


def damage(path: Path, noted: Any, *, ignored: Sequence[str] = ()) -> str | None:
  """What is wrong with a file or folder, None if it is as it was noted.

  Args:
    noted: what `contents` gave, after JSON.
    ignored: files of the folder that were not noted.

  Raises:
    OSError: if it cannot be read, which says nothing of what it holds.
  """
  try:
    noted = {str(name): (int(size), str(found)) for name, (size, found) in noted.items()}
  except (AttributeError, TypeError, ValueError):
    return "its note of sizes and hashes is damaged"
  for name, (size, _) in noted.items():
    file = path / name
    there = file.stat().st_size if file.is_file() else None
    if there != size:
      has = "is missing" if there is None else f"has {there} bytes"
      return f"its file {name or file.name} {has} of {size}"
  extra = set() if path.is_file() else set(list_files(path)) - set(noted) - set(ignored)
  if extra or not noted:
    return f"its file {min(extra)} was not written with it" if extra else "it is empty"
  hashes = hash_all([path / name for name in noted])
  for (name, (_, wanted)), found in zip(noted.items(), hashes):
    if found != wanted:
      return f"its file {name or path.name} does not hold what was written"
  return None


def seal(path: Path) -> None:
  """Seals a file or folder that is complete. For a file that is replaced, see `replacing`."""
  _write(path, [contents(path)])


def is_whole(path: Path) -> bool:
  """Whether a file or folder is there as it was sealed.

  Raises:
    OSError: if it cannot be read.
  """
  return any(damage(path, noted) is None for noted in _notes(path))


def all_whole(groups: Iterable[Sequence[Path]]) -> list[bool]:
  """For each group, whether all its files are whole; uses several threads."""
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(lambda paths: all(map(is_whole, paths)), groups))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """As `whole_files.replacing`, with a seal."""
  with whole_files.replacing(path) as partial:
    yield partial
    # A kill between the seal and the rename leaves the older file, which the seal knows too.
    _write(path, [contents(partial), *_notes(path)[:1]])


@contextlib.contextmanager
def replacing_shared(path: Path, folder: Path | None = None) -> Iterator[Path]:
  """As `whole_files.replacing_shared`, with a seal."""
  with whole_files.replacing_shared(path, folder) as partial:
    yield partial
    _write(path, [contents(partial)], folder)


def _write(path: Path, notes: Sequence[Contents], folder: Path | None = None) -> None:
  with whole_files.replacing_shared(_beside(path), folder) as partial:
    partial.write_text(whole_files.json_text(notes), encoding="utf-8")


def _beside(path: Path) -> Path:
  return path.with_name(f".{path.name}{SEAL}")


def _notes(path: Path) -> list[Mapping[str, Any]]:
  """What the seal of a file holds, newest first; nothing if it is missing or damaged."""
  try:
    found = foreign_files.parse_json(_beside(path).read_bytes(), _beside(path))
  except (FileNotFoundError, ValueError):
    return []
  return found if isinstance(found, list) else []
