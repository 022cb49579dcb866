"""Draws and orders by id: what they depend on, and that one number at a time gives the same."""

import hashlib

import numpy as np
from scipy import stats

from lmops_jax.host import hashing

IDS = np.random.default_rng(0).integers(0, 2**63, 4000)


def test_keys_of_an_array_are_those_of_its_ids():
  ids = np.array([0, 1, 2**40, 2**63 - 1])
  for seed in (0, 1234, 2**63):
    want = [hashing.order_key(i, seed) for i in ids.tolist()]
    assert hashing.order_keys(ids, seed).tolist() == want


def test_a_draw_is_uniform_and_reads_block_by_block(monkeypatch):
  want = hashing.draw_indices(IDS, 1000, seed=3)
  assert len(np.unique(want)) == 1000 and (np.diff(want) > 0).all()
  assert stats.chisquare(np.histogram(want, bins=20, range=(0, 4000))[0]).pvalue > 1e-3
  assert not np.array_equal(hashing.draw_indices(IDS, 1000, seed=4), want)
  monkeypatch.setattr(hashing, "_BLOCK", 37)
  np.testing.assert_array_equal(hashing.draw_indices(IDS, 1000, seed=3), want)
  np.testing.assert_array_equal(hashing.draw_indices(IDS[:5], 5, seed=3), np.arange(5))


def test_new_ids_replace_some_of_a_draw_and_move_none():
  before = IDS[hashing.draw_indices(IDS, 1000, seed=3)]
  more = np.concatenate([IDS[:100] + 1, IDS])  # in front of all
  after = more[hashing.draw_indices(more, 1000, seed=3)]
  new = np.isin(after, IDS[:100] + 1)
  assert 0 < new.sum() < 60 and np.isin(after[~new], before).all()


def test_order_keys_are_the_mixed_steps_of_splitmix64():
  for identifier, seed in ((0, 0), (7, 3), (2**63 - 1, 2**32 - 1)):
    value = np.array([(identifier + (seed + 1) * hashing.GOLDEN) % 2**64], np.uint64)
    assert hashing.order_key(identifier, seed) == int(hashing.mix64(value)[0])


def test_order_keys_of_a_seed_are_distinct():
  keys = {hashing.order_key(identifier, 5) for identifier in range(10_000)}
  assert len(keys) == 10_000
  assert keys != {hashing.order_key(identifier, 6) for identifier in range(10_000)}


def test_a_digest_is_that_of_all_parts_in_a_row():
  whole = hashlib.blake2b("é".encode() + b"bytes", digest_size=16).hexdigest()
  assert hashing.digest(["é", b"bytes"]) == hashing.digest(["éby", b"tes"]) == whole
  assert len(hashing.digest(["a"], size=8)) == 16
  halves = "\udc80", "\udc81"  # of names that are not UTF-8
  assert hashing.digest([halves[0]]) != hashing.digest([halves[1]])
