"""Demonstrations by likeness: what is near, in which order, and who shares it."""

import numpy as np
import pytest

from lmops_jax.data.tasks import Example
from lmops_jax.systems.structured_prompting.retrieval import Retrieval, dealt

SUBJECTS = {"fish": "the fish swims in water", "bird": "a bird flies through air"}


def _examples(subjects, first=0):
  return [
    Example(first + i, f"{SUBJECTS[name]} number{i}", (" a", " b"), 0)
    for i, name in enumerate(subjects)]


def test_each_row_gets_its_own_kind():
  rows = _examples(["fish", "bird", "bird", "fish"])
  pool = _examples(["bird", "fish"] * 5, first=100)
  for clusters in (2, None):
    shares = Retrieval(clusters).shares(rows, pool, 4)
    assert sorted(np.concatenate([share.rows for share in shares])) == [0, 1, 2, 3]
    assert len(shares) == (4 if clusters is None else 2)
    for share in shares:
      kinds = {rows[i].prompt.split()[1] for i in share.rows}
      assert len(kinds) == 1 and len(share.demonstrations) == 4
      assert {pool[i].prompt.split()[1] for i in share.demonstrations} == kinds


def test_more_clusters_than_rows_are_rows():
  rows, pool = _examples(["fish", "bird"]), _examples(["bird", "fish"], first=100)
  assert len(Retrieval(5).shares(rows, pool, 1)) == 2


def test_every_group_has_near_ones_the_nearest_last():
  assert dealt([0, 1, 2, 3, 4, 5, 6], 3) == [6, 3, 0, 4, 1, 5, 2]
  assert dealt([0, 1], 1) == [1, 0]
  assert dealt([], 2) == []


def test_refuses_no_cluster():
  with pytest.raises(ValueError, match="clusters=0 must be an integer of at least 1"):
    Retrieval(0)
