"""Stages that survive being killed: fingerprinted, resumable, visible only when complete.

A stage reads the folders of other stages and writes into `<workdir>/<name>.partial`. When it
returns, every file is hashed into `manifest.json` and the folder is renamed to `<workdir>/<name>`;
that rename is the only moment at which it becomes visible. What follows from it:

  * a finished stage is recognised by its fingerprint (name, settings, its inputs' fingerprints) and
    costs nothing to run again; a changed setting runs it again and the log says which,
  * a killed stage finds its partial folder as it left it, if its fingerprint is still the same;
    otherwise it starts from an empty one,
  * nothing reads a file that does not have the size and the hash that its stage wrote.

One process at a time works in a workdir; of several processes of one job, only the first decides,
writes manifests and renames. The module imports neither jax nor TensorFlow.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax import progress as progress_lib
from lmops_jax.settings import nearest

MANIFEST, _ATTEMPT, _MARKER, _LOCK, LOG, CONFIG = (
  "manifest.json", ".attempt.json", "lmops.json", ".lock", "log.txt", "config.gin")
_PARTIAL, _REPLACED, _DISCARDED = ".partial", ".replaced", ".discarded"
_WRITING = ".writing"
_FORMAT = 1
_SAVE_SECONDS = 2.0
_PACKAGES = ("lmops_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio",
             "tensorflow", "tensorflow-datasets", "gin-config")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*(/[A-Za-z0-9_][A-Za-z0-9_.=+-]*)*")


class StageError(RuntimeError):
  """A stage cannot run or its output cannot be used; one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a run.

  Attributes:
    name: also its folder below the workdir; may hold `/` ("solve/pds").
    run: does the work; writes into `context.directory` only, reads `context.input(...)` only.
    inputs: names of the stages that it reads.
    settings: all that its output depends on besides its inputs, readable name to readable value.
  """
  name: str
  run: Callable[["StageContext"], None]
  inputs: tuple[str, ...] = ()
  settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


class StageRecord(NamedTuple):
  """What became of a stage: seconds and flops are totals over all its attempts."""
  name: str
  seconds: float
  flops: float
  status: str  # "ran", "resumed" or "cached"
  reason: str


@dataclasses.dataclass(frozen=True)
class Group:
  """The processes of one job that share a workdir; `barrier(label)` waits for all of them."""
  index: int = 0
  count: int = 1
  barrier: Callable[[str], None] = lambda label: None


class StageContext:
  """What a running stage sees.

  Attributes:
    name: of the stage.
    directory: the partial folder to write into. It holds what an interrupted attempt with the same
      fingerprint left there.
    flops: floating-point operations, to be added to.
    extra: JSON-able values that the manifest keeps under "extra".
    group: the processes that run this stage together.
  """

  def __init__(self, name: str, directory: Path, inputs: Mapping[str, Path],
               write_log: Callable[[str], None], *, flops: float = 0.0, group: Group | None = None):
    self.name, self.directory, self.flops = name, directory, flops
    self.group = group or Group()
    self.extra: dict[str, Any] = {}
    self._inputs, self._write_log = dict(inputs), write_log

  def input(self, name: str) -> Path:
    """The finished and verified folder of an input stage."""
    if name not in self._inputs:
      raise KeyError(f"stage {self.name} does not name {name!r} among its inputs"
                     f"{nearest(name, self._inputs)}")
    return self._inputs[name]

  def manifest(self, name: str) -> dict[str, Any]:
    """The manifest of an input stage: seconds, flops, settings, extra and more."""
    return _load_manifest(self.input(name), name)

  def log(self, text: str) -> None:
    """One line on the terminal and in the workdir's log."""
    self._write_log(f"{self.name}: {text}")

  def progress(self, total: int | None, unit: str = "steps", description: str = "", *,
               initial: int = 0) -> progress_lib.Progress:
    """A progress bar for this stage; use it as a context manager."""
    return progress_lib.Progress(total, unit, description or self.name, initial=initial,
                                 quiet=self.group.index > 0)


# ------------------------------------------------------------------------------------- the graph


