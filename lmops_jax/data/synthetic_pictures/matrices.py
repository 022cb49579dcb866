"""Raven's matrices made from rules, with exactly one right answer (Kosmos-1, arXiv:2302.14045).

An item has 3 pictures of context (2x2), 4 (one row of five) or 8 (3x3), and six candidates for the
last place. Each attribute of the pictures follows a rule along the rows; a candidate is right if
all rules hold with it. The wrong ones are the right one with a single attribute changed, so each
breaks one rule. (Who sees all six at once could find the right one without the context, as the
value of each attribute that most of them have; the protocol shows a candidate at a time.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np

from lmops_jax.config.setting_types import Distinct, NonEmpty, PositiveInt, at_least, component
from lmops_jax.data.synthetic_pictures.matrix_cells import (
  ATTRIBUTES,
  NUM_VALUES,
  ORDERED,
  Cell,
  draw_cell,
)
from lmops_jax.data.tasks.picture_prompts import matrix_prompt

LAYOUTS = {3: (2, 2), 4: (1, 5), 8: (3, 3)}  # rows and columns by the pictures of context
NUM_CANDIDATES = 6
_RULES = {  # besides "constant", which any attribute can follow; True: only those with an order
  (2, 2): {"change": False, "progression": True},
  (1, 5): {"alternation": False, "progression": True},
  (3, 3): {"three": False, "progression": True},
}
_IN_WORDS = {
  "change": "changes from left to right in the same way in each row",
  "progression": "gets {more} by equal steps from left to right",
  "alternation": "alternates between two values from left to right",
  "three": "takes the same three values in each row",
}

_MORE = {"size": ("smaller", "larger"), "shade": ("lighter", "darker")}

Grid = tuple[tuple[int, ...], ...]


class Matrix(NamedTuple):
  """One item.

  Attributes:
    context: the cells in reading order, without the last.
    candidates: six different cells.
    label: of the right one.
    rules: of each attribute; "constant" if it does not vary along the rows.
  """

  context: tuple[Cell, ...]
  candidates: tuple[Cell, ...]
  label: int
  rules: dict[str, str]

  @property
  def text(self) -> str:
    """The rules in words."""
    told = []
    for name, rule in self.rules.items():
      if rule != "constant":
        grows = getattr(self.context[1], name) > getattr(self.context[0], name)
        more = _MORE[name][grows] if name in _MORE else ""
        told.append(f"The {name} {_IN_WORDS[rule].format(more=more)}.")
    return " ".join([*told, "Nothing else changes within a row."])

  @property
  def prompt(self) -> str:
    """Kosmos-1's prompt for a candidate, with `<image>` for the context and for the candidate."""
    return matrix_prompt(len(self.context))


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Matrices:
  """A world of matrices.

  Attributes:
    num_context: how many pictures of context an item may have, each as often.
    least_rules, most_rules: how many attributes vary along the rows.
    held_out_rules: "attribute:rule", such as "shade:progression", that no item to train on has.
    side: of a picture, pixels.

  Raises:
    ValueError: unknown rules to hold out, or too few left for some layout.
  """

  num_context: Annotated[Sequence[Literal[3, 4, 8]], NonEmpty, Distinct] = (3, 4, 8)
  least_rules: PositiveInt = 1
  most_rules: PositiveInt = 2
  held_out_rules: Annotated[Sequence[str], Distinct] = ("shade:progression", "frame:three")
  side: at_least(24) = 48

  def __post_init__(self):
    known = {name for layout in _RULES for name in _names(layout)}
    unknown = [name for name in self.held_out_rules if name not in known]
    if unknown:
      raise ValueError(
        f"data.Matrices.held_out_rules has {unknown[0]!r}, which is none of "
        f"{', '.join(sorted(known))}."
      )
    if not self.least_rules <= self.most_rules <= len(ATTRIBUTES):
      raise ValueError(
        f"data.Matrices.least_rules={self.least_rules} and most_rules={self.most_rules} must not "
        f"decrease and be at most {len(ATTRIBUTES)}, the number of attributes."
      )
    for num in self.num_context:
      free = {name.partition(":")[0] for name in self._seen(LAYOUTS[num])}
      if len(free) < self.most_rules:
        raise ValueError(
          f"data.Matrices.held_out_rules leaves rules for {len(free)} attributes of matrices with "
          f"{num} pictures of context, and most_rules={self.most_rules}; hold fewer out."
        )

  def matrix(self, seed: int, index: int, held_out: bool = False) -> Matrix:
    """The item of a seed and an index.

    Args:
      held_out: whether a held-out rule is among its rules; else none is.

    Raises:
      ValueError: held-out rules are asked for and no layout has any.
    """
    draws = np.random.default_rng((seed, index, held_out, 5))
    layouts = [LAYOUTS[num] for num in self.num_context]
    if held_out:
      layouts = [layout for layout in layouts if self._kept(layout)]
    if not layouts:
      raise ValueError(
        f"data.Matrices.held_out_rules={tuple(self.held_out_rules)} has no rule for matrices with "
        f"{' or '.join(map(str, self.num_context))} pictures of context; hold one out."
      )
    layout = layouts[draws.integers(len(layouts))]
    rules = self._rules(draws, layout, held_out)
    grids = {name: _grid(draws, name, rules[name], layout) for name in ATTRIBUTES}
    cells = [
      Cell(*(grids[name][row][column] for name in ATTRIBUTES))
      for row, column in itertools.product(*map(range, layout))
    ]
    candidates, label = _candidates(draws, cells[-1])
    return Matrix(tuple(cells[:-1]), candidates, label, rules)

  def pictures(self, cells: Sequence[Cell]) -> tuple[np.ndarray, ...]:
    """Of a context or of candidates, each `[side,side,3] uint8`."""
    return tuple(draw_cell(cell, self.side) for cell in cells)

  def _seen(self, layout) -> list[str]:
    return [name for name in _names(layout) if name not in self.held_out_rules]

  def _kept(self, layout) -> list[str]:
    return [name for name in _names(layout) if name in self.held_out_rules]

  def _rules(self, draws: np.random.Generator, layout, held_out: bool) -> dict[str, str]:
    """The rule of each attribute: some seen ones and, if `held_out`, one that is held out."""
    num = int(draws.integers(self.least_rules, self.most_rules + 1))
    order = [self._kept(layout)] * held_out + [self._seen(layout)]
    rules: dict[str, str] = {}
    for names in order:
      for i in draws.permutation(len(names)):
        attribute, _, rule = names[i].partition(":")
        if len(rules) < num and attribute not in rules:
          rules[attribute] = rule
          if names is not order[-1]:
            break
    return {name: rules.get(name, "constant") for name in ATTRIBUTES}


