"""Mean and deviation of float32 numbers, exactly, so that they add up in any order and grouping."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np

_BLOCK = 1 << 20  # sums of so many 24-bit numbers are exact in float64


@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over finite float32 numbers, without rounding.

  Attributes:
    count: how many there are.
    total: their sum, in units of 2^-149, the smallest float32.
    squares: the sum of their squares, in units of 2^-298.
  """

  count: int = 0
  total: int = 0
  squares: int = 0

  @classmethod
  def of(cls, values: np.ndarray) -> Moments:
    """The moments of an array of finite float32 numbers."""
    result = cls()
    flat = np.asarray(values, np.float32).reshape(-1)
    for start in range(0, len(flat), _BLOCK):
      result += cls._of_block(flat[start : start + _BLOCK])
    return result

  @classmethod
  def _of_block(cls, values: np.ndarray) -> Moments:
    bits = values.view(np.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(np.int64)
    size = ((bits & 0x7FFFFF) | ((exponent > 0).astype(np.uint32) << 23)).astype(np.int64)
    shift = np.maximum(exponent, 1) - 1  # the number is +-size * 2^shift units
    high, low = size >> 12, size & 0xFFF

    def total(weights, per_shift: int) -> int:
      sums = np.bincount(shift, weights)
      return sum(int(sums[s]) << (per_shift * int(s)) for s in np.flatnonzero(sums))

    squares = (
      (total(high * high, 2) << 24) + (total(high * low, 2) << 13) + total(low * low, 2)
    )
    return cls(len(values), total(np.where(bits >> 31, -size, size), 1), squares)

  def __add__(self, other: Moments) -> Moments:
    return Moments(
      self.count + other.count, self.total + other.total, self.squares + other.squares
    )

  @property
  def mean(self) -> float:
    """The mean, rounded once."""
    return float(Fraction(self.total, self.count << 149))

  @property
  def deviation(self) -> float:
    """The standard deviation."""
    root = math.isqrt((self.count * self.squares - self.total**2) << 128)
    return float(Fraction(root, self.count << (64 + 149)))