def ordered(stages: Sequence[Stage]) -> list[Stage]:
  """The stages with inputs before their readers, otherwise in the given order.

  Raises:
    StageError: a bad, repeated or nested name, an unknown input, a circle.
  """
  by_name: dict[str, Stage] = {}
  for stage in stages:
    ends = tuple(part.endswith((_PARTIAL, _REPLACED, _DISCARDED)) for part in stage.name.split("/"))
    if not _NAME.fullmatch(stage.name) or any(ends):
      raise StageError(f"{stage.name!r} cannot name a stage; use letters, digits, _ and -, with / "
                       "between the parts.")
    if stage.name in by_name:
      raise StageError(f"two stages are called {stage.name!r}; give them different names.")
    by_name[stage.name] = stage
  for name in by_name:
    parents = [name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)]
    for parent in set(parents) & set(by_name):
      raise StageError(f"stage {name!r} would lie inside the folder of stage {parent!r}; rename "
                       "one of them.")
  done: dict[str, Stage] = {}
  visiting: list[str] = []

  def visit(stage: Stage) -> None:
    if stage.name in done:
      return
    if stage.name in visiting:
      circle = [*visiting[visiting.index(stage.name):], stage.name]
      raise StageError(f"the stages wait for each other: {' <- '.join(circle)}.")
    visiting.append(stage.name)
    for name in stage.inputs:
      if name not in by_name:
        raise StageError(f"stage {stage.name!r} reads {name!r}, which is not a stage"
                         f"{nearest(name, by_name)}")
      visit(by_name[name])
    visiting.pop()
    done[stage.name] = stage

  for stage in stages:
    visit(stage)
  return list(done.values())


def chosen(stages: Sequence[Stage], only: Sequence[str] | None) -> list[Stage]:
  """The stages that `only` names, each name exact or the leading parts of several ("solve")."""
  if only is None:
    return list(stages)
  wanted = set()
  for name in only:
    matches = [s.name for s in stages if s.name == name or s.name.startswith(name + "/")]
    if not matches:
      known = {"/".join(s.name.split("/")[:n + 1]) for s in stages
               for n in range(s.name.count("/") + 1)}
      raise StageError(f"there is no stage {name!r}{nearest(name, known)}")
    wanted.update(matches)
  return [stage for stage in stages if stage.name in wanted]


def fingerprints(stages: Sequence[Stage], system: str) -> dict[str, str]:
  """Hash of all that determines each stage's output: system, name, settings, inputs; in order."""
  prints: dict[str, str] = {}
  for stage in ordered(stages):
    what = {"format": _FORMAT, "system": system, "stage": stage.name,
            "settings": dict(stage.settings), "inputs": {n: prints[n] for n in stage.inputs}}
    text = json.dumps(what, sort_keys=True, ensure_ascii=True)
    prints[stage.name] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
  return prints


# ------------------------------------------------------------------------------------- the runner


def run_stages(stages: Sequence[Stage], workdir: str | os.PathLike, *,
               only: Sequence[str] | None = None, system: str,
               group: Group | None = None, config: str | None = None) -> list[StageRecord]:
  """Runs the stages that are not finished, each after its inputs.

  Args:
    stages: all stages of the run, in any order.
    workdir: made where it does not exist; must be empty or belong to the same system.
    only: names or leading parts of names; the others must be finished where these read them.
    system: name of the system, kept in the workdir.
    group: this process among those of the job; all of them must call this with the same arguments.
    config: the resolved configuration, kept in the workdir as config.gin.

  Returns:
    One record for each chosen stage, in the order in which they ran.

  Raises:
    StageError: see the class. What a stage raises passes through with a note that names the stage,
      except that a full disk becomes a StageError that names the path.
  """
  all_stages = ordered(stages)
  prints = fingerprints(all_stages, system)
  selected = chosen(all_stages, only)
  group = group or Group()
  with _Workdir(Path(workdir), system, group) as work:
    if group.index == 0:
      work.recover(all_stages)
      _require_inputs(work, all_stages, selected, prints)
      if config is not None:
        work.write_config(config)
    group.barrier("open")
    return [_run_one(work, stage, prints) for stage in selected]


