"""Values in gin syntax, as a configuration, a message or a table shows them."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

LINE_WIDTH = 100


class Named:
  """Base of the values that gin writes by a name: calls and constants."""

  def spelling(self) -> str:
    """The name, as `plain_text` shows it."""
    raise NotImplementedError


def leaves(value: Any) -> Iterator[Any]:
  """What stands in dicts (keys too), lists and tuples, in order; any other value as it is."""
  if type(value) is dict:
    for pair in value.items():
      yield from leaves(pair)
  elif type(value) in (list, tuple):
    for item in value:
      yield from leaves(item)
  else:
    yield value


def with_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
  """The same dicts, lists and tuples, with `change` of each of the `leaves`."""
  if type(value) is dict:
    return {with_leaves(key, change): with_leaves(item, change) for key, item in value.items()}
  if type(value) in (list, tuple):
    return type(value)(with_leaves(item, change) for item in value)
  return change(value)


def is_literal(value: Any) -> bool:
  """Whether gin can write the value and read the same one back."""
  if isinstance(value, Named):
    return True
  if isinstance(value, bool | int | str | bytes | None):
    return type(value) in (bool, int, str, bytes, type(None))
  if isinstance(value, float):
    return type(value) is float and not math.isnan(value)
  if type(value) is dict:
    return all(is_literal(k) and is_literal(v) for k, v in value.items())
  return type(value) in (list, tuple) and all(map(is_literal, value))


def plain_text(value: Any) -> str:
  """A readable, deterministic text for any value; gin syntax if gin has one."""
  if is_literal(value):
    return literal_text(value)
  if isinstance(value, type) or inspect.isroutine(value):
    return f"{value.__module__}.{value.__qualname__}"
  return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def literal_text(value: Any, spell: Callable[[Named], str] = methodcaller("spelling"),
                 indent: int = 0, width: float = math.inf) -> str:
  """Gin syntax on one line, or one item a line if that is wider than `width`."""
  if isinstance(value, Named):
    return spell(value)
  if isinstance(value, float) and math.isinf(value):
    return "1e999" if value > 0 else "-1e999"
  if not isinstance(value, dict | list | tuple):
    return repr(value)
  def text(item, width=math.inf):
    return literal_text(item, spell, indent + 2, width)
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
