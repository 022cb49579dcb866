"""Gin files and command-line bindings, resolved into one checked tree of settings.

`load` reads gin files and bindings with gin's own parser and registry, then walks statically from
the root configurable `run` through references and macros, scopes included. The walk gives

  * the resolved tree (`Resolved.tree`): every value bound or left at its default,
  * its text in gin syntax (`Resolved.text`), which parses again and builds the same objects,
  * the objects themselves (`Resolved.build`), constructed from that tree and from nothing else,
  * and the proof that every macro and every binding is used by something.

What nothing uses is refused with the nearest valid name. A binding of a file counts as used when it
was used at any time from its own line on: a file that swaps the optimizer may include a file that
configures the other one. A binding of the command line has to take effect in the end.

Differences from calling gin itself: no global state is left behind (gin's own configuration stays
untouched, so register with `@gin.register`; a `@gin.configurable` called from Python would see no
bindings), a reference without `()` takes its scope where it is written, not where it is called, and
`from __gin__ import dynamic_registration` is refused.
"""

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import gin
from gin import config as gin_config

from lmops_jax.config import gin_files
from lmops_jax.config.gin_source import (
  MACRO,
  Binding,
  Reference,
  Source,
  in_force,
  name_of,
  written,
)
from lmops_jax.config.gin_text import leaves, with_leaves
from lmops_jax.config.printing import Printer
from lmops_jax.config.refusals import ConfigError, nearest
from lmops_jax.config.registry import ROOT, parameters_of, short_name
from lmops_jax.config.setting_types import Distinct, NonEmpty, Text, component
from lmops_jax.config.settings import Constant, Settings


class Run(NamedTuple):
  """What a gin file describes: a system, the mesh that it runs on, and the stages wanted."""
  system: Any
  mesh: Any
  stages: tuple[str, ...] | None


@runtime_checkable
class System(Protocol):
  """What a run needs of a system, besides its `name`."""

  def stages(self, partitioner: Any) -> Sequence[Any]:
    """The stages, see `stages.skeleton`.

    Args:
      partitioner: places parameters and batches on the mesh; None is one device.
    """

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures that the terminal shows at the end, from the report's summary.json."""


@runtime_checkable
class Mesh(Protocol):
  """A description of a mesh."""

  def build(self) -> Any:
    """The partitioner on the devices that are there."""


@component(module="lmops")
def run(
  system: Any, mesh: Mesh | None = None,
  stages: Annotated[Sequence[Text], NonEmpty, Distinct] | Text | None = None,
) -> Run:
  """The root of each configuration.

  Args:
    system: the research system, for example `@pds.Pipeline()`.
    mesh: a mesh description with `build()`, for example `@mesh.make()`; None for one device.
    stages: names or prefixes of the stages to run, or one of them as a string; None for all.
  """
  if isinstance(stages, str):
    stages = (stages,)
  return Run(system, mesh, None if stages is None else tuple(stages))


# -------------------------------------------------------------------------------------- walking


class _Index:
  """Bindings by (scope, selector), and the ones that apply to a call in nested scopes."""

  def __init__(self, bindings: Iterable[Binding]):
    self._by_call: dict[tuple[str, str], list[Binding]] = {}
    for binding in bindings:
      self._by_call.setdefault((binding.scope, binding.selector), []).append(binding)

  def applying(self, scopes: tuple[str, ...], selector: str) -> Iterator[Binding]:
    """From the outermost scope (none) to the innermost, as gin merges them."""
    for depth in range(len(scopes) + 1):
      yield from self._by_call.get(("/".join(scopes[:depth]), selector), ())


def _reachable(bindings: Iterable[Binding]) -> set[Binding]:
  """The bindings of all calls that the root reaches through references."""
  index = _Index(bindings)
  seen, found, pending = set(), set(), [((), ROOT)]
  while pending:
    call = pending.pop()
    if call in seen:
      continue
    seen.add(call)
    for binding in index.applying(*call):
      found.add(binding)
      pending += [(reference.scopes or call[0], reference.selector)
                  for reference in leaves(binding.value) if isinstance(reference, Reference)]
  return found