def read_manifest(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """The manifest of a finished stage: fingerprint, settings, inputs, versions, seconds, flops,
  files (path to size and hash), extra.

  Raises:
    StageError: the stage is not finished or its manifest is damaged.
  """
  folder = Path(workdir) / name
  if not (folder / MANIFEST).is_file():
    raise StageError(f"stage {name!r} is not finished in {workdir}; run it first.")
  return _load_manifest(folder, name)


def _require_inputs(work: "_Workdir", stages, selected, prints) -> None:
  """Refuses a partial run whose other inputs are missing or out of date."""
  names = {stage.name for stage in selected}
  by_name = {stage.name: stage for stage in stages}
  for stage in selected:
    for name in stage.inputs:
      if name in names:
        continue
      finished = work.finished(name)
      if finished is None:
        raise StageError(f"stage {stage.name!r} reads stage {name!r}, which is not finished in "
                         f"{work.path}; run {name!r} first, or run all stages.")
      if finished["fingerprint"] != prints[name]:
        why = _difference(by_name[name], finished, prints)
        raise StageError(f"stage {stage.name!r} reads stage {name!r}, which is out of date "
                         f"({why}); run {name!r} first, or run all stages.")


def _run_one(work: "_Workdir", stage: Stage, prints: Mapping[str, str]) -> StageRecord:
  group = work.group
  if group.index > 0:  # the first process decides; this one sees it in the files
    group.barrier(f"ready {stage.name}")
    if (work.partial(stage.name) / _ATTEMPT).exists():
      inputs = {name: work.final(name) for name in stage.inputs}
      stage.run(StageContext(stage.name, work.partial(stage.name), inputs, lambda text: None,
                             group=group))
    group.barrier(f"done {stage.name}")
    group.barrier(f"visible {stage.name}")
    manifest = read_manifest(work.path, stage.name)
    return StageRecord(stage.name, manifest["seconds"], manifest["flops"], "followed", "")

  fingerprint = prints[stage.name]
  finished = work.finished(stage.name)
  if finished is not None and finished["fingerprint"] == fingerprint:
    work.verify(stage.name, finished, thorough=False)
    for label in ("ready", "done", "visible"):
      group.barrier(f"{label} {stage.name}")
    work.log(f"{stage.name}: finished earlier in "
             f"{progress_lib.format_seconds(finished['seconds'])}")
    return StageRecord(stage.name, finished["seconds"], finished["flops"], "cached", "")

  adopted = work.adopt(stage.name, fingerprint)
  if adopted is not None:
    for label in ("ready", "done", "visible"):
      group.barrier(f"{label} {stage.name}")
    work.log(f"{stage.name}: was complete when it was interrupted")
    return StageRecord(stage.name, adopted["seconds"], adopted["flops"], "resumed",
                       "interrupted earlier")

  inputs = {}
  for name in stage.inputs:
    work.verify(name, work.finished(name), thorough=True)
    inputs[name] = work.final(name)
  attempt, reason = work.begin(stage, fingerprint, finished, prints)
  resumed = attempt["attempts"] > 1
  group.barrier(f"ready {stage.name}")
  work.log(f"{stage.name}: {'resuming' if resumed else 'running'} ({reason})")
  context = StageContext(stage.name, work.partial(stage.name), inputs, work.log,
                         flops=attempt["flops"], group=group)
  try:
    with _Attempt(context, attempt) as running:
      stage.run(context)
    group.barrier(f"done {stage.name}")
    seconds = running.seconds()
    work.finish(stage, fingerprint, prints, context, attempt, seconds)
  except Exception as error:
    if _is_disk_full(error):
      raise _disk_full(error, f"stage {stage.name}", context.directory) from error
    error.add_note(f"in stage {stage.name}")
    raise
  group.barrier(f"visible {stage.name}")
  work.log(f"{stage.name}: done in {progress_lib.format_seconds(seconds)}")
  return StageRecord(stage.name, seconds, float(context.flops), "resumed" if resumed else "ran",
                     reason)


class _Attempt:
  """Keeps the seconds and flops of a running attempt on disk, for the case that it is killed."""

  def __init__(self, context: StageContext, attempt: dict[str, Any]):
    self._context, self._attempt = context, attempt
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep, name="lmops-attempt", daemon=True)

  def seconds(self) -> float:
    return self._attempt["seconds"] + self._elapsed

  @property
  def _elapsed(self) -> float:
    return (self._end or time.monotonic()) - self._start

  def _keep(self) -> None:
    while not self._stop.wait(_SAVE_SECONDS):
      self._save()

  def _save(self) -> None:
    state = {**self._attempt, "seconds": self.seconds(), "flops": float(self._context.flops)}
    with contextlib.suppress(OSError):  # a full disk is reported by the stage itself
      _write_json(self._context.directory / _ATTEMPT, state)

  def __enter__(self) -> "_Attempt":
    self._start, self._end = time.monotonic(), None
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._end = time.monotonic()
    self._stop.set()
    self._thread.join()
    self._save()


