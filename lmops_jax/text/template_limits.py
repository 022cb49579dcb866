"""A Jinja sandbox that counts: other people's templates end, and make nothing large.

Every round of a loop, every call, filter and operator takes steps from a budget; to make a text or
a list takes more the larger it is. What could make something huge in one go (`'a' * 10**9`,
`'%0999999999d' | format(1)`, lists that hold themselves) is foreseen from its arguments and refused
before it is run. A template inside the limits gives the text that it gives without them.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes, runtime, sandbox, utils, visitor

from lmops_jax.text import template_meter
from lmops_jax.text.template_meter import ACTION, TEST, LimitError, Meter

_WITHOUT = ("urlize", "xmlattr", "striptags", "wordwrap")  # for pages of HTML, slow on long texts

_meter: contextvars.ContextVar[Meter] = contextvars.ContextVar("meter")


def _metered_filter(name: str, function: Callable) -> Callable:
  hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

  @functools.wraps(function)
  def call(*args, **kwargs):
    meter = _meter.get()
    shown = template_meter.call(meter, name, template_meter.FILTERS, args[hidden:], kwargs)
    return meter.made(function(*args[:hidden], *shown, **kwargs))

  return call


def _metered_test(name: str, function: Callable) -> Callable:
  hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

  @functools.wraps(function)
  def call(*args, **kwargs):
    meter = _meter.get()
    meter.spend(TEST)
    if len(args) > hidden + 1 or name in ("lower", "upper"):
      meter.compared(*args[hidden:])
    return function(*args, **kwargs)

  return call


class _Namespace(utils.Namespace):
  """A namespace whose text leaves out what it holds: that may change after it was measured."""

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
    if isinstance(owner, (str, bytes, int)):
      _, *args = template_meter.call(meter, name, template_meter.METHODS, (owner, *args), kwargs)
    else:
      meter.spend(ACTION)
    return meter.made(super().call(context, obj, *args, **kwargs))

  def call_binop(self, context, operator, left, right):
    meter = _meter.get()
    template_meter.operate(meter, operator, left, right)
    return meter.made(super().call_binop(context, operator, left, right))


def compiled(environment: MeteredEnvironment, source: str) -> jinja2.Template:
  """A template that pays for its loops, its texts and what it compares, beside its calls."""
  tree = _Metered().visit(environment.parse(source))
  tree.set_environment(environment)
  return environment.from_string(tree)


def run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """The text that a template of `compiled` makes of variables.

  Raises:
    LimitError: if it does too much, or writes more than `template_meter.MAX_CHARACTERS`.
  """
  token = _meter.set(Meter())
  try:
    pieces, length = [], 0
    for piece in template.generate(variables):
      length += len(piece)
      if length > template_meter.MAX_CHARACTERS:
        raise LimitError(f"writes more than {template_meter.MAX_CHARACTERS:,} characters")
      pieces.append(piece)
    return "".join(pieces)
  finally:
    _meter.reset(token)


# What `_Metered` puts into a template: filters whose names no template can write. They ask for the
# context, which keeps Jinja from computing them while it compiles.


@jinja2.pass_context
def _round(context, value):
  _meter.get().spend(ACTION)
  return value


@jinja2.pass_context
def _text(context, length):
  _meter.get().written(length)


@jinja2.pass_context
def _made(context, value):
  meter = _meter.get()
  meter.spend(ACTION)
  return meter.made(value)


@jinja2.pass_context
def _written(context, value):
  meter = _meter.get()
  meter.written(meter.size(value).characters)
  return value


@jinja2.pass_context
def _compared(context, value):
  _meter.get().compared(value)
  return value


@jinja2.pass_context
def _concatenated(context, parts):
  meter = _meter.get()
  meter.spend(ACTION)
  meter.foresee(template_meter.total(meter, parts))
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