def rows_of(matrix: Matrix, candidate: int) -> dict[str, Grid]:
  """The values of each attribute by row and column, with a candidate in the last place."""
  columns = LAYOUTS[len(matrix.context)][1]
  cells = (*matrix.context, matrix.candidates[candidate])
  rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
  return {
    name: tuple(tuple(getattr(cell, name) for cell in row) for row in rows) for name in ATTRIBUTES
  }


@functools.cache
def _names(layout: tuple[int, int]) -> tuple[str, ...]:
  """All "attribute:rule" of a layout."""
  return tuple(
    f"{name}:{rule}" for rule, ordered in _RULES[layout].items()
    for name in (ORDERED if ordered else ATTRIBUTES)
  )


def _grid(draws: np.random.Generator, attribute: str, rule: str, layout: tuple[int, int]) -> Grid:
  """Values of an attribute that follow a rule."""
  rows, columns = layout
  num = NUM_VALUES[attribute]
  if rule == "constant":
    return tuple((int(value),) * columns for value in _of_rows(draws, num, rows))
  if rule in ("change", "alternation"):
    values = tuple(int(value) for value in draws.permutation(num)[:2])
    return (tuple(values[column % 2] for column in range(columns)),) * rows
  if rule == "three":
    values = [int(value) for value in draws.permutation(num)[:3]]
    turn = int(draws.integers(1, 3))
    return tuple(tuple(values[(c + turn * r) % 3] for c in range(3)) for r in range(rows))
  step = int(draws.integers(1, (num - 1) // (columns - 1) + 1))
  starts = draws.integers(num - step * (columns - 1), size=rows)
  if rows > 1 and starts[0] == starts[1]:  # else "three" could hold too, with another last value
    starts[:] = starts[0]
  grid = tuple(tuple(int(start) + step * c for c in range(columns)) for start in starts)
  return tuple(row[::-1] for row in grid) if draws.integers(2) else grid


def _of_rows(draws: np.random.Generator, num: int, rows: int) -> np.ndarray:
  """A value for each row: in half of the cases the same for all."""
  if draws.integers(2):
    return draws.integers(num, size=rows)
  return np.repeat(draws.integers(num), rows)


def _candidates(draws: np.random.Generator, right: Cell) -> tuple[tuple[Cell, ...], int]:
  """The right cell and five that differ from it in one attribute, in a drawn order."""
  wrong = [
    right._replace(**{name: value}) for name in ATTRIBUTES for value in range(NUM_VALUES[name])
    if value != getattr(right, name)
  ]
  chosen = [right, *(wrong[i] for i in draws.permutation(len(wrong))[: NUM_CANDIDATES - 1])]
  order = draws.permutation(NUM_CANDIDATES)
  return tuple(chosen[i] for i in order), int(np.flatnonzero(order == 0)[0])
