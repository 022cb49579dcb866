"""Manifests of finished stages: what a folder holds, whether it still does, why it is out of date.

A stage's identity is a dict of its `fingerprint`, its `settings` and the fingerprints of its
`inputs`; its manifest adds seconds, FLOPs, versions and the size and hash of each file.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.host.whole_files import SEAL, WRITING

MANIFEST, ATTEMPT, MARKER = "manifest.json", ".attempt.json", "lmops.json"
_PACKAGES = ("lmops_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio",
             "tensorflow", "tensorflow-datasets", "gin-config")


class StageError(RuntimeError):
  """A stage cannot run or its output cannot be used; one sentence that says what to do."""


def versions() -> dict[str, str]:
  """Releases of Python and of the packages that results depend on."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def list_files(folder: Path) -> Iterator[str]:
  """A stage's own files below its folder, `/` between the parts, sorted; without seals."""
  ours = {base + end for base in (MANIFEST, ATTEMPT) for end in ("", WRITING)}
  found = (Path(directory, name).relative_to(folder).as_posix()
           for directory, _, names in os.walk(folder) for name in names)
  return iter(sorted(path for path in found if path not in ours and not path.endswith(SEAL)))


def hash_file(path: Path) -> str:
  """BLAKE2b of what a file holds."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def hash_all(paths: Sequence[Path]) -> list[str]:
  """`hash_file` of each, on several threads."""
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(hash_file, paths))


def hash_files(folder: Path) -> dict[str, tuple[int, str]]:
  names = list(list_files(folder))
  digests = hash_all([folder / name for name in names])
  return {name: ((folder / name).stat().st_size, digest) for name, digest in zip(names, digests)}


def plain(value: Any) -> Any:
  """NumPy and JAX scalars and arrays as JSON writes them."""
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(f"context.extra holds a {type(value).__name__}, which JSON cannot hold")


def load_manifest(folder: Path, name: str) -> dict[str, Any]:
  from lmops_jax.host import records  # its library is imported only to read a record

  path = folder / MANIFEST
  try:
    return records.read(path, records.Manifest)
  except ValueError as error:
    raise StageError(f"{path}, the manifest of stage {name!r}, is damaged; delete the folder "
                     f"{folder} and run again to make it anew.") from error
  except OSError as error:
    raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> StageError:
  return StageError(f"{path} cannot be read ({error.strerror or error}); it was left as it is, run "
                    "the same command again when it can be read.")


def difference(new_identity: Mapping[str, Any], old_identity: Mapping[str, Any]) -> str:
  """What changed between two identities: `num_steps: 40 -> 80; input prepare changed`."""
  new, old = new_identity["settings"], old_identity["settings"]
  parts = [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
           for key in [*new, *(k for k in old if k not in new)] if old.get(key) != new.get(key)]
  new, old = new_identity["inputs"], old_identity["inputs"]
  parts += [f"input {name} changed" for name in new if name in old and old[name] != new[name]]
  parts += [f"new input {name}" for name in new if name not in old]
  parts += [f"no longer reads {name}" for name in old if name not in new]
  if len(parts) > 4:
    parts = [*parts[:4], f"and {len(parts) - 4} more"]
  return "; ".join(parts) or "written by another version of lmops_jax"


def compare(name: str, folder: Path, manifest: Mapping[str, Any], *, thorough: bool,
            part: str = ".") -> None:
  """Compares the files of a stage with its manifest.

  Args:
    thorough: hash all files; otherwise only those modified after the manifest was written, and
      the others are taken as they are if their size is right.
    part: the file or folder, relative to the stage's, that is compared; all by default.

  Raises:
    StageError: names the file that is missing, truncated, corrupted or not the stage's.
  """
  def belongs(relative: str) -> bool:
    return part == "." or relative == part or relative.startswith(part + "/")

  files: Mapping[str, tuple[int, str]] = {
    relative: noted for relative, noted in manifest["files"].items() if belongs(relative)}
  again = f"delete the folder {folder} and run again to make it anew"
  written = (folder / MANIFEST).stat().st_mtime_ns
  suspects = []
  for relative, (size, digest) in files.items():
    path = folder / relative
    try:
      status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
      raise StageError(f"{path}, an output of stage {name!r}, is missing; {again}.") from None
    except OSError as error:
      raise cannot_read(path, error) from error
    if status.st_size != size:
      word = "truncated" if status.st_size < size else "longer than it was"
      raise StageError(f"{path}, an output of stage {name!r}, is {word} ({status.st_size} bytes "
                       f"instead of {size}); {again}.")
    if thorough or status.st_mtime_ns > written:
      suspects.append((path, digest))
  extra = set(filter(belongs, list_files(folder))) - set(files)
  if extra:
    raise StageError(f"{folder / min(extra)} was not written by stage {name!r}; remove it.")
  try:
    hashes = hash_all([path for path, _ in suspects])
  except OSError as error:
    raise cannot_read(Path(error.filename or folder), error) from error
  for (path, digest), found in zip(suspects, hashes):
    if found != digest:
      raise StageError(f"{path}, an output of stage {name!r}, is corrupted: its content is not "
                       f"what the stage wrote; {again}.")


def verify_read(path: Path) -> None:
  """Compares a file or folder with the manifest of the finished stage that it belongs to.

  For whatever reads the outputs of a run from outside of it; what belongs to no stage passes.

  Raises:
    StageError: as `compare`, or if the manifest is damaged.
  """
  path = Path(os.path.abspath(path))
  damaged = None
  for folder in (path, *path.parents):
    if not (folder / MANIFEST).is_file():
      continue
    try:
      manifest = load_manifest(folder, folder.name)
    except StageError as error:
      # Others have files of this name too; in a workdir it is a stage's.
      if any((parent / MARKER).is_file() for parent in folder.parents):
        damaged = error
      continue
    compare(manifest["stage"], folder, manifest, thorough=True,
            part=path.relative_to(folder).as_posix())
    return
  if damaged is not None:
    raise damaged


def chain(error: BaseException | None) -> Iterator[BaseException]:
  """An error with all its causes and members."""
  seen: set[int] = set()
  pending = [error]
  while pending:
    item = pending.pop()
    if item is None or id(item) in seen:
      continue
    seen.add(id(item))
    yield item
    pending += [item.__cause__, item.__context__, *getattr(item, "exceptions", ())]


_TOO_LARGE = "File too large"
_FULL = ("No space left on device", "Disk quota exceeded", _TOO_LARGE)  # as libraries pass it on


def is_disk_full(error: BaseException) -> bool:
  """Whether an error, or a library's error that wraps it, says that nothing more can be written."""
  codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return any(getattr(item, "errno", None) in codes or any(text in str(item) for text in _FULL)
             for item in chain(error))


def disk_full(error: BaseException, what: str, folder: Path) -> StageError:
  named = next((item.filename for item in chain(error) if getattr(item, "filename", None)), folder)
  limit = any(getattr(item, "errno", None) == errno.EFBIG or _TOO_LARGE in str(item)
              for item in chain(error))
  try:
    free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
  except OSError:
    free = "free space unknown"
  why = "the file would exceed the size limit" if limit else "no space is left on the device"
  return StageError(f"{what}: {why} while writing {named} ({free}); make room and run the same "
                    "command again, it continues where it stopped.")
