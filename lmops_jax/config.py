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
import importlib
import inspect
import io
import math
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
from gin import config as gin_config
from gin import config_parser

from lmops_jax import gin_files
from lmops_jax.settings import (
  ConfigError,
  Constant,
  Printer,
  Settings,
  nearest,
  plain_text,
  same_values,
)

ROOT = "lmops.run"
_MACRO, _ALWAYS = "gin.macro", math.inf


class Run(NamedTuple):
  """What a gin file describes: a system, the mesh that it runs on, and the stages wanted."""
  system: Any
  mesh: Any
  stages: tuple[str, ...] | None


@gin.register(module="lmops")
def run(system, mesh=None, stages=None) -> Run:
  """The root of each configuration.

  Args:
    system: the research system, for example `@pds.Pipeline()`.
    mesh: a mesh description with `build()`, for example `@mesh.make()`; None for one device.
    stages: names or prefixes of the stages to run, or one of them as a string; None for all.
  """
  if isinstance(stages, str):
    stages = (stages,)
  if stages is not None and not (stages and all(isinstance(s, str) for s in stages)):
    raise ValueError(f"stages={stages!r} is not a list of stage names; give names such as "
                     '["select"] or None for all.')
  return Run(system, mesh, None if stages is None else tuple(stages))


# -------------------------------------------------------------------------------------- parsing


class _Reference(NamedTuple):
  """`@scopes/selector` or `@scopes/selector()`; a macro is a reference to `gin.macro`."""
  scopes: tuple[str, ...]
  selector: str
  called: bool
  where: str


@dataclasses.dataclass
class _Binding:
  """One statement `scope/selector.param = value`, with the time span in which it is in force."""
  scope: str
  selector: str
  param: str
  value: Any
  where: str
  time: int
  from_command_line: bool
  superseded: float = _ALWAYS

  @property
  def spelling(self) -> str:
    if self.selector == _MACRO:
      return self.scope
    prefix = f"{self.scope}/" if self.scope else ""
    return f"{prefix}{_short(self.selector)}.{self.param}"


def _short(selector: str) -> str:
  """The selector as people write it: `run` for the root, else gin's shortest unambiguous one that
  keeps the module (`optim.sgd`)."""
  if selector == ROOT:
    return "run"
  minimal = gin_config._REGISTRY.minimal_selector(selector)
  wanted = ".".join(selector.split(".")[-2:])
  return wanted if len(minimal) < len(wanted) else minimal


def _selectors() -> list[str]:
  return [_short(s) for s, _ in gin_config._REGISTRY.items() if not s.startswith("gin.")]


def _configurable(selector: str, where: str) -> gin_config.Configurable:
  matches = gin_config._REGISTRY.matching_selectors(selector)
  if len(matches) == 1:
    return gin_config._REGISTRY[matches[0]]
  if matches:
    raise ConfigError(f"{where}: {selector!r} may be any of {', '.join(sorted(matches))}; "
                      "write one of these in full.")
  raise ConfigError(f"{where}: nothing is registered as {selector!r}"
                    f"{nearest(selector, _selectors())}")


def _parameters(configurable: gin_config.Configurable) -> tuple[dict[str, inspect.Parameter], bool]:
  """Parameters that gin may bind, in the order of the signature, and whether any name will do."""
  parameters = inspect.signature(configurable.wrapped).parameters.values()
  named = {p.name: p for p in parameters
           if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
           and not (configurable.allowlist and p.name not in configurable.allowlist)
           and not (configurable.denylist and p.name in configurable.denylist)}
  return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


class _Delegate(config_parser.ParserDelegate):
  """Notes references with their place; `_checked` looks their names up afterwards."""

  def __init__(self, where: Callable[[], str]):
    self._where = where

  def configurable_reference(self, scoped_configurable_name, evaluate):
    *scopes, selector = scoped_configurable_name.split("/")
    return _Reference(tuple(scopes), selector, evaluate, self._where())

  def macro(self, macro_name):
    return _Reference(tuple(macro_name.split("/")), _MACRO, True, self._where())


