import hashlib

import numpy as np

from lmops_jax.host.hashing import GOLDEN, digest, mix64, order_key


def test_order_keys_are_the_mixed_steps_of_splitmix64():
  for identifier, seed in ((0, 0), (7, 3), (2**63 - 1, 2**32 - 1)):
    value = (identifier + (seed + 1) * GOLDEN) % 2**64
    assert order_key(identifier, seed) == int(mix64(np.array([value], np.uint64))[0])


def test_order_keys_of_a_seed_are_distinct():
  keys = {order_key(identifier, 5) for identifier in range(10_000)}
  assert len(keys) == 10_000
  assert keys != {order_key(identifier, 6) for identifier in range(10_000)}


def test_a_digest_is_that_of_all_parts_in_a_row():
  whole = hashlib.blake2b("é".encode() + b"bytes", digest_size=16).hexdigest()
  assert digest(["é", b"bytes"]) == digest(["éby", b"tes"]) == whole
  assert len(digest(["a"], size=8)) == 16
  assert digest(["\udc80"]) != digest(["\udc81"])  # halves of names that are not UTF-8
