"""The resolved configuration as a tree of calls: shown as gin text, flattened, and built.

`config.load` makes the tree. It holds every value that a run will use, bound or default, so what
`text_of` shows is what `Settings.build` constructs.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

SINGLETON = "gin.singleton"
LINE_WIDTH = 100


class ConfigError(ValueError):
  """A configuration is refused; the message is one sentence that says what to change."""


def nearest(name: str, candidates: Iterable[str], end: str = ".") -> str:
  """`; the nearest valid name is X.`, or just `end` without any candidate."""
  def likeness(candidate: str) -> tuple[float, str]:
    def ratio(a: str, b: str) -> float:
      return difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()
    last = [re.split(r"[./]", text.removesuffix(".gin"))[-1] for text in (name, candidate)]
    return max(ratio(name, candidate), 0.95 * ratio(*last)), candidate
  best = max(((likeness(c)) for c in sorted(set(candidates), reverse=True)), default=None)
  return end if best is None else f"; the nearest valid name is {best[1]!r}{end}"


@dataclasses.dataclass(frozen=True)
class Constant:
  """A value registered with `gin.constant` or `gin.constants_from_enum`, written `%name`."""
  name: str
  value: Any


@dataclasses.dataclass(frozen=True)
class Settings:
  """One resolved call in the configuration: a configurable with all its parameters.

  Attributes:
    selector: the registered name, for example "optim.sgd".
    params: values in the order of the signature; plain Python values, `Constant`s, `Settings`, and
      lists, tuples and dicts of them.
    defaults: names of the parameters that nothing bound; their values are the signature's.
    scope: the gin scope that the reference named, empty for most.
    called: False for a reference without `()`, which hands over the function itself.
  """
  selector: str
  params: dict[str, Any]
  defaults: frozenset[str] = frozenset()
  scope: tuple[str, ...] = ()
  called: bool = True
  function: Callable | None = dataclasses.field(default=None, compare=False, repr=False)

  def __getitem__(self, name: str) -> Any:
    if name not in self.params:
      raise KeyError(f"{self.selector} has no setting {name!r}{nearest(name, self.params)}")
    return self.params[name]

  def child(self, *path: str | int) -> Any:
    """The value at a path of parameter names and list positions: `child("methods", 0)`."""
    value = self
    for step in path:
      value = value[step]
    return value

  def flatten(self, name: str = "") -> dict[str, str]:
    """All settings below as one flat dict of readable names to readable values.

    `{"optimizer": "optim.sgd", "optimizer.learning_rate": "0.1", "methods[0]": ...}`; the own
    selector stands under `name`, or under "component" where no name is given. Scopes do not show:
    two calls with equal values flatten to equal dicts.
    """
    flat = {name or "component": self.selector}
    for param, value in self.params.items():
      _flatten(f"{name}.{param}" if name else param, value, flat)
    return flat

  def build(self) -> Any:
    """Constructs this call's object, and first everything below it.

    Raises:
      ConfigError: a constructor refused its values; the message starts with the place.
    """
    return _Builder().build(self, self.selector)


def _flatten(name: str, value: Any, flat: dict[str, str]) -> None:
  if isinstance(value, Settings):
    if value.selector == SINGLETON:  # who shares an object shows in what it is, not in its name
      value = value.params["constructor"]
    flat.update(value.flatten(name))
  elif isinstance(value, list | tuple) and any(True for _ in settings_in(value)):
    for i, item in enumerate(value):
      _flatten(f"{name}[{i}]", item, flat)
  elif isinstance(value, Mapping) and any(True for _ in settings_in(value)):
    for key, item in value.items():
      _flatten(f"{name}[{key!r}]", item, flat)
  else:
    flat[name] = plain_text(value)


def settings_in(value: Any) -> Iterator[Settings]:
  """The outermost `Settings` in a value, in order."""
  if isinstance(value, Settings):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from settings_in(key)
      yield from settings_in(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from settings_in(item)


# ------------------------------------------------------------------------------------- building


class _Builder:
  """Constructs objects from `Settings`; one builder shares the singletons of one build."""

  def __init__(self):
    self._singletons: dict[tuple[str, ...], Any] = {}

  def build(self, settings: Settings, trail: str) -> Any:
    if settings.selector == SINGLETON and settings.called:
      if settings.scope not in self._singletons:
        constructor = dataclasses.replace(settings.params["constructor"], called=True)
        self._singletons[settings.scope] = self.build(constructor, trail)
      return self._singletons[settings.scope]
    if not settings.called:
      if len(settings.defaults) == len(settings.params):
        return settings.function
      return functools.wraps(settings.function, updated=())(_Deferred(self, settings, trail))
    return self.call(settings, trail, (), {})

  def call(self, settings: Settings, trail: str, args: tuple, kwargs: dict) -> Any:
    given = set(list(inspect.signature(settings.function).parameters)[:len(args)]) | set(kwargs)
    bound = {name: self._value(value, f"{trail}.{name}") for name, value in settings.params.items()
             if name not in settings.defaults and name not in given}
    from lmops_jax.config import setting_types  # the command line starts without it
    try:
      if not setting_types.checks_itself(settings.function):  # a component of the user's own
        setting_types.check_arguments(settings.function, settings.selector, bound)
      return settings.function(*args, **bound, **kwargs)
    except (ValueError, TypeError) as error:
      if isinstance(error, ConfigError):
        raise
      place = trail if trail == settings.selector else f"{trail}=@{settings.selector}"
      raise ConfigError(f"{place}: {error}") from error

  def _value(self, value: Any, trail: str) -> Any:
    if isinstance(value, Settings):
      return self.build(value, trail)
    if isinstance(value, Constant):
      return value.value
    if isinstance(value, Mapping):
      return {self._value(k, trail): self._value(v, f"{trail}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
      return type(value)(self._value(v, f"{trail}[{i}]") for i, v in enumerate(value))
    return value


class _Deferred:
  """A reference without `()` that has bindings: calls the function with them, caller's first."""

  def __init__(self, builder: _Builder, settings: Settings, trail: str):
    self._builder, self._settings, self._trail = builder, settings, trail

  def __call__(self, *args, **kwargs):
    return self._builder.call(self._settings, self._trail, args, kwargs)


