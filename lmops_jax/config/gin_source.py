"""The statements of gin files and of the command line, read with gin's own parser.

Names are looked up in gin's registry as they are read, so that an unknown selector, parameter or
file is refused where it stands, with the nearest valid name. Nothing is stored in gin itself.
"""

import dataclasses
import importlib
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gin import config as gin_config
from gin import config_parser

from lmops_jax.config import gin_files
from lmops_jax.config.gin_text import plain_text, with_leaves
from lmops_jax.config.refusals import ConfigError, nearest
from lmops_jax.config.registry import configurable_named, parameters_of, short_name
from lmops_jax.config.setting_words import part_with
from lmops_jax.config.settings import Constant

MACRO = "gin.macro"


class Reference(NamedTuple):
  """`@scopes/selector` or `@scopes/selector()`; a macro is a reference to `gin.macro`."""
  scopes: tuple[str, ...]
  selector: str
  called: bool
  where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
  """One statement `scope/selector.param = value`; two statements are never equal."""
  scope: str
  selector: str
  param: str
  value: Any
  where: str
  from_command_line: bool

  @property
  def spelling(self) -> str:
    if self.selector == MACRO:
      return self.scope
    prefix = f"{self.scope}/" if self.scope else ""
    return f"{prefix}{short_name(self.selector)}.{self.param}"


class _Delegate(config_parser.ParserDelegate):
  """Notes references with their place; `_checked` looks their names up afterwards."""

  def __init__(self, where: Callable[[], str]):
    self._where = where

  def configurable_reference(self, scoped_configurable_name, evaluate):
    *scopes, selector = scoped_configurable_name.split("/")
    return Reference(tuple(scopes), selector, evaluate, self._where())

  def macro(self, macro_name):
    return Reference(tuple(macro_name.split("/")), MACRO, True, self._where())


def _checked(leaf: Any) -> Any:
  """A leaf of a parsed value with its selector in full; a macro of a constant's name becomes it."""
  if not isinstance(leaf, Reference):
    return leaf
  if leaf.selector != MACRO:
    return leaf._replace(selector=configurable_named(leaf.selector, leaf.where).selector)
  name = "/".join(leaf.scopes)
  constants = gin_config._CONSTANTS.matching_selectors(name)
  if len(constants) > 1:
    raise ConfigError(f"{leaf.where}: the constant {name!r} may be any of "
                      f"{', '.join(sorted(constants))}; write one of these in full.")
  return Constant(constants[0], gin_config._CONSTANTS[constants[0]]) if constants else leaf


class Source:
  """All statements of some files and bindings, in the order in which they were read."""

  def __init__(self):
    self.bindings: list[Binding] = []
    self.imports: set[str] = set()
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
          configurable_named(statement.selector, at)
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
      scope, selector, param = f"{scope}/{selector}" if scope else selector, MACRO, "value"
    else:
      configurable = configurable_named(selector, at)
      names, any_name = parameters_of(configurable)
      if param not in names and not any_name:
        part = part_with(configurable.wrapped, param)
        hint = nearest(param, names) if part is None else (
          f"; its {part[0]!r} has one, which is bound as {part[1]}.{param}.")
        raise ConfigError(
          f"{at}: {short_name(configurable.selector)} has no parameter {param!r}{hint}")
      selector = configurable.selector
    value = with_leaves(statement.value, _checked)
    self.bindings.append(
      Binding(scope, selector, param, value, at, from_command_line))


def in_force(bindings: Iterable[Binding]) -> list[Binding]:
  """The last binding of each parameter."""
  return list({(b.scope, b.selector, b.param): b for b in bindings}.values())


def name_of(reference: Reference) -> str:
  if reference.selector == MACRO:
    return "%" + "/".join(reference.scopes)
  return "@" + "/".join([*reference.scopes, short_name(reference.selector)])


def written(value: Any) -> str:
  """A binding's value as it stood in its file, references unresolved."""
  if isinstance(value, Reference):
    return name_of(value) + ("()" if value.called and value.selector != MACRO else "")
  if isinstance(value, dict):
    items = (f"{written(k)}: {written(v)}" for k, v in value.items())
    return "{" + ", ".join(items) + "}"
  if isinstance(value, list | tuple):
    left, right = "[]" if isinstance(value, list) else "()"
    comma = "," if right == ")" and len(value) == 1 else ""
    return left + ", ".join(map(written, value)) + comma + right
  return plain_text(value)
