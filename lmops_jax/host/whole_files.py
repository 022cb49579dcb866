"""Files that are there in full or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WRITING = ".writing"  # behind a file's name until it is whole
SEAL = ".lmops-seal"  # ends the names of what `seals` keeps


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A path to write to, whose file is at `path` once the block has ended well.

  That holds after a power failure too. An older file is replaced in one step.
  """
  partial = path.with_name(path.name + WRITING)
  with _moved(partial, path):
    yield partial
    with partial.open("rb") as file:
      os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_shared(path: Path, folder: Path | None = None) -> Iterator[Path]:
  """As `replacing`, for files that several workers may write at once: the last one wins.

  Args:
    folder: where to write, on the file system of `path`; by default beside it.
  """
  partial = (folder or path.parent) / f"{uuid.uuid4().hex}-{path.name}"
  with _moved(partial, path):
    yield partial


@contextlib.contextmanager
def _moved(partial: Path, path: Path) -> Iterator[None]:
  try:
    yield
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  with replacing(path) as partial:
    partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
  write_text(path, json_text(value))


def json_text(value: Any) -> str:
  return json.dumps(value, indent=1, sort_keys=True) + "\n"


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays by name as an `.npz`."""
  import numpy as np  # the command line starts without it

  with replacing(path) as partial, partial.open("wb") as file:
    np.savez(file, **arrays)


def sync_folder(folder: Path) -> None:
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def new_folder(directory: Path) -> Path:
  """An empty folder beside `directory`, to write into and then rename to `directory`.

  Raises:
    ValueError: if `directory` is there and not empty, or cannot be made.
  """
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"{directory} exists already; choose a new folder, or delete it first.")
  partial = directory.with_name(directory.name + ".partial")
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  except OSError as error:
    raise ValueError(f"{directory} cannot be written ({error.strerror}).") from error
  return partial


@contextlib.contextmanager
def filled_folder(directory: Path) -> Iterator[Path]:
  """Gives an empty folder to write into, which becomes `directory` when all is written.

  Raises:
    ValueError: as `new_folder`.
  """
  directory = directory.expanduser().absolute()
  partial = new_folder(directory)
  try:
    yield partial
    if directory.exists():
      directory.rmdir()
    partial.rename(directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
