"""Hashes that are the same everywhere: digests of contents, and pseudo-random numbers from ids.

The numbers, for order, shuffling and sampling, are integer arithmetic alone, so every platform and
every version of NumPy gives the same ones.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

_MASK = 2**64 - 1
_BLOCK = 1 << 20
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, the step of splitmix64


def mix64(values: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): a bijection of uint64 that mixes."""
  values = np.asarray(values, np.uint64)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def order_keys(ids: np.ndarray, seed: int = 0) -> np.ndarray:
  """`order_key` of an array of ids, `[n] uint64`."""
  return mix64(np.asarray(ids).astype(np.uint64) + np.uint64((seed + 1) * GOLDEN & _MASK))


def draw_indices(ids: np.ndarray, count: int, seed: int) -> np.ndarray:
  """A random sample without replacement, in which each id's place depends on (seed, id) alone.

  Args:
    ids: `[N] int64`, distinct; a mapped array is read a block at a time.
    count: how many, at most N.

  Returns:
    The indices of the `count` ids with the least `order_key`, `[count] int64`, ascending.
  """
  keys, indices = np.zeros(0, np.uint64), np.zeros(0, np.int64)
  for start in range(0, len(ids), _BLOCK):
    block = order_keys(ids[start : start + _BLOCK], seed)
    keys = np.concatenate([keys, block])
    indices = np.concatenate([indices, np.arange(start, start + len(block))])
    if len(keys) > count:
      least = np.argpartition(keys, count - 1)[:count]
      keys, indices = keys[least], indices[least]
  return np.sort(indices)


def order_key(identifier: int, seed: int = 0) -> int:
  """A 64-bit pseudo-random number from (seed, id); distinct ids of one seed get distinct ones."""
  value = (identifier + (seed + 1) * GOLDEN) & _MASK
  value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
  value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
  return value ^ (value >> 31)


def digest(parts: Iterable[str | bytes], size: int = 16) -> str:
  """BLAKE2b of texts and bytes one after another, `2 * size` hex digits.

  Half characters in a text, as names that are not UTF-8 have them, count as they are.
  """
  state = hashlib.blake2b(digest_size=size)
  for part in parts:
    state.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
  return state.hexdigest()
