"""Nested integer expressions: "(left op right)", where each side is a number or an expression."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Sides(NamedTuple):
  """An expression taken apart."""

  left: str
  sign: str
  right: str


def balanced(
  generator: random.Random, levels: int, leaf: Callable[[], str], *, gap: str = " "
) -> str:
  """A balanced expression.

  Args:
    levels: of operators; there are 2**levels - 1 of them, and 0 is a number alone.
    leaf: makes a number.
    gap: on both sides of an operator.
  """
  if levels == 0:
    return leaf()
  left, right = (balanced(generator, levels - 1, leaf, gap=gap) for _ in range(2))
  return f"({left}{gap}{generator.choice('+-*')}{gap}{right})"


def sides(expression: str) -> Sides:
  """The two sides of an expression and its operator.

  Raises:
    ValueError: if it has none.
  """
  depth = 0
  for i, c in enumerate(expression):
    depth += (c == "(") - (c == ")")
    before = expression[:i].rstrip()[-1:]
    if depth == 1 and c in OPERATIONS and (before.isdigit() or before == ")"):
      return Sides(expression[1:i].strip(), c, expression[i + 1 : -1].strip())
  raise ValueError(f"{expression!r} has no operator.")


def value(expression: str, modulus: int | None = None) -> int:
  """What an expression comes to; each operator's result is taken modulo `modulus`."""
  if not expression.startswith("("):
    return int(expression)
  left, sign, right = sides(expression)
  return applied(sign, value(left, modulus), value(right, modulus), modulus)


def applied(sign: str, left: int, right: int, modulus: int | None = None) -> int:
  """The result of one operator."""
  found = OPERATIONS[sign](left, right)
  return found if modulus is None else found % modulus


def reductions(expression: str, modulus: int | None = None) -> Iterator[str]:
  """The expression after each step that works out its first innermost operator."""
  while expression.startswith("("):
    end = expression.index(")")
    start = expression.rindex("(", 0, end)
    inner = expression[start : end + 1]
    expression = f"{expression[:start]}{value(inner, modulus)}{expression[end + 1 :]}"
    yield expression
