import numpy as np
import pytest

from lmops_jax.data import batches


def test_permutation_is_a_pure_function():
  first = batches.epoch_permutation(3, 0, 1000).copy()
  batches.epoch_permutation.cache_clear()
  np.testing.assert_array_equal(batches.epoch_permutation(3, 0, 1000), first)
  np.testing.assert_array_equal(np.sort(first), np.arange(1000))
  others = [batches.epoch_permutation(*key) for key in [(3, 1, 1000), (4, 0, 1000), (0, 3, 1000)]]
  for other in others:
    assert np.mean(other == first) < 0.02


def _plain_permutation(seed, epoch, count):
  mask, step = 2**64 - 1, 0x9E3779B97F4A7C15

  def mix(x):
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)

  start = mix(epoch + (seed + 1) * step)
  return sorted(range(count), key=lambda i: mix(start + i * step))


def test_permutation_equals_plain_integers():
  for seed, epoch in [(0, 0), (12, 5), (2**31, 1)]:
    want = _plain_permutation(seed, epoch, 300)
    np.testing.assert_array_equal(batches.epoch_permutation(seed, epoch, 300), want)


def test_positions_are_uniform():
  hits = np.zeros((10, 10))
  for seed in range(2000):
    hits[np.arange(10), batches.epoch_permutation(seed, 0, 10)] += 1
  chi2 = ((hits - 200) ** 2 / 200).sum()
  assert chi2 < 140  # 81 degrees of freedom: mean 81, standard deviation 13


def test_each_epoch_visits_every_example_once():
  steps = [batches.batch_indices(103, 10, seed=1, step=s) for s in range(20)]
  for epoch in (steps[:10], steps[10:]):
    seen = np.concatenate(epoch)
    assert len(seen) == len(set(seen)) == 100 and seen.max() < 103
  assert set(np.concatenate(steps[:10])) != set(np.concatenate(steps[10:]))  # another tail is left
  assert steps[0].dtype == np.int64 and steps[0].shape == (10,)


def test_unshuffled_batches_follow_the_corpus():
  got = [batches.batch_indices(7, 3, 0, step, shuffle=False).tolist() for step in range(3)]
  assert got == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_hosts_share_a_batch(processes):
  whole = batches.batch_indices(50, 8, 0, 3)
  parts = [whole[batches.host_rows(8, i, processes)] for i in range(processes)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_errors():
  with pytest.raises(ValueError, match="5 examples are fewer than one batch of batch_size=6"):
    batches.batch_indices(5, 6, 0, 0)
  with pytest.raises(ValueError, match="batch_size=0"):
    batches.batch_indices(5, 0, 0, 0)
  with pytest.raises(ValueError, match="step=-1"):
    batches.batch_indices(5, 1, 0, -1)
  with pytest.raises(ValueError, match="multiple of 3"):
    batches.host_rows(8, 0, 3)
  with pytest.raises(ValueError, match="process 2 is not one of 2"):
    batches.host_rows(8, 2, 2)
