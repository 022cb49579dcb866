"""First fit: bins in the order in which they were opened."""

import numpy as np

from lmops_jax.data.first_fit import first_fit


def test_items_go_into_the_first_bin_with_room_in_every_measure():
  items = [("a", (5, 1)), ("b", (6, 1)), ("c", (4, 2)), ("d", (4, 1)), ("e", (1, 0))]
  assert list(first_fit(items, (10, 2))) == [["a", "d", "e"], ["b"], ["c"]]
  assert list(first_fit(items, (10, 2), share=False)) == [["a"], ["b"], ["c"], ["d"], ["e"]]
  assert list(first_fit([], (10,))) == []


def test_each_item_comes_once_and_bins_keep_their_limits():
  sizes = np.random.default_rng(0).integers(1, 31, (2000, 2)).tolist()
  bins = list(first_fit(((i, size) for i, size in enumerate(sizes)), (60, 45)))
  assert sorted(i for members in bins for i in members) == list(range(2000))
  used = np.array([np.sum([sizes[i] for i in members], axis=0) for members in bins])
  assert (used <= [60, 45]).all()
  assert [members[0] for members in bins] == sorted(members[0] for members in bins)
  few, rooms = sizes[:100], []
  for size in few:  # the rule in its plainest form
    place = next((i for i, room in enumerate(rooms) if (room >= size).all()), len(rooms))
    rooms += [np.array([60, 45])] * (place == len(rooms))
    rooms[place] = rooms[place] - size
  bins = list(first_fit(((i, size) for i, size in enumerate(few)), (60, 45)))
  left = [[60, 45] - np.sum([few[i] for i in members], axis=0) for members in bins]
  np.testing.assert_array_equal(left, rooms)


def test_bins_come_while_items_are_read():
  """Memory is bounded: at most 64 bins are open."""
  taken = []

  def items():
    for i in range(1000):
      taken.append(i)
      yield i, (7,)

  bins = first_fit(items(), (10,))
  assert next(bins) == [0] and len(taken) == 65