def _difference(stage: Stage, manifest: Mapping[str, Any], prints: Mapping[str, str]) -> str:
  """What changed since a manifest was written: `num_steps: 40 -> 80; input prepare changed`."""
  old, new = manifest["settings"], stage.settings
  parts = [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
           for key in [*new, *(k for k in old if k not in new)] if old.get(key) != new.get(key)]
  inputs = manifest["inputs"]
  parts += [f"input {name} changed" for name in stage.inputs
            if inputs.get(name) not in (None, prints[name])]
  parts += [f"new input {name}" for name in stage.inputs if name not in inputs]
  parts += [f"no longer reads {name}" for name in inputs if name not in stage.inputs]
  if len(parts) > 4:
    parts = [*parts[:4], f"and {len(parts) - 4} more"]
  return "; ".join(parts) or "written by another version of lmops_jax"


# ------------------------------------------------------------------------------------ the workdir


class _Workdir:
  """A locked folder that belongs to one system; all changes of state are single renames."""

  def __init__(self, path: Path, system: str, group: Group):
    self.path, self.group = path, group
    self._system = system
    self._verified: set[str] = set()
    self._lock = None

  def __enter__(self) -> "_Workdir":
    if self.group.index > 0:
      return self
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._take_lock()
      try:
        self._check_owner()
      except BaseException:
        self._release_lock()
        raise
    except OSError as error:
      if _is_disk_full(error):
        raise _disk_full(error, "the workdir", self.path) from error
      raise StageError(f"the workdir {self.path} cannot be used ({error.strerror or error}); "
                       "choose another --workdir.") from error
    return self

  def __exit__(self, *_) -> None:
    self._release_lock()

  def _take_lock(self) -> None:
    existed = set(os.listdir(self.path)) - {_LOCK, _MARKER + _WRITING}
    if existed and not (self.path / _MARKER).exists():
      raise self._foreign(existed)
    self._lock = open(self.path / _LOCK, "a+", encoding="utf-8")
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
    self._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
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
    marker = self.path / _MARKER
    if not marker.exists():
      _write_json(marker, {"system": self._system, "format": _FORMAT, "created": _now()})
      return
    try:
      owner = json.loads(marker.read_text(encoding="utf-8"))["system"]
    except (ValueError, KeyError, TypeError) as error:
      raise StageError(f"{marker} is damaged, so it is not known whose workdir this is; choose "
                       "another --workdir.") from error
    if owner != self._system:
      raise StageError(f"the workdir {self.path} belongs to the system {owner!r}, not to "
                       f"{self._system!r}; choose another --workdir.")

  def final(self, name: str) -> Path:
    return self.path / name

  def partial(self, name: str) -> Path:
    return self.path / (name + _PARTIAL)

  def write_config(self, text: str) -> None:
    try:
      _write_text(self.path / CONFIG, text)
    except OSError as error:
      if _is_disk_full(error):
        raise _disk_full(error, "the workdir", self.path) from error
      raise

  def log(self, text: str) -> None:
    progress_lib.log(text)
    with contextlib.suppress(OSError), open(self.path / LOG, "a", encoding="utf-8") as file:
      file.write(f"{_now()} {text}\n")

  def recover(self, stages: Sequence[Stage]) -> None:
    """Undoes the replacement that a killed process left half done; `adopt` completes it."""
    for stage in stages:
      final, replaced = self.final(stage.name), self.path / (stage.name + _REPLACED)
      if replaced.exists() and not final.exists():
        replaced.rename(final)
      for leftover in (replaced, self.path / (stage.name + _DISCARDED)):
        if leftover.exists():
          shutil.rmtree(leftover)

  def finished(self, name: str) -> dict[str, Any] | None:
    """The manifest of a finished stage, None where there is none."""
    final = self.final(name)
    if not final.exists():
      return None
    if not (final / MANIFEST).is_file():
      raise StageError(f"{final} has no {MANIFEST}, so lmops did not write it; move it away or "
                       "choose another --workdir.")
    return _load_manifest(final, name)

  def begin(self, stage: Stage, fingerprint: str, finished: dict | None,
            prints: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Prepares the partial folder; returns the attempt's record and why the stage runs."""
    reason = "first run" if finished is None else _difference(stage, finished, prints)
    partial = self.partial(stage.name)
    attempt = None
    if partial.exists():
      with contextlib.suppress(OSError, ValueError):
        attempt = json.loads((partial / _ATTEMPT).read_text(encoding="utf-8"))
      if attempt is not None and attempt.get("fingerprint") == fingerprint:
        reason = "interrupted earlier"
        for name in (MANIFEST, MANIFEST + _WRITING, _ATTEMPT + _WRITING):
          (partial / name).unlink(missing_ok=True)
      else:
        if attempt is not None and finished is None:
          reason = f"started earlier, then {_difference(stage, attempt, prints)}"
        attempt = None
        self._discard(partial)
    try:
      if attempt is None:
        partial.mkdir(parents=True)
        attempt = {"fingerprint": fingerprint, "settings": dict(stage.settings),
                   "inputs": {name: prints[name] for name in stage.inputs},
                   "attempts": 0, "seconds": 0.0, "flops": 0.0, "started": _now()}
      attempt["attempts"] += 1
      _write_json(partial / _ATTEMPT, attempt)
    except OSError as error:
      if _is_disk_full(error):
        raise _disk_full(error, f"stage {stage.name}", partial) from error
      raise
    return attempt, reason

  def _discard(self, folder: Path) -> None:
    """Deletes a folder so that no half-deleted state can be mistaken for it."""
    target = folder.with_name(folder.name.removesuffix(_PARTIAL) + _DISCARDED)
    if target.exists():
      shutil.rmtree(target)
    folder.rename(target)
    shutil.rmtree(target)

  def finish(self, stage: Stage, fingerprint: str, prints: Mapping[str, str],
             context: StageContext, attempt: Mapping[str, Any], seconds: float) -> None:
    """Writes the manifest and makes the folder visible."""
    partial = self.partial(stage.name)
    if (partial / MANIFEST).exists():
      raise StageError(f"stage {stage.name} wrote a file called {MANIFEST}, a name that the "
                       "pipeline needs; rename it in the stage.")
    manifest = {
      "stage": stage.name, "system": self._system, "fingerprint": fingerprint,
      "settings": dict(stage.settings), "inputs": {name: prints[name] for name in stage.inputs},
      "seconds": round(seconds, 3), "flops": float(context.flops),
      "attempts": attempt["attempts"], "started": attempt["started"], "finished": _now(),
      "versions": versions(), "extra": context.extra, "files": _hash_files(partial),
    }
    manifest = json.loads(json.dumps(manifest, default=_plain))
    manifest["checksum"] = _checksum(manifest)
    _write_json(partial / MANIFEST, manifest)
    self._publish(stage.name)

  def _publish(self, name: str) -> None:
    partial, final, replaced = self.partial(name), self.final(name), self.path / (name + _REPLACED)
    for leftover in (_ATTEMPT, _ATTEMPT + _WRITING):
      (partial / leftover).unlink(missing_ok=True)
    _sync_folder(partial)
    if final.exists():
      final.rename(replaced)
    partial.rename(final)
    _sync_folder(final.parent)
    if replaced.exists():
      shutil.rmtree(replaced)
    self._verified.add(name)

  def adopt(self, name: str, fingerprint: str) -> dict[str, Any] | None:
    """Publishes an output that was complete when its process was killed before the rename."""
    partial = self.partial(name)
    try:
      manifest = _load_manifest(partial, name)
      if manifest["fingerprint"] != fingerprint:
        return None
      self._compare(name, partial, manifest, thorough=True)
    except StageError:
      return None
    self._publish(name)
    return manifest

  def verify(self, name: str, manifest: Mapping[str, Any], *, thorough: bool) -> None:
    """Compares a finished stage's files with its manifest.

    Args:
      thorough: hash all files, once in this run; otherwise those whose size is right and that were
        not modified after the manifest was written are taken as they are.
    """
    if name in self._verified:
      return
    self._compare(name, self.final(name), manifest, thorough=thorough)
    if thorough:
      self._verified.add(name)

  def _compare(self, name: str, folder: Path, manifest: Mapping[str, Any], *, thorough: bool):
    files: Mapping[str, tuple[int, str]] = manifest["files"]
    again = f"delete the folder {folder} and run again to make it anew"
    written = (folder / MANIFEST).stat().st_mtime_ns
    suspects = []
    for relative, (size, digest) in files.items():
      path = folder / relative
      try:
        status = path.stat()
      except OSError:
        raise StageError(f"{path}, an output of stage {name!r}, is missing; {again}.") from None
      if status.st_size != size:
        word = "truncated" if status.st_size < size else "longer than it was"
        raise StageError(f"{path}, an output of stage {name!r}, is {word} ({status.st_size} bytes "
                         f"instead of {size}); {again}.")
      if thorough or status.st_mtime_ns > written:
        suspects.append((path, digest))
    extra = set(_list_files(folder)) - set(files)
    if extra:
      raise StageError(f"{folder / min(extra)} was not written by stage {name!r}; remove it.")
    hashes = _hash_all([path for path, _ in suspects])
    for (path, digest), found in zip(suspects, hashes):
      if found != digest:
        raise StageError(f"{path}, an output of stage {name!r}, is corrupted: its content is not "
                         f"what the stage wrote; {again}.")


# ------------------------------------------------------------------------------------------ files


def versions() -> dict[str, str]:
  """Releases of Python and of the packages that results depend on."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _list_files(folder: Path) -> Iterator[str]:
  """A stage's own files below its folder, `/` between the parts, sorted."""
  ours = {base + end for base in (MANIFEST, _ATTEMPT) for end in ("", _WRITING)}
  found = (Path(directory, name).relative_to(folder).as_posix()
           for directory, _, names in os.walk(folder) for name in names)
  return iter(sorted(path for path in found if path not in ours))


def _hash_file(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def _hash_all(paths: Sequence[Path]) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(_hash_file, paths))


def _hash_files(folder: Path) -> dict[str, tuple[int, str]]:
  names = list(_list_files(folder))
  digests = _hash_all([folder / name for name in names])
  return {name: ((folder / name).stat().st_size, digest) for name, digest in zip(names, digests)}


def _plain(value: Any) -> Any:
  """NumPy and JAX scalars and arrays as JSON writes them."""
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(f"context.extra holds a {type(value).__name__}, which JSON cannot hold")


def _checksum(manifest: Mapping[str, Any]) -> str:
  body = {key: value for key, value in manifest.items() if key != "checksum"}
  text = json.dumps(body, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _load_manifest(folder: Path, name: str) -> dict[str, Any]:
  path = folder / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    intact = manifest["checksum"] == _checksum(manifest)
  except (OSError, ValueError, KeyError, TypeError):
    intact = False
  if not intact:
    raise StageError(f"{path}, the manifest of stage {name!r}, is damaged; delete the folder "
                     f"{folder} and run again to make it anew.")
  return manifest


def _write_json(path: Path, value: Any) -> None:
  _write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
  """Writes a file that is either there in full or not at all, also after a power failure."""
  temporary = path.with_name(path.name + _WRITING)
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
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


def _is_disk_full(error: BaseException) -> bool:
  """Whether an error, or a library's error that wraps it, says that nothing more can be written."""
  codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return any(getattr(item, "errno", None) in codes or "No space left on device" in str(item)
             or "Disk quota exceeded" in str(item) for item in _chain(error))


def _disk_full(error: BaseException, what: str, folder: Path) -> StageError:
  named = next((item.filename for item in _chain(error) if getattr(item, "filename", None)), folder)
  limit = any(getattr(item, "errno", None) == errno.EFBIG for item in _chain(error))
  try:
    free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
  except OSError:
    free = "free space unknown"
  why = "the file would exceed the size limit" if limit else "no space is left on the device"
  return StageError(f"{what}: {why} while writing {named} ({free}); make room and run the same "
                    "command again, it continues where it stopped.")
