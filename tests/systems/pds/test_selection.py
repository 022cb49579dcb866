"""Gumbel selection: its noise, its distribution, and one process's stream against memory."""

import decimal
import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from lmops_jax.systems.pds import parallel_selection, selection

PINNED = [
  "-0x1.72816563470e9p-1",
  "0x1.7b54a0c26c0a8p-1",
  "0x1.38bd016d6e9a8p+2",
  "0x1.25885f3625ba4p-2",
]

# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "counter, key, want",
  [  # the known-answer vectors of the Random123 library, philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
      (0xFFFFFFFF,) * 4,
      (0xFFFFFFFF,) * 2,
      (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
      (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
      (0xA4093822, 0x299F31D0),
      (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
  ],
)
def test_philox_known_answers(counter, key, want):
  got = selection._philox(tuple(np.array([word], np.uint64) for word in counter), key)
  assert tuple(int(word[0]) for word in got) == want


def test_logarithm_is_within_two_units_in_the_last_place():
  rng = np.random.default_rng(0)
  wide = np.exp(rng.uniform(-700, 700, 20_000))
  near_one = 1 - 10.0 ** rng.uniform(-15.9, -1, 20_000)
  for x in (wide, near_one, np.array([1.0, 2.0, 0.5, 2.0**-53, 1 - 2.0**-53])):
    want = np.log(x.astype(np.longdouble)).astype(np.float64)
    assert np.all(np.abs(selection._log(x) - want) <= 2 * np.spacing(np.abs(want)))


def test_noise_is_pinned_to_the_bit():
  got = selection.gumbel_noise(1234, np.array([0, 1, 2**40, 2**63 - 1]))
  want = [_exact_noise(1234, i) for i in (0, 1, 2**40, 2**63 - 1)]
  np.testing.assert_allclose(got, want, rtol=2e-15)
  assert [value.hex() for value in got] == PINNED


def _exact_noise(seed, i):
  """The definition in Python integers and decimal arithmetic."""
  x, (k0, k1) = [i & 0xFFFFFFFF, i >> 32, 0, 0], (seed & 0xFFFFFFFF, seed >> 32)
  for _ in range(10):
    p0, p1 = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
    x = [(p1 >> 32) ^ x[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ x[3] ^ k1, p0 & 0xFFFFFFFF]
    k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
  with decimal.localcontext(prec=50):
    u = (decimal.Decimal(x[0] << 20 | x[1] >> 12) + decimal.Decimal("0.5")) / 2**52
    return float(-((-u.ln()).ln()))


def test_noise_depends_on_seed_and_id_alone():
  ids = np.random.default_rng(1).permutation(5000) * 7919
  noise = selection.gumbel_noise(5, ids)
  shuffled = np.random.default_rng(2).permutation(len(ids))
  np.testing.assert_array_equal(selection.gumbel_noise(5, ids[shuffled]), noise[shuffled])
  np.testing.assert_array_equal(selection.gumbel_noise(5, ids[:1]), noise[:1])
  np.testing.assert_array_equal(selection.gumbel_noise(5, ids.astype(np.uint64)), noise)
  np.testing.assert_array_equal(
    selection.gumbel_noise(5, ids.reshape(50, 100)), noise.reshape(50, 100)
  )
  assert not np.any(selection.gumbel_noise(6, ids) == noise)
  assert not np.any(selection.gumbel_noise(5 + 2**32, ids) == noise)


def test_noise_is_gumbel_and_uncorrelated_over_neighbours():
  noise = selection.gumbel_noise(0, np.arange(200_000))
  assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-3
  uniform = stats.gumbel_r.cdf(noise)
  for lag in (1, 2, 64):
    assert abs(np.corrcoef(uniform[:-lag], uniform[lag:])[0, 1]) < 0.01
  other = stats.gumbel_r.cdf(selection.gumbel_noise(1, np.arange(200_000)))
  assert abs(np.corrcoef(uniform, other)[0, 1]) < 0.01


# --- distribution ---------------------------------------------------------------------------------


def _draws(scores, k, tau, num_draws):
  """Selected indicators `[num_draws, n]`, each draw with ids (thus noise) of its own."""
  n = len(scores)
  noise = selection.gumbel_noise(11, np.arange(num_draws * n)).reshape(num_draws, n)
  order = np.argsort(-(scores + tau * noise), axis=1)[:, :k]
  chosen = np.zeros((num_draws, n), bool)
  np.put_along_axis(chosen, order, True, axis=1)
  for draw in range(0, num_draws, num_draws // 20):  # the function itself does the same
    ids = np.arange(draw * n, (draw + 1) * n)
    got = selection.gumbel_top_k(scores, k=k, tau=tau, seed=11, ids=ids)
    np.testing.assert_array_equal(got - draw * n, np.flatnonzero(chosen[draw]))
  return chosen


def test_one_draw_is_softmax():
  scores, tau, num_draws = np.array([0.3, -0.2, 0.05, 0.0, -0.4]), 0.25, 100_000
  counts = _draws(scores, 1, tau, num_draws).sum(0)
  weights = np.exp(scores / tau)
  assert stats.chisquare(counts, num_draws * weights / weights.sum()).pvalue > 1e-3


def test_two_of_five_are_plackett_luce():
  scores, tau, num_draws = np.array([0.3, -0.2, 0.05, 0.0, -0.4]), 0.25, 100_000
  chosen = _draws(scores, 2, tau, num_draws)
  weights = np.exp(scores / tau)
  total = weights.sum()
  pairs = dict.fromkeys(itertools.combinations(range(5), 2), 0.0)
  for first, second in itertools.permutations(range(5), 2):
    probability = weights[first] / total * weights[second] / (total - weights[first])
    pairs[tuple(sorted((first, second)))] += probability
  assert sum(pairs.values()) == pytest.approx(1)
  counts = [int((chosen[:, i] & chosen[:, j]).sum()) for i, j in pairs]
  assert stats.chisquare(counts, num_draws * np.array(list(pairs.values()))).pvalue > 1e-3
  for i in range(5):
    inclusion = sum(p for pair, p in pairs.items() if i in pair)
    assert chosen[:, i].mean() == pytest.approx(inclusion, abs=5e-3)


def test_no_noise_is_plain_top_k():
  scores = np.random.default_rng(0).normal(size=1000)
  want = np.sort(np.argsort(-scores)[:400])
  for tau in (0.0, 1e-12, 1e-310):
    got = selection.gumbel_top_k(scores, ratio=0.4, tau=tau, seed=9)
    np.testing.assert_array_equal(got, want)


def test_large_noise_forgets_the_scores():
  scores = np.linspace(-3, 3, 50_000)
  chosen = selection.gumbel_top_k(scores, k=10_000, tau=1e9, seed=0)
  counts = np.histogram(chosen, bins=20, range=(0, 50_000))[0]
  assert stats.chisquare(counts).pvalue > 1e-3


def test_same_seed_same_set_other_seed_other_set():
  scores = np.random.default_rng(0).normal(size=2000)
  first, again, other = (
    selection.gumbel_top_k(scores, ratio=0.4, tau=0.5, seed=seed) for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_ties_go_to_the_smaller_id():
  ids = np.array([90, 10, 50, 30, 70])
  got = selection.gumbel_top_k([1, 1, 1, 2, 0], k=3, tau=0, seed=0, ids=ids)
  assert got.tolist() == [10, 30, 50]
  assert got.dtype == np.int64
  # Zeros of both signs are equal.
  got = selection.gumbel_top_k([-0.0, 0.0, -0.0], k=2, tau=0, seed=0)
  assert got.tolist() == [0, 1]


@pytest.mark.parametrize(
  "n, ratio, want",
  [
    (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
    (3, 1 / 3, 1),
    (10, 1.0, 10),
    (42_000, 0.4, 16_800),
    (125_000_003, 0.4, 50_000_001),
    (7, 0.999, 6),
    (1000, 0.1 + 0.2, 300),  # 0.30000000000000004
  ],
)
def test_number_selected_is_the_exact_floor(n, ratio, want):
  assert selection.num_selected(n, ratio=ratio) == want


# --- streaming ------------------------------------------------------------------------------------


def _stream(ids, scores, sizes, **kwargs):
  """Selects from shards of the given sizes (cycled) in this process; returns ids and result."""
  edges = [0]
  for size in itertools.cycle(sizes):
    if edges[-1] >= len(ids):
      break
    edges.append(min(edges[-1] + size, len(ids)))
  passes = []

  def shards():
    passes.append(1)
    for start, stop in zip(edges, edges[1:]):
      yield ids[start:stop], scores[start:stop]

  written = []
  result = parallel_selection.select_in_process(
    shards, lambda *block: written.append(block), num_examples=len(ids), **kwargs
  )
  assert result.num_passes == len(passes)
  rows, chosen = map(np.concatenate, zip(*written))
  np.testing.assert_array_equal(chosen, ids[rows])
  return chosen, result


def test_streaming_equals_in_memory_on_a_million_scores():
  n = 1_000_000
  scores = np.random.default_rng(0).normal(size=n).astype(np.float32)
  ids = np.arange(n)
  want = selection.gumbel_top_k(scores, ratio=0.4, tau=0.1, seed=7)
  got, result = _stream(ids, scores, [100_000, 1, 33_333], ratio=0.4, tau=0.1, seed=7)
  np.testing.assert_array_equal(got, want)  # also in corpus order
  assert result.num_selected == len(want) == 400_000 and result.num_passes == 3
  perturbed = scores.astype(np.float64) + 0.1 * selection.gumbel_noise(7, ids)
  assert result.threshold == np.sort(perturbed)[-400_000]


@pytest.mark.parametrize("capacity", [4, 64, 1000, 1 << 19])
@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "constant", "coarse", "tiny"])
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_streaming_equals_in_memory_whatever_the_order(kind, tau, capacity):
  n = 3000
  rng = np.random.default_rng(1)
  scores = {
    "normal": rng.normal(size=n),
    "rising": np.linspace(-3, 3, n),
    "falling": np.linspace(3, -3, n),
    "constant": np.full(n, 0.25),
    "coarse": rng.integers(3, size=n).astype(np.float32),
    "tiny": rng.normal(size=n) * 1e-300,
  }[kind]
  ids = rng.permutation(n) * 1_000_003 + 5
  for k in (1, 1234, n - 1, n):
    want = selection.gumbel_top_k(scores, k=k, tau=tau, seed=2, ids=ids)
    got, _ = _stream(ids, scores, [7, 500], k=k, tau=tau, seed=2, max_candidates=capacity)
    np.testing.assert_array_equal(np.sort(got), want)


def test_shards_in_any_size_and_order_give_the_same_set():
  n = 20_000
  rng = np.random.default_rng(3)
  ids, scores = np.arange(n), rng.normal(size=n)
  want, _ = _stream(ids, scores, [n], ratio=0.4, tau=0.1, seed=1)
  for sizes in ([1000], [1, 9999], [17]):
    order = rng.permutation(n)
    got, _ = _stream(ids[order], scores[order], sizes, ratio=0.4, tau=0.1, seed=1)
    np.testing.assert_array_equal(np.sort(got), want)


def test_shards_may_reuse_their_memory():
  scores = np.random.default_rng(4).normal(size=4000)
  want = selection.gumbel_top_k(scores, ratio=0.4, tau=0.1, seed=1)
  ids_buffer, scores_buffer = np.empty(100, np.int64), np.empty(100)

  def shards():
    for start in range(0, 4000, 100):
      ids_buffer[:] = np.arange(start, start + 100)
      scores_buffer[:] = scores[start : start + 100]
      yield ids_buffer, scores_buffer

  written = []
  parallel_selection.select_in_process(
    shards, lambda rows, ids: written.append(ids), num_examples=4000, ratio=0.4, tau=0.1, seed=1
  )
  np.testing.assert_array_equal(np.concatenate(written), want)


def _ignore(rows, ids):
  """Writes nothing."""


def test_memory_does_not_grow_with_the_corpus():
  def shards(num_shards):
    for i in range(num_shards):
      ids = np.arange(i * 50_000, (i + 1) * 50_000)
      yield ids, selection.gumbel_noise(99, ids).astype(np.float32)

  peaks = []
  for num_shards in (4, 32):
    tracemalloc.start()
    parallel_selection.select_in_process(
      lambda n=num_shards: shards(n), _ignore, num_examples=50_000 * num_shards, ratio=0.4, tau=0.1,
      seed=0, max_candidates=1 << 16,
    )
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.1 * peaks[0], peaks  # eight times the scores
  assert peaks[1] < 50_000 * 32 * 8, peaks  # less than all scores in float64


# --- bad input ------------------------------------------------------------------------------------

GOOD = dict(ratio=0.5, tau=0.1, seed=0)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(ratio=0.0), r"ratio=0.0 is not in \(0, 1\]"),
    (dict(ratio=1.01), r"ratio=1.01 is not in \(0, 1\]"),
    (dict(ratio=float("nan")), "ratio=nan"),
    (dict(ratio=0.001), "keeps none; use at least 1/100"),
    (dict(ratio=None, k=0), "k=0 is not an integer between 1"),
    (dict(ratio=None, k=101), r"k=101 is not an integer .*\(100\)"),
    (dict(ratio=None, k=2.5), "k=2.5 is not an integer"),
    (dict(ratio=None, k=True), "k=True is not an integer"),
    (dict(k=5), "exactly one of ratio and k"),
    (dict(ratio=None), "exactly one of ratio and k"),
    (dict(tau=-0.1), "tau=-0.1 is not a finite noise scale >= 0"),
    (dict(tau=float("nan")), "tau=nan"),
    (dict(tau=float("inf")), "tau=inf"),
    (dict(seed=-1), "seed=-1"),
    (dict(seed=1.5), "seed=1.5"),
  ],
)
def test_bad_settings_are_refused_by_both(change, message):
  scores = np.arange(100.0)

  def shards():
    raise AssertionError("settings must be checked before a shard is read")

  with pytest.raises(ValueError, match=message):
    selection.gumbel_top_k(scores, **GOOD | change)
  with pytest.raises(ValueError, match=message):
    parallel_selection.select_in_process(shards, _ignore, num_examples=100, **GOOD | change)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_name_the_example(value):
  scores, ids = np.arange(10.0), np.arange(10) + 500
  scores[[6, 8]] = value
  message = f"score of example 506 in %s is {value}, not a finite number"
  with pytest.raises(ValueError, match=message % "the scores"):
    selection.gumbel_top_k(scores, ids=ids, **GOOD)
  with pytest.raises(ValueError, match=message % "score shard 1"):
    _stream(ids, scores, [5], **GOOD)


@pytest.mark.parametrize("num_examples, found", [(9, "at least 10"), (11, "10")])
def test_wrong_number_of_scores(num_examples, found):
  shards = [(np.arange(10), np.arange(10.0))]
  message = f"hold {found} scores, but the corpus has {num_examples}"
  with pytest.raises(ValueError, match=message):
    parallel_selection.select_in_process(
      lambda: shards, _ignore, num_examples=num_examples, **GOOD)


def test_bad_ids():
  with pytest.raises(ValueError, match="id 3 occurs more than once"):
    selection.gumbel_top_k([1, 2, 3], ids=[3, 1, 3], **GOOD)
  with pytest.raises(ValueError, match="id 5 occurs more than once: 2 scores reach"):
    _stream(np.array([5, 5, 7]), np.array([1.0, 1.0, 0.0]), [3], k=1, tau=0.1, seed=0)
  with pytest.raises(ValueError, match=r"in \[0, 2\^63\), but the scores has -1"):
    selection.gumbel_top_k([1, 2, 3], ids=[-1, 1, 3], **GOOD)
  with pytest.raises(ValueError, match="must be integers"):
    selection.gumbel_top_k([1, 2, 3], ids=[0.0, 1.0, 3.0], **GOOD)
  with pytest.raises(ValueError, match="one length"):
    selection.gumbel_top_k([1, 2, 3], ids=[1, 3], **GOOD)
  with pytest.raises(ValueError, match="one length"):
    parallel_selection.select_in_process(
      lambda: [(np.arange(3), np.arange(2.0))], _ignore, num_examples=3, **GOOD
    )
  with pytest.raises(ValueError, match="must not be negative"):
    selection.gumbel_noise(0, np.array([1, -2]))


def test_shards_that_change_between_the_passes():
  calls = []

  def shards():
    calls.append(1)
    scores = np.arange(100.0)
    scores[3] += 1e-9 * len(calls)
    yield np.arange(100), scores

  with pytest.raises(ValueError, match="changed while they were being read"):
    parallel_selection.select_in_process(shards, _ignore, num_examples=100, **GOOD)
