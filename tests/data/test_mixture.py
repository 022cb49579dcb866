"""Sources by weight: proportions, epochs, and that a row is a function of (seed, number)."""

from collections import Counter

import numpy as np
import pytest

from lmops_jax.data.mixture import PERIOD, Mixture, schedule


class _Numbered:
  """`num` rows whose tokens tell source and index."""

  def __init__(self, source, num, length=3, field="tokens"):
    self.source, self.num, self.length, self.field = source, num, length, field

  def __len__(self):
    return self.num

  def batch(self, indices):
    rows = np.stack([np.full(len(indices), self.source), indices], axis=1).astype(np.int32)
    tokens = np.concatenate([rows, np.zeros((len(rows), self.length - 2), np.int32)], axis=1)
    return {self.field: tokens, "loss_mask": np.ones(tokens.shape, np.float32),
            "example_id": np.asarray(indices, np.int64)}

  def num_learned(self, indices):
    return np.full(len(indices), self.length)


def _drawn(mixture, numbers):
  return mixture.batch(np.asarray(numbers))["tokens"][:, :2].tolist()


@pytest.mark.parametrize("weights", [
  [1], [1, 1], [21.8, 17.7, 16.2, 14.7, 10.6, 10.2, 5.4, 1.1, 1.0, 1.0, 0.2], [1, 1e-9],
])
def test_a_period_has_the_proportions_and_is_even(weights):
  got = schedule(weights)
  counts = np.bincount(got, minlength=len(weights))
  share = np.array(weights) / np.sum(weights) * PERIOD
  assert counts.sum() == len(got) == PERIOD and counts.min() >= 1
  assert np.abs(counts - np.maximum(share, 1)).max() <= 1 + (min(weights) < 1e-6)
  cumulative = np.cumsum(got[:, None] == np.arange(len(weights)), axis=0)
  ideal = np.arange(1, PERIOD + 1)[:, None] * counts / PERIOD
  assert np.abs(cumulative - ideal).max() <= len(weights) / 2 + 1


def test_rows_come_in_proportion_and_each_source_in_epochs():
  sources = {"many": _Numbered(0, 50), "few": _Numbered(1, 7), "none": _Numbered(2, 0)}
  mixture = Mixture(sources, {"many": 3, "few": 1, "none": 0}, seed=4)
  drawn = _drawn(mixture, np.arange(2 * PERIOD))
  assert Counter(source for source, _ in drawn) == {0: 15_000, 1: 5_000}
  for source, num in ((0, 50), (1, 7)):
    rows = [row for s, row in drawn if s == source]
    epochs = [rows[i : i + num] for i in range(0, len(rows) - num + 1, num)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_row_depends_on_its_number_and_the_seed_alone():
  def mixture(seed=4):
    return Mixture({"a": _Numbered(0, 50), "b": _Numbered(1, 7)}, {"a": 3, "b": 1}, seed)

  want = _drawn(mixture(), np.arange(300))
  again = mixture()
  assert [_drawn(again, [n])[0] for n in reversed(range(300))] == want[::-1]
  assert _drawn(mixture(), [299, 5, 5]) == [want[299], want[5], want[5]]
  assert _drawn(mixture(5), np.arange(300)) != want


def test_the_order_of_a_source_stays_when_another_is_added():
  alone = _drawn(Mixture({"a": _Numbered(0, 50)}), np.arange(50))
  both = Mixture({"b": _Numbered(1, 9), "a": _Numbered(0, 50)}, {"a": 1, "b": 1})
  assert [row for row in _drawn(both, np.arange(100)) if row[0] == 0] == alone


def test_without_weights_rows_come_in_proportion_to_numbers():
  mixture = Mixture({"a": _Numbered(0, 30), "b": _Numbered(1, 10)})
  assert Counter(source for source, _ in _drawn(mixture, np.arange(40))) == {0: 30, 1: 10}
  np.testing.assert_array_equal(mixture.num_learned(np.arange(5)), [3] * 5)


@pytest.mark.parametrize("sizes, weights, message", [
  ({}, {}, "a mixture has no source"),
  ({"a": 3}, {"b": 1}, "a mixture of a has weights for b"),
  ({"a": 3, "b": 1}, {"a": 1}, "a mixture of a, b has weights for a"),
  ({"a": 3}, {"a": -1.0}, "the source 'a' of a mixture has the weight -1.0"),
  ({"a": 3}, {"a": float("nan")}, "the source 'a' of a mixture has the weight nan"),
  ({"a": 3, "b": 0}, {"a": 1, "b": 1}, "the source 'b' of a mixture has the weight 1 and no row"),
  ({"a": 3}, {"a": 0}, r"all sources of a mixture \(a\) have the weight 0"),
])
def test_weights_are_checked(sizes, weights, message):
  with pytest.raises(ValueError, match=message):
    Mixture({name: _Numbered(0, num) for name, num in sizes.items()}, weights)


@pytest.mark.parametrize("other", [_Numbered(1, 5, length=4), _Numbered(1, 5, field="ids")])
def test_sources_must_give_equal_rows(other):
  mixture = Mixture({"a": _Numbered(0, 5), "b": other})
  with pytest.raises(ValueError, match="sources 'a' and 'b' of a mixture give rows that differ in"):
    mixture.batch(np.arange(8))