def _is_used(binding: Binding, bindings: Sequence[Binding]) -> bool:
  """Whether the root reaches a file's binding through those in force at its line or read later."""
  at = bindings.index(binding)
  return binding in _reachable([*in_force(bindings[:at + 1]), *bindings[at + 1:]])


class _Resolver:
  """Follows the bindings that are in force at the end, from the root down."""

  def __init__(self, bindings: list[Binding], owed: str = "refused"):
    self._all = bindings
    self._owed = owed
    self._index = _Index(in_force(bindings))
    self._stack: list[tuple[tuple[str, ...], str]] = []
    self.effective: set[Binding] = set()
    self.calls: set[tuple[tuple[str, ...], str]] = set()
    self.selectors: set[str] = set()
    self.valid_names: set[str] = set()

  def call(self, reference: Reference, outer: tuple[str, ...]) -> Any:
    scopes = reference.scopes or outer
    node = (scopes, reference.selector)
    if node in self._stack:
      raise ConfigError(f"{reference.where}: {name_of(reference)} refers to itself; break the "
                        "circle of references.")
    self._stack.append(node)
    self.calls.add(node)
    bound: dict[str, Binding] = {}
    for binding in self._index.applying(*node):
      bound[binding.param] = binding
    value = (self._macro if reference.selector == MACRO else self._settings)(
      reference, scopes, bound)
    self._stack.pop()
    return value

  def _macro(self, reference, scopes, bound):
    name = "/".join(reference.scopes)
    if "value" not in bound:
      names = {b.scope for b in self._all if b.selector == MACRO}
      raise ConfigError(f"{reference.where}: the macro %{name} is defined nowhere"
                        f"{nearest(name, names)}")
    self.valid_names.add(name)
    return self._value(bound["value"], scopes)

  def _settings(self, reference, scopes, bound):
    configurable = gin_config._REGISTRY[reference.selector]
    short = short_name(reference.selector)
    names, _ = parameters_of(configurable)
    self.selectors.add(reference.selector)
    self.valid_names.update(f"{short}.{name}" for name in names)
    params, defaults = {}, set()
    for name in [*names, *sorted(set(bound) - set(names))]:
      if name in bound:
        params[name] = self._value(bound[name], scopes)
      elif names[name].default is not inspect.Parameter.empty:
        params[name] = names[name].default
        defaults.add(name)
        if params[name] is gin.REQUIRED:
          raise ConfigError(self._missing(reference, short, name))
      elif reference.called:
        raise ConfigError(self._missing(reference, short, name))
    return Settings(short, params, frozenset(defaults), reference.scopes, reference.called,
                    configurable.wrapped)

  def _missing(self, reference: Reference, short: str, name: str) -> str:
    if reference.selector == ROOT:
      return (f"no {short}.{name} is bound, so there is nothing to run; name a file that binds it, "
              "such as gin/pds/default.gin.")
    return (f"{reference.where}: {short} needs a value for {name!r}; bind {short}.{name}, for "
            f"example with --gin.{short}.{name}=VALUE.")

  def _value(self, binding: Binding, scopes: tuple[str, ...]) -> Any:
    self.effective.add(binding)

    def resolve(leaf):
      if isinstance(leaf, Reference):
        return self.call(leaf, scopes)
      if isinstance(leaf, Constant) and leaf.value is gin.REQUIRED:
        if self._owed == "named":
          return f"<{binding.spelling}>"
        raise ConfigError(f"{binding.where}: {binding.spelling} must be given; add "
                          f"--gin.{binding.spelling}=VALUE.")
      return leaf

    return with_leaves(binding.value, resolve)


# --------------------------------------------------------------------------------------- result