# ----------------------------------------------------------------------------------------- text


def _is_literal(value: Any) -> bool:
  """Whether gin can write the value and read the same one back."""
  if isinstance(value, Settings | Constant):
    return True
  if isinstance(value, bool | int | str | bytes | None):
    return type(value) in (bool, int, str, bytes, type(None))
  if isinstance(value, float):
    return type(value) is float and not math.isnan(value)
  if type(value) is dict:
    return all(_is_literal(k) and _is_literal(v) for k, v in value.items())
  return type(value) in (list, tuple) and all(map(_is_literal, value))


def plain_text(value: Any) -> str:
  """A readable, deterministic text for any value; gin syntax where gin has one."""
  if _is_literal(value):
    return _literal_text(value, lambda settings: settings.selector)
  if isinstance(value, type) or inspect.isroutine(value):
    return f"{value.__module__}.{value.__qualname__}"
  return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _literal_text(value: Any, reference: Callable[[Settings], str], indent: int = 0,
                  width: float = math.inf) -> str:
  """Gin syntax on one line, or one item a line where that is wider than `width`."""
  if isinstance(value, Settings):
    return reference(value)
  if isinstance(value, Constant):
    return f"%{value.name}"
  if isinstance(value, float) and math.isinf(value):
    return "1e999" if value > 0 else "-1e999"
  if not isinstance(value, dict | list | tuple):
    return repr(value)
  def text(item, width=math.inf):
    return _literal_text(item, reference, indent + 2, width)
  left, right = {dict: "{}", list: "[]", tuple: "()"}[type(value)]
  def items(width=math.inf):
    if isinstance(value, dict):
      return [f"{text(k)}: {text(v, width)}" for k, v in value.items()]
    return [text(item, width) for item in value]
  line = ", ".join(items())
  if isinstance(value, tuple) and len(value) == 1:
    line += ","
  if len(left + line + right) <= width:
    return left + line + right
  inner = " " * (indent + 2)
  rows = "".join(f"{inner}{item},\n" for item in items(LINE_WIDTH - indent - 3))
  return f"{left}\n{rows}{' ' * indent}{right}"


