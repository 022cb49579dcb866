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

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax.config.refusals import nearest
from lmops_jax.host import progress as progress_lib
from lmops_jax.host import records
from lmops_jax.host.manifests import (
  ATTEMPT,
  MANIFEST,
  StageError,
  difference,
  disk_full,
  is_disk_full,
  load_manifest,
)
from lmops_jax.mesh import agreement
from lmops_jax.stages.workdir import DISCARDED, PARTIAL, REPLACED, Workdir

_FORMAT = 1
_SAVE_SECONDS = 2.0
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*(/[A-Za-z0-9_][A-Za-z0-9_.=+-]*)*")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a run, with all that its output depends on; `skeleton.resolve_stages` makes it.

  Attributes:
    name: also its folder below the workdir; may hold `/` ("solve/pds").
    run: does the work; writes into `context.directory` only, reads `context.input(...)` only.
    inputs: names of the stages that it reads.
    settings: all that its output depends on besides its inputs, readable name to readable value.
    together: whether all processes of a job run it, as they must to compute on their devices; else
      the first one runs it while the others wait.
  """
  name: str
  run: Callable[["StageContext"], None]
  inputs: tuple[str, ...] = ()
  settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
  together: bool = True


class StageRecord(NamedTuple):
  """What became of a stage: seconds and flops are totals over all its attempts."""
  name: str
  seconds: float
  flops: float
  status: str  # "ran", "resumed" or "cached"
  reason: str


@dataclasses.dataclass(frozen=True)
class Group:
  """The processes of one job that share a workdir.

  Attributes:
    index: this process's. count: how many processes there are.
    barrier: waits for all of them at a label.
    check: called by all of them before a stage; raises if the job is asked to stop.
    council: lets them agree on what they run.
  """
  index: int = 0
  count: int = 1
  barrier: Callable[[str], None] = lambda label: None
  check: Callable[[], None] = lambda: None
  council: agreement.Council = dataclasses.field(default_factory=agreement.Council)


class StageContext:
  """What a running stage sees.

  Attributes:
    name: the stage's.
    directory: the partial folder to write into. It holds what an interrupted attempt with the same
      fingerprint left there.
    flops: floating-point operations, to be added to.
    extra: JSON-able values that the manifest keeps under "extra".
    settings: the stage's, readable name to readable value.
    group: the processes that run this stage together.
  """

  def __init__(self, name: str, directory: Path, inputs: Mapping[str, Path],
               write_log: Callable[[str], None], *, flops: float = 0.0,
               settings: Mapping[str, str] | None = None, group: Group | None = None):
    self.name, self.directory, self.flops = name, directory, flops
    self.settings = dict(settings or {})
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
    return load_manifest(self.input(name), name)

  @property
  def writes(self) -> bool:
    """Whether this process writes what the processes of the job have computed together."""
    return self.group.index == 0

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
    StageError: for a bad, repeated or nested name, an unknown input, or a circle.
  """
  by_name: dict[str, Stage] = {}
  for stage in stages:
    ends = tuple(part.endswith((PARTIAL, REPLACED, DISCARDED)) for part in stage.name.split("/"))
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


def identities(stages: Sequence[Stage], system: str) -> dict[str, dict[str, Any]]:
  """What determines each stage's output, by name: `fingerprint`, `settings`, `inputs`.

  The fingerprint hashes the system, the name, the settings and the inputs' fingerprints.
  """
  found: dict[str, dict[str, Any]] = {}
  for stage in ordered(stages):
    settings = {str(key): str(value) for key, value in stage.settings.items()}
    inputs = {name: found[name]["fingerprint"] for name in stage.inputs}
    what = {"format": _FORMAT, "system": system, "stage": stage.name, "settings": settings,
            "inputs": inputs}
    digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16)
    found[stage.name] = {
      "fingerprint": digest.hexdigest(), "settings": settings, "inputs": inputs}
  return found


# ------------------------------------------------------------------------------------- the runner


def run_stages(stages: Sequence[Stage], workdir: str | os.PathLike, *,
               only: Sequence[str] | None = None, system: str,
               group: Group | None = None, config: str | None = None) -> list[StageRecord]:
  """Runs the stages that are not finished, each after its inputs.

  Args:
    stages: all stages of the run, in any order.
    workdir: made if it does not exist; must be empty or belong to the same system.
    only: names or leading parts of names; other stages that these read must be finished.
    system: name of the system, kept in the workdir.
    group: this process among those of the job; all of them must call this with the same arguments,
      and all end if these differ.
    config: the resolved configuration, kept in the workdir as config.gin.

  Returns:
    One record for each chosen stage, in the order in which they ran.

  Raises:
    StageError: see the class; also if the processes of the job disagree. What a stage raises
      passes through with a note that names the stage, except that a full disk becomes a StageError
      that names the path.
  """
  all_stages = ordered(stages)
  identity = identities(all_stages, system)
  selected = chosen(all_stages, only)
  group, workdir = group or Group(), Path(workdir)
  plan = {}
  if group.count > 1:
    names = [stage.name for stage in selected]
    plan = agreement.plan_of(system, names, identity, config, workdir)
  if group.index > 0:
    group.council.agree(plan, workdir)
    group.barrier("open")
    return [_follow(workdir, stage, group) for stage in selected]
  with Workdir(workdir, system) as work:
    work.recover(identity)
    _require_inputs(work, selected, identity)
    with work.signed() as sign:
      group.council.agree({**plan, "sign": sign}, workdir)
    if config is not None:
      work.write_config(config)
    work.log(f"workdir: {work.path}")
    group.barrier("open")
    return [_run_one(work, stage, identity, group) for stage in selected]


