"""Score files and standardisation (spec sections 3 and 9, checks 15 and 24)."""

from statistics import NormalDist

import numpy as np
import pytest

from lmops_jax.systems.pds import scores


def test_standardize_is_mean_zero_deviation_one_and_clipped():
  raw = np.random.default_rng(0).standard_t(3, size=5000) * 40 + 7
  plain = scores.standardize(raw, clip=None)
  assert abs(plain.mean()) < 1e-12 and abs(plain.std() - 1) < 1e-12
  clipped = scores.standardize(raw)
  assert np.abs(clipped).max() == 3
  np.testing.assert_allclose(clipped, np.clip((raw - raw.mean()) / raw.std(), -3, 3), rtol=1e-12)


def test_checkpoints_count_alike_whatever_their_scale():
  a, b = np.random.default_rng(1).normal(size=(2, 400))
  once = scores.standardize(np.stack([a, b]))
  np.testing.assert_allclose(scores.standardize(np.stack([1e6 * a + 3, 1e-4 * b])), once, atol=1e-9)


def test_ranks_keep_the_order_alone():
  raw = np.array([5.0, -2.0, 1e9, 1.0, 1.0])
  got = scores.standardize(raw, ranks=True)
  np.testing.assert_allclose(got, scores.standardize(np.array([6, 1, 7, 2, 2]), ranks=True))
  assert abs(got.mean()) < 1e-12 and got[3] == got[4]
  quantiles = [NormalDist().inv_cdf((rank - 0.5) / 5) for rank in (4, 1, 5, 2.5, 2.5)]
  np.testing.assert_allclose(got, (quantiles - np.mean(quantiles)) / np.std(quantiles), rtol=1e-9)


@pytest.mark.parametrize(
  ("raw", "message"), [([1.0, np.nan, 2.0], "not finite"), ([2.0, 2.0, 2.0], "all 3 proxy scores")]
)
def test_useless_scores_are_refused(raw, message):
  with pytest.raises(ValueError, match=message):
    scores.standardize(np.array(raw))


def _write(folder, values, size):
  for number, start in enumerate(range(0, len(values), size)):
    part = values[start : start + size]
    ids = 7 * np.arange(start, start + len(part))
    scores.save_shard(folder, number, scores.Shard(start, ids, part))


def test_shards_read_back_in_order(tmp_path):
  values = np.random.default_rng(2).normal(size=25)
  _write(tmp_path, values, 10)
  parts = list(scores.read_shards(tmp_path, 25))
  np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), 7 * np.arange(25))
  np.testing.assert_array_equal(np.concatenate([s for _, s in parts]), values.astype(np.float32))
  assert not list(tmp_path.glob("*.tmp"))


def test_missing_shard_is_named(tmp_path):
  _write(tmp_path, np.zeros(25), 10)
  scores.shard_path(tmp_path, 1).unlink()
  with pytest.raises(ValueError, match="scores_000001.npz is missing"):
    list(scores.read_shards(tmp_path, 25))


def test_reordered_shards_are_named(tmp_path):
  _write(tmp_path, np.zeros(30), 10)
  one, two = (scores.shard_path(tmp_path, i) for i in (1, 2))
  spare = tmp_path / "spare"
  one.rename(spare), two.rename(one), spare.rename(two)
  with pytest.raises(ValueError, match="starts at instance 20, expected 10"):
    list(scores.read_shards(tmp_path, 30))


@pytest.mark.parametrize("num_examples", [20, 15])
def test_more_scores_than_instances_are_refused(tmp_path, num_examples):
  _write(tmp_path, np.zeros(30), 10)
  with pytest.raises(ValueError, match="more than the corpus's"):
    list(scores.read_shards(tmp_path, num_examples))


def test_score_that_is_not_finite_is_named(tmp_path):
  values = np.zeros(20)
  values[13] = np.inf
  _write(tmp_path, values, 10)
  with pytest.raises(ValueError, match="instance 13"):
    list(scores.read_shards(tmp_path, 20))


def test_shards_that_are_not_as_they_were_written_are_missing(tmp_path):
  _write(tmp_path, np.arange(45.0), 10)
  assert scores.missing_shards(tmp_path, 5) == []
  scores.shard_path(tmp_path, 1).unlink()
  for shard, at in ((2, 80), (4, -30)):
    path = scores.shard_path(tmp_path, shard)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
  assert scores.missing_shards(tmp_path, 6) == [1, 2, 4, 5]