@dataclasses.dataclass(frozen=True)
class Resolved:
  """A checked configuration.

  Attributes:
    tree: `Settings` of the root `run`; the system's are `tree.child("system")`.
    files: the gin files that were named, as `gin_files.display` writes them.
    imports: modules that the files import.
    macros: the macros in use with their values as text; what `--gin.NAME=VALUE` can set.
  """
  tree: Settings
  files: tuple[str, ...] = ()
  imports: tuple[str, ...] = ()
  macros: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def settings(self) -> Settings:
    """The system's own settings."""
    return self.tree.child("system")

  def text(self) -> str:
    """The configuration in gin syntax: macros resolved, defaults written out, deterministic.

    Parsing the text gives the same tree, which builds the same objects. A default that gin cannot
    write stands in a comment.
    """
    imports = "".join(f"import {module}\n" for module in self.imports)
    printer = Printer(self.tree)
    text = "\n".join([imports, *(block + "\n" for block in printer.blocks())]).lstrip("\n")
    source = Source()
    source.read_text(text)
    again = _Resolver(source.bindings).call(Reference((), ROOT, True, "text"), ())
    assert Printer(again).whole == printer.whole, "the text does not parse back to itself"
    return text

  def build(self) -> Any:
    """Constructs the system object, and with it everything that it holds."""
    return self.run().system

  def run(self) -> Run:
    """Constructs all that the root holds: the system, the mesh, the wanted stages."""
    return self.tree.build()


def load(files: Sequence[str | os.PathLike], bindings: Sequence[str] = (), *,
         owed: str = "refused") -> Resolved:
  """Reads gin files, then bindings, and resolves them from the root `run`.

  Args:
    files: gin files in the order in which they apply; `gin_files.find` says where they are sought.
    bindings: statements such as `"TRAIN_STEPS=400"` or `"OPTIMIZER=@optim.sgd()"`, as they follow
      `--gin.` on the command line; later ones win. `"import my_module"` registers what it holds.
    owed: what becomes of a required value that is not given: "refused", or "named": the text
      `<NAME>` takes its place, for callers that want sizes and open no path.

  Raises:
    ConfigError: an unknown file, name, parameter or macro; a value that is not gin; a missing
      value; a macro or binding that nothing uses. One sentence, with the nearest valid name.
  """
  if not files:
    raise ConfigError("no gin file is given; name one, such as gin/pds/default.gin.")
  source = Source()
  paths = [gin_files.find(os.fspath(file)) for file in files]
  for path in paths:
    source.read_file(path)
  source.read_bindings(bindings)

  resolver = _Resolver(source.bindings, owed)
  tree = resolver.call(Reference((), ROOT, True, gin_files.display(paths[-1])), ())
  last = set(in_force(source.bindings))
  for binding in source.bindings:
    if binding in resolver.effective or binding.from_command_line and binding not in last:
      continue
    if binding.from_command_line or not _is_used(binding, source.bindings):
      raise ConfigError(_unused_message(binding, resolver))
  in_use = {b.scope: written(b.value) for b in source.bindings
            if b.selector == MACRO and b in resolver.effective}
  names = dict.fromkeys(b.scope for b in source.bindings if b.scope in in_use)
  macros = {name: in_use[name] for name in names}  # in the order of their first definition
  return Resolved(tree, tuple(map(gin_files.display, paths)), tuple(sorted(source.imports)), macros)


def _unused_message(binding: Binding, resolver: _Resolver) -> str:
  """Why a binding is refused, in one sentence with the nearest name that would have been used."""
  name = binding.spelling
  place = binding.where if binding.from_command_line else f"{binding.where}: {name}"
  macros = {n for n in resolver.valid_names if "." not in n}
  if binding.selector == MACRO:
    # CAPITALS are macros by convention; anything else may be a parameter without its owner.
    near = nearest(name, macros if macros and name.isupper() else resolver.valid_names)
    return f"{place} has no effect, since nothing refers to %{name}{near}"
  short = short_name(binding.selector)
  if binding.selector not in resolver.selectors:
    near = nearest(f"{short}.{binding.param}", resolver.valid_names - macros)
    return f"{place} has no effect, since nothing in this run uses {short}{near}"
  if f"{short}.{binding.param}" in resolver.valid_names and not binding.scope:
    return (f"{place} has no effect, since every use of {short} binds {binding.param} in its own "
            "scope; bind it with that scope in front.")
  scopes = {f"{'/'.join(scopes)}/{short}.{binding.param}" if scopes else f"{short}.{binding.param}"
            for scopes, selector in resolver.calls if selector == binding.selector}
  return f"{place} has no effect, since {short} is not used in that scope{nearest(name, scopes)}"
