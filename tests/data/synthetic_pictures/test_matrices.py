"""Raven's matrices: exactly one right answer by rules that the checker reads off the cells."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lmops_jax.data.synthetic_pictures import Matrices, fitting_candidates
from lmops_jax.data.synthetic_pictures.matrices import LAYOUTS, rows_of
from lmops_jax.data.synthetic_pictures.matrix_cells import NUM_VALUES, Cell, draw_cell
from lmops_jax.data.synthetic_pictures.matrix_solver import rules_that_hold

WORLD = Matrices()
SEEN = [WORLD.matrix(0, i) for i in range(600)]
HELD_OUT = [WORLD.matrix(0, i, held_out=True) for i in range(300)]


def test_exactly_one_candidate_fits():
  for matrix in (*SEEN, *HELD_OUT):
    assert fitting_candidates(matrix) == (matrix.label,)
    for name, grid in rows_of(matrix, matrix.label).items():
      assert matrix.rules[name] in rules_that_hold(name, grid)


def test_no_other_value_fits_in_the_last_place():
  """Brute force over all values of each attribute: the right answer does not lean on candidates."""
  for matrix in (*SEEN, *HELD_OUT):
    for name, grid in rows_of(matrix, matrix.label).items():
      *rows, last = grid
      fitting = [
        value for value in range(NUM_VALUES[name])
        if rules_that_hold(name, (*rows, (*last[:-1], value)))
      ]
      assert fitting == [last[-1]]


def test_candidates_differ_from_the_right_one_in_one_attribute():
  for matrix in SEEN:
    right = matrix.candidates[matrix.label]
    assert len(set(matrix.candidates)) == 6
    differences = sorted(sum(a != b for a, b in zip(right, c)) for c in matrix.candidates)
    assert differences == [0, 1, 1, 1, 1, 1]


def test_places_and_layouts_are_even():
  for counts, num in (
    (Counter(m.label for m in SEEN), 6), (Counter(len(m.context) for m in SEEN), 3)
  ):
    expected = len(SEEN) / num
    assert len(counts) == num
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 20.5  # its 99.9th percentile for 5 degrees of freedom


def test_rules_are_held_out():
  def names(matrix):
    return {f"{name}:{rule}" for name, rule in matrix.rules.items() if rule != "constant"}

  held_out = {"shade:progression", "frame:three"}
  assert all(1 <= len(names(m)) <= 2 for m in (*SEEN, *HELD_OUT))
  assert not any(names(m) & held_out for m in SEEN)
  assert all(len(names(m) & held_out) == 1 for m in HELD_OUT)
  assert set.union(*map(names, HELD_OUT)) >= held_out
  assert set.union(*map(names, SEEN)) == {
    *("size:" + r for r in ("change", "alternation", "three", "progression")),
    *("shade:" + r for r in ("change", "alternation", "three")),
    *("shape:" + r for r in ("change", "alternation", "three")),
    *("frame:" + r for r in ("change", "alternation")),
  }


def test_an_item_is_a_function_of_seed_and_index():
  assert Matrices().matrix(0, 41) == SEEN[41] != WORLD.matrix(1, 41)
  assert len({(m.context, m.candidates) for m in SEEN}) == len(SEEN)


def test_different_cells_have_different_pictures():
  """Each changed attribute can be seen: any two cells differ clearly in some pixels."""
  cells = [Cell(*values) for values in itertools.product(*map(range, NUM_VALUES.values()))]
  pictures = np.stack([draw_cell(cell, 48)[..., 0] for cell in cells]).reshape(len(cells), -1)
  pictures = pictures.astype(np.float32)
  norms = (pictures**2).sum(axis=1)
  squared = norms[:, None] + norms - 2 * pictures @ pictures.T
  np.fill_diagonal(squared, np.inf)
  assert squared.min() > 3 * 40**2  # three pixels by 40 grey levels each


def test_the_pictures_and_the_text_of_an_item():
  for matrix in SEEN[:20]:
    context, candidates = map(WORLD.pictures, (matrix.context, matrix.candidates))
    assert all(picture.shape == (48, 48, 3) for picture in (*context, *candidates))
    assert len(context) == len(matrix.context) and len(candidates) == 6
    assert matrix.prompt.count("<image>") == len(context) + 1
    told = {name for name in NUM_VALUES if f"The {name} " in matrix.text}
    assert told == {name for name, rule in matrix.rules.items() if rule != "constant"}
    for more, name, grows in (("larger", "size", 1), ("lighter", "shade", -1)):
      if f"The {name} gets {more}" in matrix.text:
        first, second = (getattr(cell, name) for cell in matrix.context[:2])
        assert np.sign(second - first) == grows


@pytest.mark.parametrize("num", LAYOUTS)
def test_one_layout_alone(num):
  world = Matrices(num_context=(num,), held_out_rules=())
  assert {len(world.matrix(0, i).context) for i in range(20)} == {num}
  with pytest.raises(ValueError, match=f"no rule for matrices with {num} pictures of context"):
    world.matrix(0, 0, held_out=True)


@pytest.mark.parametrize("settings,message", [
  ({"held_out_rules": ["hue:three"]}, "has 'hue:three', which is none of frame:alternation"),
  ({"num_context": [5]}, r"num_context\[0\]=5 must be"),
  ({"least_rules": 3}, "least_rules=3 and most_rules=2 must not decrease and be at most 4"),
  ({"most_rules": 4, "held_out_rules": ["frame:change"]}, "leaves rules for 3 attributes.*with 3 "),
])
def test_bad_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    Matrices(**settings)


@pytest.mark.parametrize("attribute,grid,rules", [
  ("size", ((1, 2), (3, 4)), {"progression"}),
  ("shape", ((1, 2), (3, 4)), set()),
  ("size", ((1, 2), (1, 2)), {"progression", "change"}),
  ("shape", ((1, 1), (0, 0)), {"constant"}),
  ("size", ((0, 1, 2, 3, 4),), {"progression"}),
  ("size", ((0, 1, 0, 1, 0),), {"alternation"}),
  ("shape", ((0, 1, 0, 1, 1),), set()),
  ("shape", ((0, 1, 2), (2, 0, 1), (1, 2, 0)), {"three"}),
  ("size", ((0, 1, 2), (0, 1, 2), (0, 1, 2)), {"three", "progression"}),
  ("size", ((4, 2, 0), (4, 2, 0), (4, 2, 1)), set()),
])
def test_the_checker_by_hand(attribute, grid, rules):
  assert rules_that_hold(attribute, grid) == rules