def _checked(value: Any) -> Any:
  """A parsed value with complete selectors, and macros that name constants replaced by these."""
  if isinstance(value, _Reference):
    if value.selector != _MACRO:
      return value._replace(selector=_configurable(value.selector, value.where).selector)
    name = "/".join(value.scopes)
    constants = gin_config._CONSTANTS.matching_selectors(name)
    if len(constants) > 1:
      raise ConfigError(f"{value.where}: the constant {name!r} may be any of "
                        f"{', '.join(sorted(constants))}; write one of these in full.")
    return Constant(constants[0], gin_config._CONSTANTS[constants[0]]) if constants else value
  if isinstance(value, dict):
    return {_checked(key): _checked(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(map(_checked, value))
  return value


class _Source:
  """All statements of some files and bindings, in the order in which they were read."""

  def __init__(self):
    self.bindings: list[_Binding] = []
    self.imports: set[str] = set()
    self._current: dict[tuple[str, str, str], _Binding] = {}
    self._reading: list[Path] = []

  def read_file(self, path: Path) -> None:
    name = gin_files.display(path)
    if path in self._reading:
      chain = " -> ".join(map(gin_files.display, [*self._reading, path]))
      raise ConfigError(f"{name} includes itself ({chain}); drop one of these includes.")
    self._reading.append(path)
    try:
      text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f"the gin file {name} cannot be read: {error}.") from error
    self._read(text, name, beside=path.parent)
    self._reading.pop()

  def read_bindings(self, bindings: Sequence[str]) -> None:
    for binding in bindings:
      option = "--gin_import " if binding.startswith("import ") else "--gin."
      self._read(binding, option + binding.removeprefix("import "), beside=None)

  def read_text(self, text: str) -> None:
    self._read(text, "text", beside=Path.cwd())

  def _read(self, text: str, name: str, beside: Path | None) -> None:
    from_command_line = beside is None
    parser = None

    def where(line: int | None = None) -> str:
      if from_command_line:
        return name
      line = line or (parser.current_token.start[0] if parser else 1)
      return f"{name}:{line}"

    try:
      parser = config_parser.ConfigParser(io.StringIO(text), _Delegate(where))
      for statement in parser:
        at = where(statement.location.line_num)
        if isinstance(statement, config_parser.BindingStatement):
          self._bind(statement, at, from_command_line)
        elif isinstance(statement, config_parser.BlockDeclaration):
          _configurable(statement.selector, at)
        elif isinstance(statement, config_parser.ImportStatement):
          self._import(statement, at)
        elif from_command_line:
          raise ConfigError(f"{name}: a file cannot be included here; give it with --gin_file.")
        else:
          self._include(statement.filename, at, beside)
    except (SyntaxError, tokenize.TokenError) as error:
      raise ConfigError(self._syntax_message(error, text, name, from_command_line)) from error

  @staticmethod
  def _syntax_message(error: Exception, text: str, name: str, from_command_line: bool) -> str:
    reason = str(error.args[0]).split("\n")[0].rstrip(".")
    reason = re.sub(r" on line \d+: <.*>", "", reason)  # what `ast` says of a bare word
    key, equals, value = (part.strip() for part in text.partition("="))
    if from_command_line and not equals:
      return f"{name} has no value; write --gin.NAME=VALUE."
    if from_command_line:
      hint = (f"; a string keeps its own quotes: --gin.{key}='\"{value}\"'"
              if re.fullmatch(r"[\w./:~-]+", value) else "")
      return f"{name}: {value!r} is not a gin value ({reason}){hint}."
    line = getattr(error, "lineno", None) or (error.args[1][0] if len(error.args) > 1 else None)
    return f"{name}{f':{line}' if line else ''}: this is not gin syntax ({reason})."

  def _include(self, filename: str, at: str, beside: Path) -> None:
    try:
      path = gin_files.find(filename, beside)
    except ConfigError as error:
      raise ConfigError(f"{at}: {error}") from None
    self.read_file(path)

  def _import(self, statement: config_parser.ImportStatement, at: str) -> None:
    if statement.module.startswith("__gin__"):
      raise ConfigError(f"{at}: {statement.module} is not supported; register what you need with "
                        "@gin.register or gin.external_configurable in a module and import that.")
    try:
      importlib.import_module(statement.module)
    except ImportError as error:
      raise ConfigError(f"{at}: cannot import {statement.module} ({error}).") from error
    self.imports.add(statement.module)

  def _bind(self, statement: config_parser.BindingStatement, at: str, from_command_line: bool):
    scope, selector, param = statement.scope, statement.selector, statement.arg_name
    if not param:  # `NAME = value` and `scope/NAME = value` are macros
      scope, selector, param = f"{scope}/{selector}" if scope else selector, _MACRO, "value"
    else:
      configurable = _configurable(selector, at)
      names, any_name = _parameters(configurable)
      if param not in names and not any_name:
        raise ConfigError(f"{at}: {_short(configurable.selector)} has no parameter {param!r}"
                          f"{nearest(param, names)}")
      selector = configurable.selector
    binding = _Binding(scope, selector, param, _checked(statement.value), at,
                       len(self.bindings), from_command_line)
    key = (scope, selector, param)
    if key in self._current:
      self._current[key].superseded = binding.time
    self._current[key] = binding
    self.bindings.append(binding)


# -------------------------------------------------------------------------------------- walking


def _references(value: Any) -> Iterator[_Reference]:
  if isinstance(value, _Reference):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from _references(key)
      yield from _references(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _references(item)


class _Index:
  """Bindings by (scope, selector), and the ones that apply to a call in nested scopes."""

  def __init__(self, bindings: Iterable[_Binding]):
    self._by_call: dict[tuple[str, str], list[_Binding]] = {}
    for binding in bindings:
      self._by_call.setdefault((binding.scope, binding.selector), []).append(binding)

  def applying(self, scopes: tuple[str, ...], selector: str) -> Iterator[_Binding]:
    """From the outermost scope (none) to the innermost, as gin merges them."""
    for depth in range(len(scopes) + 1):
      yield from self._by_call.get(("/".join(scopes[:depth]), selector), ())


def _used_at_some_time(bindings: list[_Binding]) -> set[int]:
  """Times of the bindings that a call reachable from the root has read while they were in force.

  `alive[call]` is the last time at which some path of references from the root leads to the call:
  over all paths the maximum of the minimum of the times at which its bindings were superseded.
  """
  index = _Index(bindings)
  alive: dict[tuple[tuple[str, ...], str], float] = {}
  pending = [(((), ROOT), _ALWAYS)]
  while pending:
    call, until = pending.pop()
    if until <= alive.get(call, -1):
      continue
    alive[call] = until
    scopes, _ = call
    for binding in index.applying(*call):
      for reference in _references(binding.value):
        below = (reference.scopes or scopes, reference.selector)
        pending.append((below, min(until, binding.superseded)))
  return {binding.time for call, until in alive.items() for binding in index.applying(*call)
          if binding.time < until}


class _Resolver:
  """Follows the bindings that are in force at the end, from the root down."""

  def __init__(self, bindings: list[_Binding]):
    self._all = bindings
    self._index = _Index(b for b in bindings if b.superseded == _ALWAYS)
    self._stack: list[tuple[tuple[str, ...], str]] = []
    self.effective: set[int] = set()
    self.calls: set[tuple[tuple[str, ...], str]] = set()
    self.selectors: set[str] = set()
    self.valid_names: set[str] = set()

  def call(self, reference: _Reference, outer: tuple[str, ...]) -> Any:
    scopes = reference.scopes or outer
    node = (scopes, reference.selector)
    if node in self._stack:
      raise ConfigError(f"{reference.where}: {_name_of(reference)} refers to itself; break the "
                        "circle of references.")
    self._stack.append(node)
    self.calls.add(node)
    bound: dict[str, _Binding] = {}
    for binding in self._index.applying(*node):
      bound[binding.param] = binding
    value = (self._macro if reference.selector == _MACRO else self._settings)(
      reference, scopes, bound)
    self._stack.pop()
    return value

  def _macro(self, reference, scopes, bound):
    name = "/".join(reference.scopes)
    if "value" not in bound:
      names = {b.scope for b in self._all if b.selector == _MACRO}
      raise ConfigError(f"{reference.where}: the macro %{name} is defined nowhere"
                        f"{nearest(name, names)}")
    self.valid_names.add(name)
    return self._value(bound["value"], scopes)

  def _settings(self, reference, scopes, bound):
    configurable = gin_config._REGISTRY[reference.selector]
    short = _short(reference.selector)
    names, _ = _parameters(configurable)
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

  def _missing(self, reference: _Reference, short: str, name: str) -> str:
    if reference.selector == ROOT:
      return (f"no {short}.{name} is bound, so there is nothing to run; name a file that binds it, "
              "such as gin/pds/default.gin.")
    return (f"{reference.where}: {short} needs a value for {name!r}; bind {short}.{name}, for "
            f"example with --gin.{short}.{name}=VALUE.")

  def _value(self, binding: _Binding, scopes: tuple[str, ...]) -> Any:
    self.effective.add(binding.time)

    def resolve(value):
      if isinstance(value, _Reference):
        return self.call(value, scopes)
      if isinstance(value, Constant) and value.value is gin.REQUIRED:
        raise ConfigError(f"{binding.where}: {binding.spelling} must be given; add "
                          f"--gin.{binding.spelling}=VALUE.")
      if isinstance(value, Mapping):
        return {resolve(key): resolve(item) for key, item in value.items()}
      if isinstance(value, list | tuple):
        return type(value)(resolve(item) for item in value)
      return value

    return resolve(binding.value)


def _name_of(reference: _Reference) -> str:
  if reference.selector == _MACRO:
    return "%" + "/".join(reference.scopes)
  return "@" + "/".join([*reference.scopes, _short(reference.selector)])


# --------------------------------------------------------------------------------------- result


@dataclasses.dataclass(frozen=True)
class Resolved:
  """A checked configuration.

  Attributes:
    tree: `Settings` of the root `run`; the system's are `tree.child("system")`.
    files: the gin files that were named, as they display.
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

    Parsing the text gives the same tree and so builds the same. A default that gin cannot write
    stands in a comment.
    """
    for plain_first in (True, False):
      imports = "".join(f"import {module}\n" for module in self.imports)
      text = "\n".join([imports, *(block + "\n" for block in
                                   Printer(self.tree, plain_first).blocks())]).lstrip("\n")
      source = _Source()
      source.read_text(text)
      again = _Resolver(source.bindings).call(_Reference((), ROOT, True, "text"), ())
      if same_values(again, self.tree):
        return text
    raise AssertionError("the resolved configuration does not parse back to itself")

  def build(self) -> Any:
    """Constructs the system object, and with it everything that it holds."""
    return self.run().system

  def run(self) -> Run:
    """Constructs all that the root holds: the system, the mesh, the wanted stages."""
    return self.tree.build()


def load(files: Sequence[str | os.PathLike], bindings: Sequence[str] = ()) -> Resolved:
  """Reads gin files, then bindings, and resolves them from the root `run`.

  Args:
    files: gin files in the order in which they apply; `gin_files.find` says where they are sought.
    bindings: statements such as `"TRAIN_STEPS=400"` or `"OPTIMIZER=@optim.sgd()"`, as they follow
      `--gin.` on the command line; later ones win. `"import my_module"` registers what it holds.

  Raises:
    ConfigError: an unknown file, name, parameter or macro; a value that is not gin; a missing
      value; a macro or binding that nothing uses. One sentence, with the nearest valid name.
  """
  if not files:
    raise ConfigError("no gin file is given; name one, such as gin/pds/default.gin.")
  source = _Source()
  paths = [gin_files.find(os.fspath(file)) for file in files]
  for path in paths:
    source.read_file(path)
  source.read_bindings(bindings)

  resolver = _Resolver(source.bindings)
  tree = resolver.call(_Reference((), ROOT, True, gin_files.display(paths[-1])), ())
  used = _used_at_some_time(source.bindings)
  for binding in source.bindings:
    if binding.from_command_line:
      refused = binding.superseded == _ALWAYS and binding.time not in resolver.effective
    else:
      refused = binding.time not in used
    if refused:
      raise ConfigError(_unused_message(binding, resolver))
  in_use = {b.scope: _written_value(b.value) for b in source.bindings
            if b.selector == _MACRO and b.time in resolver.effective}
  names = dict.fromkeys(b.scope for b in source.bindings if b.scope in in_use)
  macros = {name: in_use[name] for name in names}  # in the order of their first definition
  return Resolved(tree, tuple(map(gin_files.display, paths)), tuple(sorted(source.imports)), macros)


def _unused_message(binding: _Binding, resolver: _Resolver) -> str:
  """Why a binding is refused, in one sentence with the nearest name that would have been used."""
  name = binding.spelling
  place = binding.where if binding.from_command_line else f"{binding.where}: {name}"
  macros = {n for n in resolver.valid_names if "." not in n}
  if binding.selector == _MACRO:
    # CAPITALS are macros by convention; anything else may be a parameter without its owner.
    near = nearest(name, macros if macros and name.isupper() else resolver.valid_names)
    return f"{place} has no effect, since nothing refers to %{name}{near}"
  short = _short(binding.selector)
  if binding.selector not in resolver.selectors:
    near = nearest(f"{short}.{binding.param}", resolver.valid_names - macros)
    return f"{place} has no effect, since nothing in this run uses {short}{near}"
  if f"{short}.{binding.param}" in resolver.valid_names and not binding.scope:
    return (f"{place} has no effect, since every use of {short} binds {binding.param} in its own "
            "scope; bind it with that scope in front.")
  scopes = {f"{'/'.join(scopes)}/{short}.{binding.param}" if scopes else f"{short}.{binding.param}"
            for scopes, selector in resolver.calls if selector == binding.selector}
  return f"{place} has no effect, since {short} is not used in that scope{nearest(name, scopes)}"


def _written_value(value: Any) -> str:
  """A binding's value as it stood in its file, references unresolved."""
  if isinstance(value, _Reference):
    return _name_of(value) + ("()" if value.called and value.selector != _MACRO else "")
  if isinstance(value, dict):
    items = (f"{_written_value(k)}: {_written_value(v)}" for k, v in value.items())
    return "{" + ", ".join(items) + "}"
  if isinstance(value, list | tuple):
    left, right = "[]" if isinstance(value, list) else "()"
    comma = "," if right == ")" and len(value) == 1 else ""
    return left + ", ".join(map(_written_value, value)) + comma + right
  return plain_text(value)
