"""Every run of a test here fails if a stage reads a setting that neither it nor an input declares.

Else a changed binding would leave what that stage wrote, see `skeleton`. Settings are watched while
a stage runs; what a system binds to a stage's function beforehand is not seen.
"""

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import pytest

from lmops_jax.config import resolve
from lmops_jax.stages import pipeline, skeleton


@pytest.fixture(scope="session")
def run_stages():
  """`(gin file, workdir, *bindings, only=None, change=None) -> system, statuses by stage`.

  `only` names stages; `change` makes another system of the one that the file describes.
  """
  def run(file, workdir, *bindings, only=None, change=None):
    resolved = resolve.load([str(file)], bindings)
    system = resolved.run().system
    system = system if change is None else change(system)
    stages = skeleton.resolve_stages(system, system.stages(None), resolved.tree.child("system"))
    records = pipeline.run_stages(stages, workdir, only=only, system=system.name)
    return SimpleNamespace(
      system=system, statuses={record.name: record.status for record in records})

  return run


@pytest.fixture(scope="session", autouse=True)
def watched_stages():
  resolve_stages = skeleton.resolve_stages

  def watched(system, stages, settings):
    covered = {}
    for stage in stages:  # inputs come first
      covered[stage.name] = set(stage.reads).union(*(covered[name] for name in stage.inputs))
    runs = {stage.name: _watching(system, stage, covered[stage.name].union(stage.checks))
            for stage in stages}
    return [dataclasses.replace(stage, run=runs[stage.name])
            for stage in resolve_stages(system, stages, settings)]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(skeleton, "resolve_stages", watched)
    yield


def _watching(system, stage, declared):
  def run(context):
    with recorded(system) as reads:
      stage.run(context)
    undeclared = sorted(name for names in reads.values() for name in names[:1]
                        if not any(is_covered(name, by) for name in names for by in declared))
    assert not undeclared, f"stage {stage.name!r} reads {undeclared} and declares {stage.reads}"
  return run


def is_covered(name, by):
  """Whether a stage that declares `by` may read `name`: it is `by` itself, or lies below it."""
  by = by.removesuffix(".fingerprint")
  return re.match(re.escape(by) + r"($|[.\[])", name) is not None


@contextlib.contextmanager
def recorded(system):
  """Collects which settings of a system are read: `{(part, field): names it goes by}`."""
  names, parts = {}, {}

  def register(name, value):
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      parts[id(value)] = value
      names.setdefault(id(value), []).append(name)
      for field in dataclasses.fields(value):
        register(f"{name}.{field.name}".lstrip("."), getattr(value, field.name, None))
    elif isinstance(value, list | tuple):
      for i, item in enumerate(value):
        register(f"{name}[{i}]", item)

  register("", system)
  fields = {kind: {f.name for f in dataclasses.fields(kind)} for kind in map(type, parts.values())}
  reads = {}

  def holds_parts(value):
    items = value if isinstance(value, list | tuple) else [value]
    return any(id(item) in parts for item in items)

  def watch(kind):
    plain = kind.__getattribute__

    def read(self, name):
      value = plain(self, name)
      if name in fields[kind] and id(self) in names and not holds_parts(value):
        reads[id(self), name] = [f"{n}.{name}".lstrip(".") for n in names[id(self)]]
      return value

    return read

  with contextlib.ExitStack() as stack:
    for kind in fields:
      own = "__getattribute__" in vars(kind)
      assert not own, kind
      kind.__getattribute__ = watch(kind)
      stack.callback(delattr, kind, "__getattribute__")
    yield reads
