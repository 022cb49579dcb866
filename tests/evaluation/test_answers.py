"""Exact match and F1 of open answers."""

import pytest

from lmops_jax.evaluation import answers


@pytest.mark.parametrize("answer,golds,match,f1", [
  ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
  ("a cat", ["the dog", "cat"], 1, 1),
  ("big red bus", ["red bus"], 0, 0.8),
  ("bus", ["train"], 0, 0),
  ("the", ["a"], 1, 1),
  ("", ["x"], 0, 0),
  ("x x y", ["x y y"], 0, 2 * 2 / 6),
])
def test_values_by_hand(answer, golds, match, f1):
  assert answers.exact_match(answer, golds) == match
  assert answers.f1(answer, golds) == pytest.approx(f1)
