"""Formulas that a model writes, as trees: a small grammar with limits, read by a parser of our own.

Nothing that is read here is evaluated by Python or handed to another parser. Characters outside of
the grammar, long texts, deep nesting and long numbers are refused while reading.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

MAX_CHARS, MAX_DEPTH, MAX_DIGITS, MAX_NAME = 1000, 50, 60, 16


class Refused(ValueError):
  """A formula that is not in the grammar or beyond its limits; the text says which, for a model."""


class Node(NamedTuple):
  """A part of a formula.

  Attributes:
    kind: "number", "name", "call", or an operator.
    text: of a number or name, or the function's name.
    parts: operands or arguments.
  """

  kind: str
  text: str = ""
  parts: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grammar:
  """What a kind of formula is made of.

  Attributes:
    levels: binary operators from the loosest; each level holds spellings and what they mean.
    right: meanings that group to the right.
    alone: meanings of which a formula holds one at most, outside of all brackets.
    prefixes: spellings of operators in front of one operand, and what they mean.
    prefix_above: number of the level whose operators bind more tightly than a prefix.
    functions: names and how many arguments they take.
    constants: names that are no variables.
    has_numbers: whether numbers occur.
  """

  levels: Sequence[Mapping[str, str]]
  prefixes: Mapping[str, str]
  prefix_above: int
  right: frozenset[str] = frozenset()
  alone: frozenset[str] = frozenset()
  functions: Mapping[str, int] = dataclasses.field(default_factory=dict)
  constants: frozenset[str] = frozenset()
  has_numbers: bool = False

  @property
  def signs(self) -> list[str]:
    """All spellings, the longest first."""
    found = {sign for level in self.levels for sign in level} | set(self.prefixes) | {"(", ")", ","}
    return sorted(found, key=lambda sign: (-len(sign), sign))


def parse(text: str, grammar: Grammar) -> Node:
  """The tree of a formula.

  Raises:
    Refused: saying what is not taken.
  """
  if len(text) > MAX_CHARS:
    raise Refused(f"it has {len(text)} characters, and at most {MAX_CHARS} are taken")
  return _Parser(_tokens(text, grammar), grammar).whole()


def folded(node: Node, combine: Callable[[Node, list[T]], T]) -> T:
  """`combine(part, what its parts came to)` of a whole formula, from the inside out.

  Without recursion: a sum of many terms is as deep as it is long.
  """
  found: list[T] = []
  waiting = [(node, False)]
  while waiting:
    one, is_ready = waiting.pop()
    if is_ready:
      start = len(found) - len(one.parts)
      found[start:] = [combine(one, found[start:])]
    else:
      waiting.append((one, True))
      waiting += [(part, False) for part in reversed(one.parts)]
  return found[0]


def names_of(node: Node) -> list[str]:
  """The variables of a formula, in alphabetical order."""
  found, waiting = set(), [node]
  while waiting:
    one = waiting.pop()
    if one.kind == "name":
      found.add(one.text)
    waiting += one.parts
  return sorted(found)


def variables(node: Node, most: int) -> list[str]:
  """The same, at most so many.

  Raises:
    Refused: for more.
  """
  names = names_of(node)
  if len(names) > most:
    raise Refused(f"it has {len(names)} variables, and at most {most} are taken")
  return names


def _tokens(text: str, grammar: Grammar) -> list[str]:
  words = [sign for sign in grammar.signs if sign.isalpha()]
  signs = "|".join(re.escape(sign) for sign in grammar.signs if not sign.isalpha())
  pattern = re.compile(rf"\s*(?:([0-9]+(?:\.[0-9]+)?)|([A-Za-z][A-Za-z0-9_]*)|({signs}))", re.ASCII)
  found, at, end = [], 0, len(text.rstrip())
  while at < end:
    match = pattern.match(text, at)
    if match is None:
      rest = text[at:].lstrip()
      raise Refused(f"the character {rest[0]!r} has no place in it")
    number, name, _ = match.groups()
    if number and not grammar.has_numbers:
      raise Refused(f"it holds the number {number[:20]}, and formulas of this kind hold none")
    if number and len(number) > MAX_DIGITS:
      raise Refused(f"a number has {len(number)} digits, and at most {MAX_DIGITS} are taken")
    if name and len(name) > MAX_NAME and name not in words:
      raise Refused(f"the name {name[:20]!r} has more than {MAX_NAME} characters")
    found.append(match[match.lastindex])
    at = match.end()
  if not found:
    raise Refused("it is empty")
  return found


class _Parser:
  """Reads tokens by recursive descent; the depth is counted, so that it ends before Python does."""

  def __init__(self, tokens: list[str], grammar: Grammar):
    self._tokens, self._grammar, self._at, self._depth = tokens, grammar, 0, 0
    self._used: set[str] = set()

  def whole(self) -> Node:
    node = self._binary(0)
    if self._at < len(self._tokens):
      raise Refused(f"{self._tokens[self._at]!r} is one too many")
    return node

  def _next(self) -> str | None:
    return self._tokens[self._at] if self._at < len(self._tokens) else None

  def _binary(self, level: int) -> Node:
    grammar = self._grammar
    if level == grammar.prefix_above and self._next() in grammar.prefixes:
      meaning = grammar.prefixes[self._tokens[self._at]]
      self._at += 1
      return Node(meaning, parts=(self._deeper(lambda: self._binary(level)),))
    if level == len(grammar.levels):
      return self._atom()
    left = self._binary(level + 1)
    while self._next() in grammar.levels[level]:
      meaning = grammar.levels[level][self._tokens[self._at]]
      if meaning in grammar.alone:
        if self._depth or self._used:
          raise Refused(f"{self._tokens[self._at]!r} compares, which is done once and outside of "
                        "brackets")
        self._used.add(meaning)
      self._at += 1
      if meaning in grammar.right:
        return Node(meaning, parts=(left, self._deeper(lambda: self._right(level))))
      left = Node(meaning, parts=(left, self._binary(level + 1)))
    return left

  def _right(self, level: int) -> Node:
    """The right side of an operator that groups to the right, which may have a sign of its own."""
    if self._next() in self._grammar.prefixes and level >= self._grammar.prefix_above:
      return self._binary(self._grammar.prefix_above)
    return self._binary(level)

  def _deeper(self, read):
    self._depth += 1
    if self._depth > MAX_DEPTH:
      raise Refused(f"it is nested more than {MAX_DEPTH} deep")
    node = read()
    self._depth -= 1
    return node

  def _atom(self) -> Node:
    token = self._next()
    if token is None:
      raise Refused("it ends too early")
    self._at += 1
    if token == "(":
      node = self._deeper(lambda: self._binary(0))
      self._expect(")")
      return node
    if token[0].isdigit():
      return Node("number", token)
    if token[0].isalpha() and token not in self._grammar.signs:
      if self._next() == "(":
        return self._call(token)
      if token in self._grammar.functions:
        raise Refused(f"the function {token} has no arguments")
      return Node("constant" if token in self._grammar.constants else "name", token)
    raise Refused(f"{token!r} stands where a number, a name or a bracket should")

  def _call(self, name: str) -> Node:
    count = self._grammar.functions.get(name)
    if count is None:
      known = ", ".join(sorted(self._grammar.functions)) or "none"
      raise Refused(f"there is no function {name}; there are: {known}")
    self._at += 1
    parts = [self._deeper(lambda: self._binary(0))]
    while self._next() == ",":
      self._at += 1
      parts.append(self._deeper(lambda: self._binary(0)))
    self._expect(")")
    if len(parts) != count:
      raise Refused(f"the function {name} takes {count} arguments and has {len(parts)}")
    return Node("call", name, tuple(parts))

  def _expect(self, sign: str) -> None:
    if self._next() != sign:
      raise Refused(f"a {sign!r} is missing")
    self._at += 1
