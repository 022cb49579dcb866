"""The folder that a run works in: locked, owned by one system, changed by single renames only."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmops_jax.host import foreign_files, records
from lmops_jax.host import progress as progress_lib
from lmops_jax.host.manifests import (
  ATTEMPT,
  MANIFEST,
  MARKER,
  StageError,
  cannot_read,
  compare,
  difference,
  disk_full,
  hash_files,
  is_disk_full,
  load_manifest,
  now,
  plain,
  versions,
)
from lmops_jax.host.whole_files import SEAL, WRITING, sync_folder, write_json, write_text

LOG, CONFIG, _LOCK = "log.txt", "config.gin", ".lock"
PARTIAL, REPLACED, DISCARDED = ".partial", ".replaced", ".discarded"
_SIGN = ".job-"  # followed by a name that is new each time
_FORMAT = 1


class Workdir:
  """A locked folder that belongs to one system; all changes of state are single renames."""

  def __init__(self, path: Path, system: str):
    self.path, self._system = path, system
    self._verified: set[str] = set()
    self._lock = None

  def __enter__(self) -> "Workdir":
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._take_lock()
      try:
        self._check_owner()
      except BaseException:
        self._release_lock()
        raise
    except (OSError, ValueError) as error:
      if is_disk_full(error):
        raise disk_full(error, "the workdir", self.path) from error
      why = getattr(error, "strerror", None) or str(error).rstrip(".")
      raise StageError(f"the workdir {self.path} cannot be used ({why}); choose another "
                       "--workdir.") from error
    return self

  def __exit__(self, *_) -> None:
    self._release_lock()

  def _take_lock(self) -> None:
    for name in (_LOCK, LOG):
      foreign_files.require_regular(self.path / name)
    existed = set(os.listdir(self.path)) - {_LOCK, MARKER + WRITING}
    if existed and not (self.path / MARKER).exists():
      raise self._foreign(existed)
    self._lock = open(self.path / _LOCK, "a+", encoding="utf-8", errors="replace")
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._lock.seek(0)
      holder = self._lock.read().strip() or "another process"
      self._lock.close()
      self._lock = None
      raise StageError(f"the workdir {self.path} is in use by {holder}; wait for it, or choose "
                       "another --workdir.") from None
    self._lock.truncate(0)
    self._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
    self._lock.flush()

  def _release_lock(self) -> None:
    if self._lock is not None:
      with contextlib.suppress(OSError):
        self._lock.truncate(0)
      self._lock.close()
      self._lock = None

  def _foreign(self, names: Iterable[str]) -> StageError:
    names = sorted(names)
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return StageError(f"the workdir {self.path} holds files that lmops did not write ({some}); "
                      "choose an empty or a new --workdir.")

  def _check_owner(self) -> None:
    marker = self.path / MARKER
    if not marker.exists():
      write_json(marker, {"system": self._system, "format": _FORMAT, "created": now()})
      return
    try:
      owner = records.read(marker, records.Marker)["system"]
    except ValueError as error:
      raise StageError(f"{marker} is damaged, so it is not known whose workdir this is; choose "
                       "another --workdir.") from error
    if owner != self._system:
      raise StageError(f"the workdir {self.path} belongs to the system {owner!r}, not to "
                       f"{self._system!r}; choose another --workdir.")

  def final(self, name: str) -> Path:
    return self.path / name

  def partial(self, name: str) -> Path:
    return self.path / (name + PARTIAL)

  @contextlib.contextmanager
  def signed(self) -> Iterator[str]:
    """Inside, other processes that see a file of the yielded name see this folder.

    The name is new each time: what a network file system knows of older names says nothing of it.
    """
    sign = self.path / f"{_SIGN}{uuid.uuid4().hex}"
    sign.touch()
    try:
      yield sign.name
    finally:
      sign.unlink(missing_ok=True)

  def write_config(self, text: str) -> None:
    try:
      write_text(self.path / CONFIG, text)
    except OSError as error:
      if is_disk_full(error):
        raise disk_full(error, "the workdir", self.path) from error
      raise

  def log(self, text: str) -> None:
    progress_lib.log(text)
    with contextlib.suppress(OSError), open(self.path / LOG, "a", encoding="utf-8") as file:
      file.write(f"{now()} {text}\n")

  def recover(self, names: Iterable[str]) -> None:
    """Undoes the replacement that a killed process left half done; `adopt` completes it."""
    for sign in self.path.glob(_SIGN + "*"):
      sign.unlink(missing_ok=True)
    for name in names:
      final, replaced = self.final(name), self.path / (name + REPLACED)
      if replaced.exists() and not final.exists():
        replaced.rename(final)
      for leftover in (replaced, self.path / (name + DISCARDED)):
        _remove(leftover)

  def finished(self, name: str) -> dict[str, Any] | None:
    """The manifest of a finished stage, None if there is none."""
    final = self.final(name)
    if not final.exists():
      return None
    if not (final / MANIFEST).is_file():
      raise StageError(f"{final} has no {MANIFEST}, so lmops did not write it; move it away or "
                       "choose another --workdir.")
    return load_manifest(final, name)

  def begin(self, name: str, identity: Mapping[str, Any],
            finished: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Prepares a stage's partial folder, keeping it if it belongs to the same fingerprint.

    Args:
      finished: the manifest of an earlier, now outdated output.

    Returns:
      The record of the attempt (identity, attempts, seconds, flops) and why the stage runs.
    """
    reason = "first run" if finished is None else difference(identity, finished)
    partial = self.partial(name)
    attempt = None
    if os.path.lexists(partial):
      try:
        attempt = records.read(partial / ATTEMPT, records.Attempt)
      except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        reason = "the record of an earlier attempt is missing or damaged"
      except OSError as error:
        raise cannot_read(partial / ATTEMPT, error) from error
      if attempt is not None and attempt["fingerprint"] == identity["fingerprint"]:
        reason = "interrupted earlier"
        for leftover in (MANIFEST, MANIFEST + WRITING, ATTEMPT + WRITING):
          (partial / leftover).unlink(missing_ok=True)
      else:
        if attempt is not None and finished is None:
          reason = f"started earlier, then {difference(identity, attempt)}"
        attempt = None
        self._discard(partial)
    try:
      if attempt is None:
        partial.mkdir(parents=True)
        attempt = {**identity, "attempts": 0, "seconds": 0.0, "flops": 0.0, "started": now()}
      attempt = records.write(
        partial / ATTEMPT, {**attempt, "attempts": attempt["attempts"] + 1})
    except OSError as error:
      if is_disk_full(error):
        raise disk_full(error, f"stage {name}", partial) from error
      raise
    return attempt, reason

  def _discard(self, folder: Path) -> None:
    """Deletes a folder so that no half-deleted state can be mistaken for it."""
    target = folder.with_name(folder.name.removesuffix(PARTIAL) + DISCARDED)
    _remove(target)
    folder.rename(target)
    _remove(target)

  def finish(self, name: str, identity: Mapping[str, Any], attempt: Mapping[str, Any],
             seconds: float, flops: float, extra: Mapping[str, Any]) -> None:
    """Writes the manifest of what lies in the partial folder and makes the folder visible."""
    partial = self.partial(name)
    if (partial / MANIFEST).exists():
      raise StageError(f"stage {name} wrote a file called {MANIFEST}, a name that the pipeline "
                       "needs; rename it in the stage.")
    manifest = {
      **identity, "stage": name, "system": self._system, "seconds": round(seconds, 3),
      "flops": flops, "attempts": attempt["attempts"], "started": attempt["started"],
      "finished": now(), "versions": versions(), "extra": extra, "files": hash_files(partial)}
    records.write(partial / MANIFEST, json.loads(json.dumps(manifest, default=plain)))
    self._publish(name)

  def _publish(self, name: str) -> None:
    partial, final, replaced = self.partial(name), self.final(name), self.path / (name + REPLACED)
    for leftover in (partial / ATTEMPT, partial / (ATTEMPT + WRITING), *partial.rglob(f"*{SEAL}")):
      leftover.unlink(missing_ok=True)
    sync_folder(partial)
    if final.exists():
      final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    if replaced.exists():
      shutil.rmtree(replaced)
    self._verified.add(name)

  def adopt(self, name: str, fingerprint: str) -> dict[str, Any] | None:
    """Publishes an output that was complete when its process was killed before the rename."""
    partial = self.partial(name)
    try:
      manifest = load_manifest(partial, name)
      if manifest["fingerprint"] != fingerprint:
        return None
      compare(name, partial, manifest, thorough=True)
    except StageError:
      return None
    self._publish(name)
    return manifest

  def verify(self, name: str, manifest: Mapping[str, Any], *, thorough: bool) -> None:
    """Compares a finished stage with its manifest, thoroughly once in this run."""
    if name in self._verified:
      return
    compare(name, self.final(name), manifest, thorough=thorough)
    if thorough:
      self._verified.add(name)


def _remove(path: Path) -> None:
  """Deletes whatever is there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
