"""What every system shares: stages that say what they read.

A system is a frozen dataclass with a `name`, `stages(partitioner)` and `table(summary)`. Its stages
name the settings that they read; `resolve_stages` looks those up in the resolved
configuration and asks what was built from them for its fingerprint, so that no system assembles by
hand what a stage depends on:

  Stage("train", self._train, inputs=("prepare",), reads=("model", "optimizer"), seed=3)

A dotted name leads from the system down, as in `methods[0]` or `model.width`. A name that ends in
`.fingerprint` reads only what a component is made from, not how it was bound. An item of a list
goes by the singular of the list's name, whatever its place: a further method leaves the stages of
the others as they are.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lmops_jax.config.refusals import nearest
from lmops_jax.config.settings import SINGLETON, Settings
from lmops_jax.host.manifests import StageError
from lmops_jax.stages import pipeline

_FINGERPRINT = "fingerprint"
_STEP = re.compile(r"(\w+)|\[(\d+)\]")
_ABSENT = object()
_ITEM = re.compile(r"s?\[\d+\]")


@runtime_checkable
class Fingerprinted(Protocol):
  """A component made from more than its settings: files, weights, a program."""

  def fingerprint(self) -> str:
    """A text that differs if what it is made from does; empty if its settings say everything."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a system.

  Attributes:
    name: also its folder below the workdir; may hold `/` ("solve/pds").
    run: does the work; writes into `context.directory` only, reads `context.input(...)` only.
    inputs: names of the stages that it reads.
    reads: dotted names of the settings that it reads, see the module.
    seed: the stage's own, if it does not stand among the settings.
    together: whether all processes of a job run it, as they must to compute on their devices; else
      the first one runs it while the others wait.
    result: what the last lines of a run call its folder; empty if they leave it out.
    checks: dotted names of settings that it reads only to refuse early, or to announce, what a
      later stage will refuse. What it writes must not depend on them.
  """
  name: str
  run: Callable[[pipeline.StageContext], None]
  inputs: tuple[str, ...] = ()
  reads: tuple[str, ...] = ()
  seed: int | None = None
  together: bool = True
  result: str = ""
  checks: tuple[str, ...] = ()


def resolve_stages(
  system: Any, stages: Sequence[Stage], settings: Settings,
) -> list[pipeline.Stage]:
  """The stages with all that their outputs depend on, for `pipeline.run_stages`.

  Args:
    system: what was built from `settings`.
    stages: the system's.
    settings: the resolved settings of the system.

  Raises:
    StageError: if a stage reads a name that the system does not have.
    ValueError: if a component refuses to be fingerprinted, such as for a file that cannot be read.
  """
  @functools.cache  # many stages read the same, and a fingerprint may read a whole corpus
  def read(name: str) -> dict[str, str] | None:
    return _read(system, settings, name)

  resolved = []
  for stage in stages:
    found: dict[str, str] = {}
    for name in stage.reads:
      own = read(name)
      if own is None:
        raise StageError(f"stage {stage.name!r} reads {name!r}, which {settings.selector} does "
                         f"not have{nearest(name, settings.params)}")
      found |= own
    if stage.seed is not None:
      found["seed"] = str(stage.seed)
    resolved.append(pipeline.Stage(stage.name, stage.run, stage.inputs, found, stage.together))
  return resolved


def fingerprints(name: str, value: Any) -> dict[str, str]:
  """Fingerprints of a component, or else of those that its fields hold, by their dotted names.

  A component with `fingerprint()` speaks for what it holds. Fields of dataclasses and items of
  lists and mappings are looked through.
  """
  if isinstance(value, Fingerprinted):
    found = value.fingerprint()
    return {_join(name, _FINGERPRINT): found} if found else {}
  return {key: found for part, item in _parts(name, value)
          for key, found in fingerprints(part, item).items()}


def _read(system: Any, settings: Settings, name: str) -> dict[str, str] | None:
  """What a stage that reads a dotted name depends on; None if the system has no such name."""
  called = _ITEM.sub("", name)
  steps = [int(index) if index else word for word, index in _STEP.findall(name)]
  if name.endswith("." + _FINGERPRINT):
    part = _built(system, steps[:-1])
    return None if part is _ABSENT else fingerprints(called.removesuffix("." + _FINGERPRINT), part)
  value: Any = settings
  try:
    for step in steps:
      value = _own(value)[step]
  except (KeyError, IndexError, TypeError):
    return None
  value = _own(value)
  if isinstance(value, Settings):
    bound = {f"{called}.{key}": text for key, text in value.flatten().items()}
  else:
    bound = dataclasses.replace(settings, params={called: value}).flatten()
    del bound["component"]  # the system's own
  return bound | fingerprints(called, _built(system, steps))


def _own(value: Any) -> Any:
  """The call that a singleton shares, or the value itself."""
  is_shared = isinstance(value, Settings) and value.selector == SINGLETON
  return value.params["constructor"] if is_shared else value


def _built(value: Any, steps: Sequence[str | int]) -> Any:
  """What lies at a path below a system, `_ABSENT` if a part does not keep what it was given."""
  for step in steps:
    value = value[step] if isinstance(step, int) else getattr(value, step, _ABSENT)
  return value


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    for field in dataclasses.fields(value):
      yield _join(name, field.name), getattr(value, field.name)
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield f"{name}[{key!r}]", item
  elif isinstance(value, list | tuple):
    for i, item in enumerate(value):
      yield f"{name}[{i}]", item


def _join(name: str, part: str) -> str:
  return f"{name}.{part}" if name else part
