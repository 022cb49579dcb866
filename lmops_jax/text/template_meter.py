"""What a chat template may do: how many steps it takes, and how large its values get.

Sizes are foreseen from the arguments of an operation, before it is run.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from types import GeneratorType
from typing import Any, NamedTuple

from jinja2 import runtime, utils

MAX_STEPS = 20_000_000  # a published template takes less than a million for a thousand turns
MAX_CHARACTERS = 1 << 24
ACTION, ENTRY, TEST = 10, 2, 3  # steps of a round, call or operator; of an entry; of a test
_MAX_DEPTH, _MAX_BITS = 500, 1 << 16
_CHARACTERS_A_STEP, _COMPARED_A_STEP = 8, 256
_TEXTS, _VIEWS = (str, bytes), (KeysView, ValuesView, ItemsView)
_HOLDERS = (utils.Namespace, runtime.LoopContext, utils.Cycler, utils.Joiner)


class LimitError(Exception):
  """What a template does too much of, worded as the end of a sentence about the template."""


class _Size(NamedTuple):
  """The size of a value as it is written out: what occurs twice counts twice."""

  entries: int
  characters: int
  depth: int

  @property
  def total(self) -> int:
    return self.entries + self.characters


class Meter:
  """The budget of one rendering."""

  def __init__(self):
    self._steps = 0
    self._sizes: dict[int, tuple[Any, _Size]] = {}  # lists and mappings, which nothing changes

  def spend(self, steps: int) -> None:
    self._steps += steps
    if self._steps > MAX_STEPS:
      raise LimitError(f"takes more than {MAX_STEPS:,} steps")

  def foresee(self, total: int) -> None:
    """Refuses a value of `total` characters and entries if those are too many."""
    if total > MAX_CHARACTERS:
      raise LimitError(f"makes a value of more than {MAX_CHARACTERS:,} characters or entries")

  def size(self, value: Any) -> _Size:
    if isinstance(value, _TEXTS):
      return _Size(1, len(value), 0)
    if isinstance(value, int):
      if value.bit_length() > _MAX_BITS:
        raise LimitError(f"makes a number of more than {_MAX_BITS:,} bits")
      return _Size(1, value.bit_length() // 3 + 1, 0)
    if isinstance(value, (list, tuple, Mapping, *_VIEWS)):
      return self._size_of_many(value)
    return _Size(1, 32, 0)

  def _size_of_many(self, value) -> _Size:
    known = self._sizes.get(id(value))
    if known is not None:
      return known[1]
    self.spend(ENTRY * len(value))
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    entries, characters, depth = 1, 0, 0
    for part in parts:
      if type(part) is str:
        entries, characters = entries + 1, characters + len(part)
        continue
      if isinstance(part, _HOLDERS):
        raise LimitError("puts a namespace or a loop into a list, which is not measured")
      size = self.size(part)
      entries, characters = entries + size.entries, characters + size.characters
      depth = max(depth, size.depth)
    if depth >= _MAX_DEPTH:
      raise LimitError(f"nests lists more than {_MAX_DEPTH} deep")
    size = _Size(entries, characters, depth + 1)
    self.foresee(size.total)
    self._sizes[id(value)] = value, size  # held, so that no other object gets its id
    return size

  def taken(self, *values: Any) -> None:
    """Pays for reading values once."""
    for value in values:
      if isinstance(value, _TEXTS):
        self.spend(len(value) // _CHARACTERS_A_STEP)
      elif isinstance(value, (list, tuple, range, Mapping, *_VIEWS)):
        self.spend(len(value))

  def compared(self, *values: Any) -> None:
    """Pays for comparing values."""
    for value in values:
      if isinstance(value, range):
        self.spend(len(value) // _CHARACTERS_A_STEP)
      elif not isinstance(value, Mapping):
        size = self.size(value)
        self.spend(size.entries + size.characters // _COMPARED_A_STEP)

  def made(self, value: Any) -> Any:
    """Pays for a new value and gives it back; a generator comes back as one that pays by itself."""
    if isinstance(value, GeneratorType):
      return self._each(value)
    if isinstance(value, _TEXTS):
      self.foresee(len(value))
      self.spend(len(value) // _CHARACTERS_A_STEP)
    else:
      self.size(value)
    return value

  def written(self, characters: int) -> None:
    """Pays for text that goes into the output, or into a block's."""
    self.foresee(characters)
    self.spend(ACTION + characters // _CHARACTERS_A_STEP)

  def _each(self, values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
      self.spend(ACTION)
      yield value


def total(meter: Meter, values: Sequence[Any]) -> int:
  return sum(meter.size(value).total for value in values)


def _largest(values: Sequence[Any]) -> int:
  return max((abs(v) for v in values if isinstance(v, int)), default=0)


def _padded(meter: Meter, values: Sequence[Any]) -> int:
  return total(meter, values) + _largest(values)


def _at_each(mark: str) -> Callable[[Meter, Sequence[Any]], int]:
  def size(meter: Meter, values: Sequence[Any]) -> int:
    added = _largest(values) + total(meter, values[1:])
    return total(meter, values) + str(values[0]).count(mark) * added + added

  return size


def _replaced(meter: Meter, values: Sequence[Any]) -> int:
  text, old, new = map(str, [*values, "", ""][:3])
  return len(text) + (text.count(old) + 1) * len(new)


def _joined(meter: Meter, values: Sequence[Any]) -> int:
  many = (*_TEXTS, list, tuple, range, Mapping, *_VIEWS)
  counts = [len(v) for v in values if isinstance(v, many)]
  between = max((len(v) for v in values if isinstance(v, _TEXTS)), default=0)
  return total(meter, values) + max(counts, default=0) * between


def _translated(meter: Meter, values: Sequence[Any]) -> int:
  return total(meter, values[:1]) * total(meter, values[1:])


def _summed(meter: Meter, values: Sequence[Any]) -> int:
  items = values[0] if isinstance(values[0], (list, tuple)) else ()
  plain = all(isinstance(item, int | float) for item in [*items, *values[1:]])
  return 0 if plain else (len(items) + 1) * total(meter, values)


def _rounded(meter: Meter, values: Sequence[Any]) -> int:
  return _largest(values[1:]) << 14  # ten to this power is computed


def _as_json(meter: Meter, values: Sequence[Any]) -> int:
  size, added = meter.size(values[0]), _largest(values[1:]) + total(meter, values[1:])
  return 6 * size.characters + size.entries * (4 + size.depth * added)


def _widths(text: str, values: Sequence[Any]) -> int:
  """The sum of all numbers that could be a width."""
  found = re.findall(r"\d+", text)
  for value in values:
    found += re.findall(r"\d+", value) if isinstance(value, str) else []
  return sum(int(n) if len(n) < 20 else MAX_CHARACTERS for n in found) + _largest(values)


_PERCENT = re.compile(r"%(?:\([^)]*\))?([-#0 +]*(?:\d+|\*)?(?:\.(?:\d+|\*)?)?)")


def _percent(meter: Meter, values: Sequence[Any]) -> int:
  """The foreseen size of `values[0] % values[1:]`."""
  text, rest = str(values[0]), values[1:]
  found = _PERCENT.findall(text)
  widths = "".join(f"{flags} " for flags in found)
  starred = _flat(rest) if "*" in widths else ()
  return len(text) + len(found) * total(meter, rest) + _widths(widths, starred)


def _flat(values: Sequence[Any]) -> list[Any]:
  return [v for value in values for v in (value if isinstance(value, tuple) else (value,))]


def _braces(meter: Meter, values: Sequence[Any]) -> int:
  """The foreseen size of `values[0].format(*values[1:])`."""
  text, rest = values[0], values[1:]
  inner = _flat([*rest, *(v for r in rest if isinstance(r, Mapping) for v in r.values())])
  length, fields = len(text), 0
  for _, field, spec, _ in string.Formatter().parse(str(text)):
    if field is None:
      continue
    if "." in field:
      raise LimitError("formats attributes of a value, which are not measured")
    fields += 1
    length += _widths(spec, inner if "{" in spec else ())
  return length + fields * total(meter, rest)


_GROWTH: dict[str, Callable[[Meter, Sequence[Any]], int]] = {
  **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "truncate"),
                  _padded),
  "expandtabs": _at_each("\t"), "indent": _at_each("\n"), "replace": _replaced, "join": _joined,
  "translate": _translated, "sum": _summed, "round": _rounded, "tojson": _as_json,
  "pprint": lambda meter, values: meter.size(values[0]).total * (1 + meter.size(values[0]).depth),
}
METHODS = {**_GROWTH, "format": _braces, "format_map": _braces}
FILTERS = {**_GROWTH, "format": _percent}
_ORDERING = ("sort", "unique", "groupby", "min", "max", "dictsort")
_READ_LITTLE = ("startswith", "endswith", "length", "count", "first", "last", "default", "d")


def call(meter: Meter, name: str, growth, args: Sequence[Any], kwargs: Mapping) -> list[Any]:
  """Pays for a call and foresees what it makes; gives its arguments, which a join reads twice."""
  meter.spend(ACTION)
  args = [list(a) if name == "join" and isinstance(a, Iterator) else a for a in args]
  values = [*args, *kwargs.values()]
  if name in _ORDERING:
    meter.compared(*values)
  if name not in _READ_LITTLE:
    meter.taken(*values)
  if name in growth:
    meter.foresee(growth[name](meter, values))
  return args


def operate(meter: Meter, operator: str, left: Any, right: Any) -> None:
  """Pays for a binary operator and foresees what it makes."""
  meter.spend(ACTION)
  if operator == "*":
    for many, times in ((left, right), (right, left)):
      if isinstance(many, (*_TEXTS, list, tuple)) and isinstance(times, int):
        meter.foresee(meter.size(many).total * times)
  elif operator == "**" and isinstance(left, int) and isinstance(right, int):
    if left.bit_length() * right > _MAX_BITS:
      raise LimitError(f"makes a number of more than {_MAX_BITS:,} bits")
  elif operator == "%" and isinstance(left, _TEXTS):
    meter.foresee(_percent(meter, (left, right)))
