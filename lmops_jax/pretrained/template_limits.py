"""A Jinja sandbox that counts: other people's templates end, and make nothing large.

Every round of a loop, every call, filter and operator takes steps from a budget, and what makes a
text or a list takes more the larger it is. What could make something huge in one go (`'a' * 10**9`,
`'%0999999999d' | format(1)`, lists that hold themselves) is foreseen from its arguments and refused
before it is run. A template inside the limits gives the text that it gives without them.
"""

from __future__ import annotations

import contextvars
import functools
import re
import string
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from types import GeneratorType
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes, runtime, sandbox, utils, visitor

MAX_STEPS = 20_000_000  # a published template takes less than a million for a thousand turns
MAX_CHARACTERS = 1 << 24
_MAX_DEPTH, _MAX_BITS = 500, 1 << 16
_ACTION, _ENTRY, _TEST = 10, 2, 3  # steps of a round, call or operator; of an entry; of a test
_CHARACTERS_A_STEP, _COMPARED_A_STEP = 8, 256
_WITHOUT = ("urlize", "xmlattr", "striptags", "wordwrap")  # for pages of HTML, slow on long texts
_TEXTS, _VIEWS = (str, bytes), (KeysView, ValuesView, ItemsView)
_HOLDERS = (utils.Namespace, runtime.LoopContext, utils.Cycler, utils.Joiner)


class LimitError(Exception):
  """What a template does too much of, as the end of a sentence that begins with it."""


class _Size(NamedTuple):
  """Of a value as it is written out: what occurs twice counts twice."""

  entries: int
  characters: int
  depth: int

  @property
  def total(self) -> int:
    return self.entries + self.characters


class _Meter:
  """The budget of one rendering."""

  def __init__(self):
    self._steps = 0
    self._sizes: dict[int, tuple[Any, _Size]] = {}  # of lists and mappings, which nothing changes

  def spend(self, steps: int) -> None:
    self._steps += steps
    if self._steps > MAX_STEPS:
      raise LimitError(f"takes more than {MAX_STEPS:,} steps")

  def foresee(self, total: int) -> None:
    """Refuses what would have so many characters and entries."""
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
    self.spend(_ENTRY * len(value))
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
    """Pays for a new value; gives it back, a generator as one that pays for what it gives."""
    if isinstance(value, GeneratorType):
      return self._each(value)
    if isinstance(value, _TEXTS):
      self.foresee(len(value))
      self.spend(len(value) // _CHARACTERS_A_STEP)
    else:
      self.size(value)
    return value

  def _each(self, values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
      self.spend(_ACTION)
      yield value


_meter: contextvars.ContextVar[_Meter] = contextvars.ContextVar("meter")


def _total(meter: _Meter, values: Sequence[Any]) -> int:
  return sum(meter.size(value).total for value in values)


def _largest(values: Sequence[Any]) -> int:
  return max((abs(v) for v in values if isinstance(v, int)), default=0)


def _padded(meter: _Meter, values: Sequence[Any]) -> int:
  return _total(meter, values) + _largest(values)


def _at_each(mark: str) -> Callable[[_Meter, Sequence[Any]], int]:
  def size(meter: _Meter, values: Sequence[Any]) -> int:
    added = _largest(values) + _total(meter, values[1:])
    return _total(meter, values) + str(values[0]).count(mark) * added + added

  return size


def _replaced(meter: _Meter, values: Sequence[Any]) -> int:
  text, old, new = map(str, [*values, "", ""][:3])
  return len(text) + (text.count(old) + 1) * len(new)


def _joined(meter: _Meter, values: Sequence[Any]) -> int:
  many = (*_TEXTS, list, tuple, range, Mapping, *_VIEWS)
  counts = [len(v) for v in values if isinstance(v, many)]
  between = max((len(v) for v in values if isinstance(v, _TEXTS)), default=0)
  return _total(meter, values) + max(counts, default=0) * between


def _translated(meter: _Meter, values: Sequence[Any]) -> int:
  return _total(meter, values[:1]) * _total(meter, values[1:])


def _summed(meter: _Meter, values: Sequence[Any]) -> int:
  items = values[0] if isinstance(values[0], (list, tuple)) else ()
  plain = all(isinstance(item, int | float) for item in [*items, *values[1:]])
  return 0 if plain else (len(items) + 1) * _total(meter, values)


def _rounded(meter: _Meter, values: Sequence[Any]) -> int:
  return _largest(values[1:]) << 14  # ten to this power is computed


def _as_json(meter: _Meter, values: Sequence[Any]) -> int:
  size, added = meter.size(values[0]), _largest(values[1:]) + _total(meter, values[1:])
  return 6 * size.characters + size.entries * (4 + size.depth * added)


def _widths(text: str, values: Sequence[Any]) -> int:
  """The sum of all numbers that could be a width."""
  found = re.findall(r"\d+", text)
  for value in values:
    found += re.findall(r"\d+", value) if isinstance(value, str) else []
  return sum(int(n) if len(n) < 20 else MAX_CHARACTERS for n in found) + _largest(values)


_PERCENT = re.compile(r"%(?:\([^)]*\))?([-#0 +]*(?:\d+|\*)?(?:\.(?:\d+|\*)?)?)")


def _percent(meter: _Meter, values: Sequence[Any]) -> int:
  """Of `values[0] % values[1:]`."""
  text, rest = str(values[0]), values[1:]
  found = _PERCENT.findall(text)
  widths = "".join(f"{flags} " for flags in found)
  starred = _flat(rest) if "*" in widths else ()
  return len(text) + len(found) * _total(meter, rest) + _widths(widths, starred)


def _flat(values: Sequence[Any]) -> list[Any]:
  return [v for value in values for v in (value if isinstance(value, tuple) else (value,))]


def _braces(meter: _Meter, values: Sequence[Any]) -> int:
  """Of `values[0].format(*values[1:])`."""
  text, rest = values[0], values[1:]
  total, fields = len(text), 0
  for _, field, spec, _ in string.Formatter().parse(str(text)):
    if field is None:
      continue
    if "." in field:
      raise LimitError("formats attributes of a value, which are not measured")
    fields += 1
    inner = _flat([*rest, *(v for r in rest if isinstance(r, Mapping) for v in r.values())])
    total += _widths(spec, inner if "{" in spec else ())
  return total + fields * _total(meter, rest)


_GROWTH: dict[str, Callable[[_Meter, Sequence[Any]], int]] = {
  **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "truncate"),
                  _padded),
  "expandtabs": _at_each("\t"), "indent": _at_each("\n"), "replace": _replaced, "join": _joined,
  "translate": _translated, "sum": _summed, "round": _rounded, "tojson": _as_json,
  "pprint": lambda meter, values: meter.size(values[0]).total * (1 + meter.size(values[0]).depth),
}
_METHODS = {**_GROWTH, "format": _braces, "format_map": _braces}
_FILTERS = {**_GROWTH, "format": _percent}
_ORDERING = ("sort", "unique", "groupby", "min", "max", "dictsort")
_READ_LITTLE = ("startswith", "endswith", "length", "count", "first", "last", "default", "d")


