"""The order in which a selection is trained on."""

import types

import numpy as np
import pytest

from lmops_jax.training.language_models import selection_source


def _instances(ids):
  return types.SimpleNamespace(
    ids=np.array(ids), batch=lambda rows: {"example_id": np.array(ids)[rows]})


def _epoch(instances, indices, epoch, seed=0):
  """The ids of an epoch of single instances, in order."""
  source, num = selection_source(instances, np.array(indices), 1, seed), len(indices)
  return [int(source.batch(epoch * num + step)["example_id"][0]) for step in range(num)]


def test_each_epoch_has_the_selection_in_another_order():
  instances, indices = _instances(np.arange(30) ** 3), np.arange(0, 30, 2)
  orders = [_epoch(instances, indices, e, s) for e, s in [(0, 0), (1, 0), (0, 1)]]
  assert all(sorted(order) == sorted(instances.ids[indices]) for order in orders)
  assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("epoch", [0, 1])
def test_instances_keep_their_order_in_other_selections_and_corpora(epoch):
  ids = np.arange(30) ** 3
  whole = _epoch(_instances(ids), np.arange(30), epoch)
  part = _epoch(_instances(ids), np.arange(5, 25), epoch)
  assert part == [i for i in whole if i in ids[5:25]]
  assert _epoch(_instances(np.r_[7, ids]), np.arange(6, 26), epoch) == part