class Printer:
  """Writes a tree as gin blocks, one for each different call, scoped where a name has several."""

  def __init__(self, root: Settings, plain_first: bool):
    self._scopes: dict[str, str] = {}  # identity of a call -> scope written before its selector
    self._identities: dict[int, str] = {}
    self._order: dict[str, Settings] = {}
    paths: dict[str, tuple[str, ...]] = {}
    self._collect(root, (), paths)
    by_selector: dict[str, list[str]] = {}
    for identity, settings in self._order.items():
      by_selector.setdefault(settings.selector, []).append(identity)
    for selector, identities in by_selector.items():
      self._name_scopes(selector, identities, paths, plain_first)

  def _identity(self, settings: Settings) -> str:
    """Equal for calls with equal values, whatever their scopes."""
    key = id(settings)
    if key not in self._identities:
      scope = "/".join(settings.scope) if settings.selector == SINGLETON else ""
      params = "; ".join(
        f"{name}={_literal_text(value, self._mention) if _is_literal(value) else plain_text(value)}"
        for name, value in settings.params.items())
      self._identities[key] = f"{scope}/{settings.selector}({params})"
    return self._identities[key]

  def _mention(self, settings: Settings) -> str:
    return self._identity(settings) + ("()" if settings.called else "")

  def _collect(self, settings: Settings, path: tuple[str, ...], paths) -> None:
    identity = self._identity(settings)
    if identity in self._order:
      return
    self._order[identity], paths[identity] = settings, path
    for name, value in settings.params.items():
      found = list(settings_in(value))
      for i, below in enumerate(found):
        step = (name,) if len(found) == 1 else (name, str(i))
        self._collect(below, path + step, paths)

  def _name_scopes(self, selector, identities, paths, plain_first) -> None:
    if len(identities) == 1 and selector != SINGLETON:
      self._scopes[identities[0]] = ""
      return
    rest, taken = list(identities), set()
    if selector == SINGLETON:
      plain_first = False
    if plain_first:
      plain = next((i for i in rest if not self._order[i].scope), None)
      if plain is not None:
        self._scopes[plain] = ""
        rest.remove(plain)
    for identity in list(rest):
      scope = "_".join(self._order[identity].scope)
      if scope and scope not in taken:
        self._scopes[identity] = scope
        taken.add(scope)
        rest.remove(identity)
    for identity in rest:
      path = [re.sub(r"\W", "_", step) for step in paths[identity]]
      names = ["_".join(path[-n:]) for n in range(1, len(path) + 1)]
      names = [name for name in names if re.match(r"[A-Za-z_]", name)]
      names += [f"variant_{n}" for n in range(len(identities) + 1)]
      self._scopes[identity] = next(name for name in names if name not in taken)
      taken.add(self._scopes[identity])

  def _written(self, settings: Settings) -> str:
    scope = self._scopes[self._identity(settings)]
    return f"{scope}/{settings.selector}" if scope else settings.selector

  def _reference(self, settings: Settings) -> str:
    return f"@{self._written(settings)}{'()' if settings.called else ''}"

  def blocks(self) -> Iterator[str]:
    for settings in self._order.values():
      bound, comments = [], []
      for name, value in settings.params.items():
        if _is_literal(value):
          width = LINE_WIDTH - len(name) - 5
          bound.append(f"  {name} = {_literal_text(value, self._reference, 2, width)}")
        else:
          comments.append(f"# {self._written(settings)}.{name} is {plain_text(value)}")
      if bound:
        yield "\n".join([*comments, f"{self._written(settings)}:", *bound])
      elif comments:
        yield "\n".join(comments)


def same_values(a: Any, b: Any) -> bool:
  if isinstance(a, Settings) and isinstance(b, Settings):
    if a.selector == SINGLETON and a.scope != b.scope:
      return False
    return (a.selector, a.called, list(a.params)) == (b.selector, b.called, list(b.params)) and all(
      same_values(a.params[name], b.params[name]) for name in a.params)
  if type(a) is not type(b):
    return False
  if isinstance(a, list | tuple):
    return len(a) == len(b) and all(map(same_values, a, b))
  if isinstance(a, dict):
    return len(a) == len(b) and all(
      same_values(ka, kb) and same_values(a[ka], b[kb]) for ka, kb in zip(a, b))
  return a is b or a == b