def _before(meter: _Meter, name: str, growth, args: Sequence[Any], kwargs: Mapping) -> list[Any]:
  """Pays for a call and foresees what it makes; gives its arguments, which a join reads twice."""
  meter.spend(_ACTION)
  args = [list(a) if name == "join" and isinstance(a, Iterator) else a for a in args]
  values = [*args, *kwargs.values()]
  if name in _ORDERING:
    meter.compared(*values)
  if name not in _READ_LITTLE:
    meter.taken(*values)
  if name in growth:
    meter.foresee(growth[name](meter, values))
  return args


def _metered_filter(name: str, function: Callable) -> Callable:
  hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

  @functools.wraps(function)
  def call(*args, **kwargs):
    meter = _meter.get()
    shown = _before(meter, name, _FILTERS, args[hidden:], kwargs)
    return meter.made(function(*args[:hidden], *shown, **kwargs))

  return call


def _metered_test(name: str, function: Callable) -> Callable:
  hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

  @functools.wraps(function)
  def call(*args, **kwargs):
    meter = _meter.get()
    meter.spend(_TEST)
    if len(args) > hidden + 1 or name in ("lower", "upper"):
      meter.compared(*args[hidden:])
    return function(*args, **kwargs)

  return call


class _Namespace(utils.Namespace):
  """Written out without what it holds, which may change after it was measured."""

  def __repr__(self) -> str:
    return "<Namespace>"


class MeteredEnvironment(sandbox.ImmutableSandboxedEnvironment):
  """The immutable sandbox, in which a template made by `compiled` pays for what it does."""

  intercepted_binops = frozenset(("+", "*", "**", "%"))

  def __init__(self, **options: Any):
    super().__init__(optimized=False, **options)  # constants are not computed while compiling
    del self.globals["lipsum"]
    self.globals["namespace"] = _Namespace
    self.filters = {
      name: _metered_filter(name, function) for name, function in self.filters.items()
      if name not in _WITHOUT
    }
    self.tests = {name: _metered_test(name, function) for name, function in self.tests.items()}
    self.filters |= _HOOKS

  def add_filter(self, name: str, function: Callable) -> None:
    self.filters[name] = _metered_filter(name, function)

  def call(self, context, obj, /, *args, **kwargs):
    meter, name = _meter.get(), getattr(obj, "__name__", "")
    owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
    if isinstance(owner, (*_TEXTS, int)):
      _, *args = _before(meter, name, _METHODS, (owner, *args), kwargs)
    else:
      meter.spend(_ACTION)
    return meter.made(super().call(context, obj, *args, **kwargs))

  def call_binop(self, context, operator, left, right):
    meter = _meter.get()
    meter.spend(_ACTION)
    if operator == "*":
      for many, times in ((left, right), (right, left)):
        if isinstance(many, (*_TEXTS, list, tuple)) and isinstance(times, int):
          meter.foresee(meter.size(many).total * times)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
      if left.bit_length() * right > _MAX_BITS:
        raise LimitError(f"makes a number of more than {_MAX_BITS:,} bits")
    elif operator == "%" and isinstance(left, _TEXTS):
      meter.foresee(_percent(meter, (left, right)))
    return meter.made(super().call_binop(context, operator, left, right))


