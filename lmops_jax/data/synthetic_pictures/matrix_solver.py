"""What the rules of matrices mean, told by their results: which candidates make all rules hold.

It shares no code with the making of items, reads no rule from them, and so checks them.
"""

from __future__ import annotations

from lmops_jax.data.synthetic_pictures.matrices import Grid, Matrix, rows_of
from lmops_jax.data.synthetic_pictures.matrix_cells import ORDERED


def fitting_candidates(matrix: Matrix) -> tuple[int, ...]:
  """All candidates with which each attribute follows some rule; of a sound item, the right one."""
  return tuple(
    i for i in range(len(matrix.candidates))
    if all(rules_that_hold(name, grid) for name, grid in rows_of(matrix, i).items())
  )


def rules_that_hold(attribute: str, grid: Grid) -> frozenset[str]:
  """The rules that a whole grid of values follows."""
  found = {name for name, holds in _HOLDS.items() if holds(grid)}
  return frozenset(found if attribute in ORDERED else found - {"progression"})


def _is_constant(grid: Grid) -> bool:
  return all(len(set(row)) == 1 for row in grid)


def _progresses(grid: Grid) -> bool:
  steps = {b - a for row in grid for a, b in zip(row, row[1:])}
  return len(steps) == 1 and steps != {0}


def _changes(grid: Grid) -> bool:
  return len(grid) == len(grid[0]) == 2 and len(set(grid)) == 1 and grid[0][0] != grid[0][1]


def _alternates(grid: Grid) -> bool:
  (row, *others) = grid
  return not others and len(set(row)) == 2 and len(set(row[::2])) == len(set(row[1::2])) == 1


def _has_three(grid: Grid) -> bool:
  sets = {frozenset(row) for row in grid}
  return len(grid) == 3 and len(sets) == 1 and len(sets.pop()) == 3


_HOLDS = {
  "constant": _is_constant, "progression": _progresses, "change": _changes,
  "alternation": _alternates, "three": _has_three,
}
