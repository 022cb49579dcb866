"""Types of settings in words: what an annotation asks for, without the name of a Python type."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import annotated_types as at
from gin import config as gin_config

from lmops_jax.config.gin_text import plain_text
from lmops_jax.config.registry import parameters_of, short_name
from lmops_jax.host.words import shortened

LARGEST = 2**31 - 1  # what an index on a device holds
_MAX_SHOWN = 200  # characters of a value
_MAX_EXAMPLES = 3


class Distinct:
  """Mark of a sequence: no value stands in it twice."""


@dataclasses.dataclass(frozen=True)
class Words:
  """Mark: what the annotation is called, in place of its own description."""

  text: str


@dataclasses.dataclass(frozen=True)
class Rule:
  """Mark: a further condition of a value; `Words` beside it say what is asked for."""

  holds: Callable[[Any], bool]


@functools.cache
def hints_of(made: Callable) -> dict[str, Any]:
  """The annotations of a class or function, marks included; none if they cannot be read."""
  try:
    return typing.get_type_hints(made, include_extras=True)
  except (NameError, TypeError, AttributeError):  # of a component of a user's own
    return {}


def without_marks(annotation: Any) -> Any:
  is_marked = typing.get_origin(annotation) is Annotated
  return typing.get_args(annotation)[0] if is_marked else annotation


def options(annotation: Any) -> list[Any]:
  """The alternatives of a union, else the annotation alone."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return [option for part in typing.get_args(annotation) for option in options(part)]
  return [annotation]


def shown(value: Any) -> str:
  """A value as a message names it: gin's spelling, a component by its registered name."""
  selector = next((name for name, made in _registered() if made is type(value)), None)
  return shortened(f"@{selector}()" if selector else plain_text(value), _MAX_SHOWN)


def described(annotation: Any) -> str:
  """What an annotation asks for: "an integer of at least 1, or None"."""
  parts = list(dict.fromkeys(map(_described, options(annotation))))
  parts.sort(key="None".__eq__)  # None last
  return ", or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _described(option: Any) -> str:
  marks = option.__metadata__ if typing.get_origin(option) is Annotated else ()
  words = next((mark.text for mark in marks if isinstance(mark, Words)), None)
  if words is not None:
    return words
  bare = without_marks(option)
  origin, arguments = typing.get_origin(bare), typing.get_args(bare)
  if bare is Any:
    return "anything"
  if origin is Literal:
    texts = [plain_text(choice) for choice in arguments]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
  plain = {None: "None", type(None): "None", bool: "True or False", str: "a text", bytes: "a text",
           int: "an integer", float: "a number"}
  if bare in plain:
    return plain[bare] + _bounds(marks)
  if origin is tuple and arguments[-1] is not Ellipsis:
    return f"a list of {' and '.join(map(described, arguments))}"
  if origin in (list, tuple, Sequence):
    least = next((mark.min_length for mark in marks if isinstance(mark, at.MinLen)), 0)
    at_least = "" if least == 0 else "one or more " if least == 1 else f"{least} or more "
    values = "different values" if Distinct in marks else "values"
    return f"a list of {at_least}{values}, each {described(arguments[0])}"
  if origin in (dict, Mapping):
    return f"a mapping from {described(arguments[0])} to {described(arguments[1])}"
  if origin is Callable or bare is Callable:  # whichever components can be called
    return "a function"
  examples = _examples(bare)
  return (f"a component such as {' or '.join(examples)}" if examples
          else "a component of another kind")


def _bounds(marks: tuple) -> str:
  """" of at least 1 and at most 2^31 - 1" from the marks of a number, "" without any."""
  words = {at.Ge: "of at least", at.Gt: "above", at.Le: "at most", at.Lt: "below"}
  sizes = {LARGEST: "2^31 - 1", 2**32: "2^32", 2**63: "2^63", 2**64: "2^64"}
  parts = [f"{words[type(mark)]} {sizes.get(*dataclasses.astuple(mark) * 2)}"
           for mark in marks if type(mark) in words]
  parts += [f"a multiple of {mark.multiple_of}" for mark in marks
            if isinstance(mark, at.MultipleOf)]
  return f" {' and '.join(parts)}" if parts else ""


def part_with(made: Callable, name: str) -> tuple[str, str] | None:
  """A parameter of a component that takes another component, which has the parameter `name`.

  Returns:
    That parameter and the other component's name; None if there is none.
  """
  for parameter, hint in hints_of(made).items():
    kinds = options(without_marks(hint))
    for selector, other in gin_config._REGISTRY.items():
      if other.wrapped in kinds and name in parameters_of(other)[0]:
        return parameter, short_name(selector)
  return None


def _registered() -> list[tuple[str, Any]]:
  return [(short_name(selector), configurable.wrapped)
          for selector, configurable in gin_config._REGISTRY.items()]


def _examples(kind: Any) -> list[str]:
  """Registered components that are of a kind or make it, as gin references."""
  def fits(made):
    if inspect.isclass(made):
      return inspect.isclass(kind) and issubclass(made, kind)
    return hints_of(made).get("return") == kind
  return sorted(f"@{name}()" for name, made in _registered() if fits(made))[:_MAX_EXAMPLES]