def compiled(environment: MeteredEnvironment, source: str) -> jinja2.Template:
  """A template that pays for its loops, its texts and what it compares, beside its calls."""
  tree = _Metered().visit(environment.parse(source))
  tree.set_environment(environment)
  return environment.from_string(tree)


def run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """The text that a template of `compiled` makes of variables.

  Raises:
    LimitError: it does too much, or writes more than `MAX_CHARACTERS`.
  """
  token = _meter.set(_Meter())
  try:
    pieces, length = [], 0
    for piece in template.generate(variables):
      length += len(piece)
      if length > MAX_CHARACTERS:
        raise LimitError(f"writes more than {MAX_CHARACTERS:,} characters")
      pieces.append(piece)
    return "".join(pieces)
  finally:
    _meter.reset(token)


# What `_Metered` puts into a template: filters whose names no template can write. They ask for the
# context, which keeps Jinja from computing them while it compiles.


@jinja2.pass_context
def _round(context, value):
  _meter.get().spend(_ACTION)
  return value


@jinja2.pass_context
def _text(context, length):
  _meter.get().spend(_ACTION + length // _CHARACTERS_A_STEP)


@jinja2.pass_context
def _made(context, value):
  meter = _meter.get()
  meter.spend(_ACTION)
  return meter.made(value)


@jinja2.pass_context
def _written(context, value):
  meter = _meter.get()
  size = meter.size(value)
  meter.foresee(size.characters)
  meter.spend(_ACTION + size.characters // _CHARACTERS_A_STEP)
  return value


@jinja2.pass_context
def _compared(context, value):
  _meter.get().compared(value)
  return value


@jinja2.pass_context
def _concatenated(context, parts):
  meter = _meter.get()
  meter.spend(_ACTION)
  meter.foresee(_total(meter, parts))
  join = runtime.markup_join if context.eval_ctx.autoescape else runtime.str_join
  return meter.made(join(parts))


_HOOKS = {
  " round": _round, " text": _text, " made": _made, " written": _written, " compared": _compared,
  " concatenated": _concatenated,
}


def _hooked(name: str, node: nodes.Expr) -> nodes.Filter:
  return nodes.Filter(node, f" {name}", [], [], None, None, lineno=node.lineno)


class _Metered(visitor.NodeTransformer):
  """Puts the filters of `_HOOKS` around what Jinja does without asking its environment."""

  def visit_For(self, node):
    self.generic_visit(node)
    start = nodes.Const(True, lineno=node.lineno)
    node.body.insert(0, nodes.ExprStmt(_hooked("round", start), lineno=node.lineno))
    if node.test is not None:
      node.test = nodes.And(_hooked("round", start), node.test, lineno=node.lineno)
    return node

  def visit_Output(self, node):
    self.generic_visit(node)
    length = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
    node.nodes = [
      n if isinstance(n, nodes.TemplateData) else _hooked("written", n) for n in node.nodes
    ]
    paid = _hooked("text", nodes.Const(length, lineno=node.lineno))
    return [nodes.ExprStmt(paid, lineno=node.lineno), node]

  def visit_Concat(self, node):
    self.generic_visit(node)
    return _hooked("concatenated", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

  def visit_List(self, node):
    self.generic_visit(node)
    constant = all(isinstance(n, nodes.Const) for n in node.iter_child_nodes())
    return node if constant or getattr(node, "ctx", "load") != "load" else _hooked("made", node)

  visit_Tuple = visit_List

  def visit_Dict(self, node):
    self.generic_visit(node)
    return _hooked("made", node)

  def visit_Getitem(self, node):
    self.generic_visit(node)
    return _hooked("made", node) if isinstance(node.arg, nodes.Slice) else node

  def visit_Compare(self, node):
    self.generic_visit(node)
    if not isinstance(node.expr, nodes.Const):
      node.expr = _hooked("compared", node.expr)
    for operand in node.ops:
      if not isinstance(operand.expr, nodes.Const):
        operand.expr = _hooked("compared", operand.expr)
    return node
