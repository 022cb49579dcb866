"""What the processes of one job settle before their first stage: that all of them run the same.

Each process resolves its own gin files, arguments and packages, and only the first one's reach the
manifests. So before any stage the first process tells what it would run, every other one compares
that with its own plan, and all go on or all end, with the same sentence. The texts go through the
coordination service of jax, which, unlike a collective, needs no common program.

A process that cannot start (a typo in its command, a missing file) says so in the same place, and
the others end with what it said instead of waiting for it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.host.hashing import digest
from lmops_jax.host.manifests import StageError, hash_file, versions
from lmops_jax.host.words import shortened
from lmops_jax.mesh import processes

_TELL_SECONDS = 90  # to start, to join and to tell, for a process that ends before it has joined
_SHOWN = 120  # characters of a value in a message

# Options of jax and XLA that change numbers, or the program that is compiled.
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
            "jax_threefry_partitionable", "jax_numpy_dtype_promotion")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OF_A_PROCESS = ("--xla_dump", "--xla_force_host_platform_device_count")  # may differ


class Council:
  """One process among those of its job, until all have agreed.

  Args:
    index: this process's. count: how many processes there are.
    put: leaves a text under a key, once.
    get: `(key, whose) -> text`, waiting until that process has left it.
  """

  def __init__(self, index: int = 0, count: int = 1,
               put: Callable[[str, str], None] = processes.put_text,
               get: Callable[[str, str], str] = processes.get_text):
    self._index, self._count, self._put, self._get = index, count, put, get
    self._subject = "start" if count > 1 else None  # what is to be settled next

  def start(self) -> None:
    """Meets the others before a device is touched: there each would wait for those that are gone.

    Raises:
      StageError: if a process could not start; the same sentence in all.
    """
    self._settle("start", "", then="plan")

  def agree(self, plan: Mapping[str, Any], workdir: Path) -> None:
    """Compares what the processes would run; all of them call it.

    Args:
      plan: JSON-able, see `plan_of`; the first process's also has `sign`, the name of a file that
        it has just made in its workdir.
      workdir: this process's.

    Raises:
      StageError: naming the first difference and the process that has it; the same in all.
    """
    if self._subject is None:
      return
    objection = ""
    if self._index == 0:
      self._put("plan", json.dumps(plan))
    elif text := self._get("plan", "process 0"):
      first = json.loads(text)
      objection = _difference(first, plan, self._index) or _elsewhere(first, workdir, self._index)
    self._settle("plan", objection, then=None)

  def refuse(self, why: str) -> None:
    """Ends the others, for a process that ends before all have agreed; later it does nothing."""
    subject, self._subject = self._subject, None
    if subject is None:
      return
    text = f"process {self._index} of this job cannot start: {why}"
    processes.end_together()
    if self._index:
      self._put(f"{subject}/{self._index}", text)
      return
    if subject == "plan":
      self._put("plan", "")  # the others wait for it first
    self._put(f"{subject}/decision", text)

  def _settle(self, subject: str, objection: str, then: str | None) -> None:
    """Raises the first objection of any process, in all of them."""
    if self._subject is None:
      return
    if self._index:
      self._put(f"{subject}/{self._index}", objection)
      decision = self._get(f"{subject}/decision", "process 0")
    else:
      others = (self._get(f"{subject}/{i}", f"process {i}") for i in range(1, self._count))
      decision = objection or next(filter(None, others), "")
      self._put(f"{subject}/decision", decision)
    self._subject = None if decision else then
    if decision:
      processes.end_together()
      raise StageError(decision)


def refuse_before_joining(why: str) -> None:
  """As `Council.refuse`, for a process that ends before it has joined its job.

  Another process of this machine joins in its place: jax ends a process that waits in vain for the
  others, with a trace of its own.
  """
  program = "import sys; from lmops_jax.mesh import agreement; agreement.tell(sys.argv[1])"
  try:
    subprocess.run([sys.executable, "-c", program, why], timeout=_TELL_SECONDS, check=False,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  except (OSError, subprocess.TimeoutExpired):
    pass  # nobody came: there is nobody to tell


def tell(why: str) -> None:
  """Joins the job that the environment tells of, only to refuse."""
  from lmops_jax.mesh import meshes

  if meshes.initialize_distributed():
    Council(*processes.place()).refuse(why)
    processes.leave_others(0)


# -------------------------------------------------------------------------------- what is compared


def plan_of(system: str, stages: Sequence[str], identity: Mapping[str, Any], config: str | None,
            workdir: Path) -> dict[str, Any]:
  """All that the processes of a job must have in common, by kind.

  Args:
    stages: names of those that will run, in order.
    identity: what determines each stage's output, see `pipeline.identities`.
    config: the resolved configuration as gin text.
  """
  lines = (config or "").splitlines()
  modules = [line.removeprefix("import ") for line in lines if line.startswith("import ")]
  return {
    "versions": {**versions(), "code of lmops_jax": _code()},
    "modules": {f"the module {name}": _module(name) for name in modules},
    "environment": _environment(),
    "settings": {"the system": system, "the list of stages": ", ".join(stages), **_bound(lines)},
    "data": {f"{key} of stage {name}": value for name, own in identity.items()
             for key, value in own["settings"].items()},
    "workdir": str(Path(workdir).absolute()),
  }


_ADVICE = {
  "versions": "install the same releases on all hosts",
  "modules": "install the same files on all hosts",
  "environment": "start all of them with the same environment variables",
  "settings": "start all of them with the same gin files and bindings",
  "data": "give all of them the same files and bindings",
}


def _difference(first: Mapping[str, Any], own: Mapping[str, Any], index: int) -> str | None:
  """The first thing that two plans do not have in common, as a sentence."""
  for kind, advice in _ADVICE.items():
    theirs, ours = first[kind], own[kind]
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
      values = [side.get(name, "not set") for side in (theirs, ours)]
      if values[0] != values[1]:
        there, here = (shortened(value, _SHOWN) for value in values)
        return (f"the processes of this job disagree: {name} is {there} in process 0 and {here} "
                f"in process {index}; {advice}.")
  return None


def _elsewhere(first: Mapping[str, Any], workdir: Path, index: int) -> str:
  """Says that a process does not see the folder in which the first one works."""
  if (workdir / first["sign"]).exists():
    return ""
  own = str(Path(workdir).absolute())
  same = "the same path on another disk" if own == first["workdir"] else "another folder"
  return (f"the processes of this job disagree: the workdir is {first['workdir']} in process 0 and "
          f"{own}, {same}, in process {index}; give all of them one --workdir, on a file system "
          "that all hosts share.")


def _bound(lines: Sequence[str]) -> dict[str, str]:
  """`{"optim.sgd.learning_rate": "0.1"}` from lines of resolved gin; `run.stages` is left out.

  Which stages run is compared by their names: `solve` and `solve/pds` may be the same.
  """
  bound: dict[str, str] = {}
  block = name = ""
  for line in lines:
    if line.startswith("  ") and block:
      key, equals, value = line.strip().partition(" = ")
      if equals and not line.startswith("   "):
        name = f"{block}.{key}"
        bound[name] = value
      elif name:  # a value of several lines goes on
        bound[name] = f"{bound[name]} {line.strip()}"
    elif line.startswith("# ") and " is " in line:  # a value that gin cannot write
      key, _, value = line.removeprefix("# ").partition(" is ")
      bound[key] = value
    else:
      block = line.removesuffix(":") if line.endswith(":") else ""
  bound.pop("run.stages", None)
  return bound


def _environment() -> dict[str, str]:
  found = {name: _flags(os.environ.get(name, "")) for name in _FLAGS}
  if "jax" in sys.modules:
    import jax
    found |= {name: str(getattr(jax.config, name, "not known")) for name in _OPTIONS}
    found["the platform"] = jax.default_backend()
  return found


def _flags(text: str) -> str:
  return " ".join(sorted(flag for flag in text.split() if not flag.startswith(_OF_A_PROCESS)))


def _code() -> str:
  """Hash of this package's own source, which may have been changed without a new version."""
  root = Path(__file__).parents[1]
  return _digest(sorted(root.rglob("*.py")), root)


def _module(name: str) -> str:
  """Hash of the file or folder of a module that gin files import."""
  file = getattr(sys.modules.get(name), "__file__", None)
  if file is None or name.partition(".")[0] == "lmops_jax":
    return "as installed"
  path = Path(file)
  root = path.parent
  return _digest(sorted(root.rglob("*.py")) if path.name == "__init__.py" else [path], root)


def _digest(paths: Sequence[Path], root: Path) -> str:

  parts: Iterator[str] = (f"{path.relative_to(root).as_posix()} {hash_file(path)}"
                          for path in paths)
  return digest(["\n".join(parts)], size=8)