def read_manifest(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """The manifest of a finished stage: fingerprint, settings, inputs, versions, seconds, flops,
  files (path to size and hash), extra.

  Raises:
    StageError: if the stage is not finished or its manifest is damaged.
  """
  folder = Path(workdir) / name
  if not (folder / MANIFEST).is_file():
    raise StageError(f"stage {name!r} is not finished in {workdir}; run it first.")
  return load_manifest(folder, name)


def _require_inputs(work: Workdir, selected: Sequence[Stage], identity) -> None:
  """Refuses a partial run whose other inputs are missing or out of date."""
  names = {stage.name for stage in selected}
  for stage in selected:
    for name in stage.inputs:
      if name in names:
        continue
      finished = work.finished(name)
      if finished is None:
        raise StageError(f"stage {stage.name!r} reads stage {name!r}, which is not finished in "
                         f"{work.path}; run {name!r} first, or run all stages.")
      if finished["fingerprint"] != identity[name]["fingerprint"]:
        raise StageError(f"stage {stage.name!r} reads stage {name!r}, which is out of date "
                         f"({difference(identity[name], finished)}); run {name!r} first, or run "
                         "all stages.")


def _run_one(work: Workdir, stage: Stage, identity, group: Group) -> StageRecord:
  """Runs a stage, or finds that there is nothing to do, in the process that decides."""
  name, own = stage.name, identity[stage.name]
  group.check()
  finished = work.finished(name)
  cached = finished is not None and finished["fingerprint"] == own["fingerprint"]
  adopted = None if cached else work.adopt(name, own["fingerprint"])
  if cached or adopted is not None:
    if cached:
      work.verify(name, finished, thorough=False)
    manifest = finished if cached else adopted
    for label in ("ready", "done", "visible"):
      group.barrier(f"{label} {name}")
    seconds = progress_lib.format_seconds(manifest["seconds"])
    work.log(f"{name}: finished earlier in {seconds}" if cached else
             f"{name}: was complete when it was interrupted")
    return StageRecord(name, manifest["seconds"], manifest["flops"],
                       "cached" if cached else "resumed", "" if cached else "interrupted earlier")

  inputs = {}
  for needed in stage.inputs:
    work.verify(needed, work.finished(needed), thorough=True)
    inputs[needed] = work.final(needed)
  attempt, reason = work.begin(name, own, finished)
  resumed = attempt["attempts"] > 1
  group.barrier(f"ready {name}")
  work.log(f"{name}: {'resuming' if resumed else 'running'} ({reason})")
  context = StageContext(name, work.partial(name), inputs, work.log, flops=attempt["flops"],
                         settings=stage.settings, group=group)
  try:
    with _Attempt(context, attempt) as running:
      stage.run(context)
    group.barrier(f"done {name}")
    seconds, flops = running.seconds(), float(context.flops)
    work.finish(name, own, attempt, seconds, flops, context.extra)
  except Exception as error:
    if is_disk_full(error):
      raise disk_full(error, f"stage {name}", context.directory) from error
    error.add_note(f"in stage {name}")
    raise
  group.barrier(f"visible {name}")
  work.log(f"{name}: done in {progress_lib.format_seconds(seconds)}")
  return StageRecord(name, seconds, flops, "resumed" if resumed else "ran", reason)


def _follow(workdir: Path, stage: Stage, group: Group) -> StageRecord:
  """A stage in the other processes of a job: the first one's decision shows in the files."""
  directory = workdir / (stage.name + PARTIAL)
  group.check()
  group.barrier(f"ready {stage.name}")
  runs = stage.together and (directory / ATTEMPT).exists()
  if runs:
    inputs = {name: workdir / name for name in stage.inputs}
    stage.run(StageContext(stage.name, directory, inputs, lambda text: None,
                           settings=stage.settings, group=group))
  group.barrier(f"done {stage.name}")
  group.barrier(f"visible {stage.name}")
  manifest = read_manifest(workdir, stage.name)
  return StageRecord(stage.name, manifest["seconds"], manifest["flops"],
                     "ran" if runs else "cached", "")


class _Attempt:
  """Keeps the seconds and flops of a running attempt on disk, in case it is killed."""

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
      records.write(self._context.directory / ATTEMPT, state)

  def __enter__(self) -> "_Attempt":
    self._start, self._end = time.monotonic(), None
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._end = time.monotonic()
    self._stop.set()
    self._thread.join()
    self._save()
