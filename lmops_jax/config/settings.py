"""The resolved configuration as a tree of calls: flattened, and built.

`resolve.load` makes the tree. It holds every value that a run will use, bound or default, so what
`Resolved.text` shows is what `Settings.build` constructs.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lmops_jax.config import setting_types
from lmops_jax.config.gin_text import Named, leaves, plain_text
from lmops_jax.config.refusals import ConfigError, nearest

SINGLETON = "gin.singleton"


@dataclasses.dataclass(frozen=True)
class Constant(Named):
  """A value registered with `gin.constant` or `gin.constants_from_enum`, written `%name`."""
  name: str
  value: Any

  def spelling(self) -> str:
    return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Settings(Named):
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

  def spelling(self) -> str:
    return self.selector

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
    selector stands under `name`, or under "component" if no name is given. Scopes do not show:
    two calls with equal values flatten to equal dicts.
    """
    flat = {name or "component": self.selector}
    for param, value in self.params.items():
      _flatten(f"{name}.{param}" if name else param, value, flat)
    return flat

  def build(self) -> Any:
    """Constructs this call's object, and first everything below it.

    Raises:
      ConfigError: if a constructor refuses its values; the message starts with the place.
    """
    return _Builder().build(self, self.selector)


def _flatten(name: str, value: Any, flat: dict[str, str]) -> None:
  if isinstance(value, Settings):
    if value.selector == SINGLETON:  # a shared object shows as what it is
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
  return (leaf for leaf in leaves(value) if isinstance(leaf, Settings))


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
  """A reference without `()` that has bindings: calls the function with them; the caller's win."""

  def __init__(self, builder: _Builder, settings: Settings, trail: str):
    self._builder, self._settings, self._trail = builder, settings, trail

  def __call__(self, *args, **kwargs):
    return self._builder.call(self._settings, self._trail, args, kwargs)
