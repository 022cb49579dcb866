"""Prompts with vectors: what is checked, what two of them share, and how they become arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding import prompts
from lmops_jax.decoding.prompts import Prompt

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def _checked(*args):
  return prompts.checked(Prompt(*args), 3, "prompt 7")


def test_the_checked_form_has_no_ids_in_slots_and_vectors_in_order():
  got = _checked(np.array([5, -200, 999, 6]), jnp.asarray(TABLE), (-1, 3, 0, -1))
  assert got.ids == [5, 0, 0, 6] and len(got) == 4
  assert got.slots.tolist() == [False, True, True, False]
  np.testing.assert_array_equal(got.own_vectors(), TABLE[[3, 0]])
  np.testing.assert_array_equal(got.part(2).own_vectors(), TABLE[[0]])
  assert got.part(1, 3).ids == [0, 0]
  for words in (_checked([5, 6]), _checked([5, 6], TABLE, [-1, -1]), _checked([5, 6], TABLE[:0],
                [-1, -1]), prompts.checked((5, 6), 3, "")):
    assert words.ids == [5, 6] and words.vectors is None and words.index is None


@pytest.mark.parametrize(("args", "message"), [
  (([1, 2], TABLE), "prompt 7 has vectors and no index"),
  (([1, 2], None, [0, -1]), "prompt 7 has index and no vectors"),
  (([1, 2], TABLE[0], [0, -1]), r"of the shape \(3,\), and .* width 3"),
  (([1, 2], np.ones((4, 5)), [0, -1]), r"of the shape \(4, 5\), and .* width 3"),
  (([1, 2], TABLE, [0]), r"has 2 ids and an index of shape \(1,\)"),
  (([1, 2], TABLE, [0.0, -1.0]), "and type float64; give one whole number"),
  (([1, 2], TABLE, [-1, 4]), "index 4 at token 1, and there are 4 vectors"),
  (([1, 2], TABLE, [-2, 0]), "index -2 at token 0"),
  (([1, 2, 3], TABLE * [1, np.inf, 1], [-1, -1, 1]), "vector at token 2 that is not finite"),
])
def test_what_does_not_fit_is_named(args, message):
  with pytest.raises(ValueError, match=message):
    _checked(*args)


def test_vectors_that_no_slot_has_may_be_anything():
  table = TABLE.copy()
  table[2] = np.nan
  np.testing.assert_array_equal(_checked([1, 2], table, [1, -1]).own_vectors(), table[[1]])


def test_a_common_beginning_has_the_same_words_and_vectors():
  first = _checked([5, 0, 0, 6, 7], TABLE, [-1, 0, 1, -1, -1])
  other = np.where(np.arange(4)[:, None] == 1, 50, TABLE)
  for second, length in [
    (_checked([5, 9, 9, 6, 7], TABLE.copy(), [-1, 0, 1, -1, -1]), 5),
    (_checked([5, 0, 0, 6, 7], TABLE[::-1], [-1, 3, 2, -1, -1]), 5),  # from another table
    (_checked([5, 0, 0, 6, 7], other, [-1, 0, 1, -1, -1]), 2),
    (_checked([5, 0, 0, 6, 7], TABLE, [-1, 2, 1, -1, -1]), 1),
    (_checked([5, 0, 0, 6, 8], TABLE, [-1, 0, 1, -1, -1]), 4),
    (_checked([5, 0, 0, 6, 7]), 1),  # the words with the id 0
    (_checked([5, 0, 0, 6, 7], TABLE, [-1, 0, -1, -1, -1]), 2),
    (_checked([4, 0, 0, 6, 7], TABLE, [-1, 0, 1, -1, -1]), 0),
  ]:
    assert prompts.common_length(first, second, 9) == length
    assert prompts.common_length(second, first, 9) == length
    assert prompts.common_length(first, second, 1) == min(length, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_a_side_and_vectors_behind(side):
  given = [_checked([5, 0, 6], TABLE, [-1, 2, -1]), _checked([7, 8]),
           _checked([0, 4, 0, 0], TABLE, [0, -1, 0, 3])]
  got = prompts.padded(given, 4, 5, side)
  assert got.vectors.shape == (4, 16, 3) and got.valid.sum() == 9
  for row, prompt in enumerate(given):
    own = got.valid[row]
    assert own[-1 if side == "left" else 0] and got.tokens[row, own].tolist() == prompt.ids
    index = got.vector_index[row]
    assert (index[~own] == -1).all() and ((index >= 0)[own] == prompt.slots).all()
    np.testing.assert_array_equal(
      got.vectors[row][index[index >= 0]],
      prompt.own_vectors() if prompt.slots.any() else np.zeros((0, 3)))
  assert prompts.padded(given[1:2], 1, 2).vectors is None
