"""Selecting from parts that many see: the set, the sketch that adds up, ties and refusals."""

import functools
import itertools

import numpy as np
import pytest

from lmops_jax.systems.pds import parallel_selection, ranking, selection


def _serial(function, items, zero):
  return sum(map(function, items), start=zero)


def _shuffled(rng, function, items, zero):
  """Sums in a random grouping and order, with sums of nothing in between."""
  sums = [function(item) for item in items] + [zero] * 3
  while len(sums) > 1:
    i, j = rng.choice(len(sums), 2, replace=False)
    merged = sums[i] + sums[j]
    sums = [s for n, s in enumerate(sums) if n not in (i, j)] + [merged]
  return sums[0]


def _select(ids, scores, cuts, total=_serial, **kwargs):
  parts = list(zip(np.split(ids, cuts), np.split(scores, cuts), strict=True))
  written = {}

  def write(item, chosen):
    rows, own = np.concatenate([np.empty((2, 0), np.int64), *map(np.stack, chosen)], axis=1)
    np.testing.assert_array_equal(parts[item][0][rows], own)
    written[item] = own

  result = parallel_selection.select(
    total, range(len(parts)), lambda item: [parts[item]], write, num_examples=len(ids), **kwargs
  )
  return np.concatenate([written[i] for i in range(len(parts))]), result


@pytest.mark.parametrize("tau", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("k", [1, 2, 400, 999, 1000])
def test_it_is_the_set_that_is_chosen_in_memory(k, tau):
  rng = np.random.default_rng(k)
  scores = rng.normal(size=1000).astype(np.float32)
  scores[rng.integers(0, 1000, 300)] = 0.5  # ties
  ids = np.arange(1000)
  want = selection.gumbel_top_k(scores, k=k, tau=tau, seed=3)
  for seed, num_cuts, capacity in ((0, 0, 1 << 19), (1, 9, 50), (2, 40, 1)):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, 1001, num_cuts))  # some parts are empty
    got, result = _select(
      ids, scores, cuts, functools.partial(_shuffled, rng), k=k, tau=tau, seed=3,
      max_candidates=capacity,
    )
    np.testing.assert_array_equal(got, want)
    perturbed = scores.astype(np.float64) + tau * selection.gumbel_noise(3, ids)
    assert (result.num_selected, result.threshold) == (k, np.sort(perturbed)[-k])


@pytest.mark.parametrize("k", [1, 37, 499, 500])
def test_equal_scores_go_to_the_smaller_ids(k):
  ids = np.random.default_rng(0).permutation(np.arange(10**12, 10**12 + 500))
  got, _ = _select(ids, np.zeros(500), [100, 101, 350], k=k, tau=0, seed=0, max_candidates=1)
  np.testing.assert_array_equal(np.sort(got), np.arange(10**12, 10**12 + k))


def test_ratio_is_rounded_down():
  got, _ = _select(np.arange(100), np.arange(100.0), [10], ratio=0.29, tau=0, seed=0)
  np.testing.assert_array_equal(got, np.arange(71, 100))


def _sketches():
  rng = np.random.default_rng(8)
  around = ranking.Range(rank=5, total=300)

  def blocks(item):
    ids = np.arange(item * 100, (item + 1) * 100)
    return [(ids, ranking.keys(rng.normal(size=100)))]

  return [parallel_selection._sketch(blocks, around, item) for item in range(3)]


def _equal(a, b):
  return (a.count, a.digest) == (b.count, b.digest) and np.array_equal(a.histogram, b.histogram)


def test_sketches_add_up_in_any_order_and_grouping():
  a, b, c = _sketches()
  whole = a + b + c
  assert whole.count == 300 and whole.histogram.sum() == 300
  for x, y, z in itertools.permutations((a, b, c)):
    assert _equal((x + y) + z, whole) and _equal(x + (y + z), whole)
  assert a.histogram.nbytes == whole.histogram.nbytes  # its size is fixed


def test_scores_that_change_between_passes_are_refused():
  reads = itertools.count()

  def read(item):
    yield np.arange(50), np.arange(50.0) + (next(reads) >= 1)

  with pytest.raises(ValueError, match="changed while they were being read"):
    parallel_selection.select(
      _serial, [0], read, lambda item, ids: list(ids), num_examples=50, k=5, tau=0, seed=0
    )


@pytest.mark.parametrize("capacity", [1, 1000])
def test_an_id_that_occurs_twice_is_refused(capacity):
  with pytest.raises(ValueError, match="id 7 occurs more than once"):
    _select(np.full(20, 7), np.ones(20), [4], k=3, tau=0, seed=0, max_candidates=capacity)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"ratio": 0.0}, "ratio=0.0"), ({"k": 0}, "k=0"), ({"k": 21}, "k=21"),
    ({"k": 1, "tau": -1}, "tau=-1"), ({"k": 1, "seed": -1}, "seed=-1"),
    ({"k": 1, "max_candidates": 0}, "max_candidates=0"),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    _select(np.arange(20), np.ones(20), [], **{"tau": 0, "seed": 0} | kwargs)


def test_a_wrong_number_of_scores_is_refused():
  with pytest.raises(ValueError, match="hold 20 scores, but the corpus has 30"):
    parallel_selection.select(
      _serial, [0], lambda item: [(np.arange(20), np.ones(20))], None, num_examples=30, k=2,
      tau=0, seed=0,
    )


def test_a_score_that_is_not_finite_is_named():
  scores = np.ones(20)
  scores[11] = np.nan
  with pytest.raises(ValueError, match="score of example 11"):
    _select(np.arange(20), scores, [5], k=2, tau=0, seed=0)
