"""Selecting the best share of a corpus by perturbed scores (Gumbel-top-k), in memory.

PDS (arXiv 2410.07064, section 2.3) keeps the K = floor(ratio * N) examples with the largest
`score - tau * log(-log u)`, u uniform on (0, 1): sampling without replacement with Plackett-Luce
weights exp(score / tau). The noise is a function of (seed, example id) alone, so that any shard can
be processed anywhere, in any order, and the chosen set does not depend on how a corpus is cut. It
is built from integer operations and correctly rounded float64 arithmetic only (no libm), so that
every platform draws the same bits.
"""

import math
import numbers
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from lmops_jax.systems.pds import ranking

_BLOCK = 1 << 14  # ids given noise together: temporaries of this size stay in a core's cache
_READ = 1 << 17  # scores looked at together


def gumbel_noise(seed: int, ids) -> np.ndarray:
  """Standard Gumbel noise that depends on (seed, id) only.

  Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
  seed as key and the id as counter gives 52 random bits, u = (bits + 1/2) / 2^52, and the result is
  -log(-log u), which lies in [-3.61, 36.74].

  Args:
    seed: 0 <= seed < 2^64.
    ids: integers, any shape, non-negative.

  Returns:
    float64, shape of `ids`; identical bits on every platform.

  Raises:
    ValueError: for a seed out of range, ids that are not integers, or a negative id.
  """
  seed = _checked_seed(seed)
  ids = np.asarray(ids)
  if ids.dtype.kind not in "iu":
    raise ValueError(f"Example ids must be integers, but their dtype is {ids.dtype}.")
  if ids.dtype.kind == "i" and ids.size and ids.min() < 0:
    raise ValueError(f"Example ids must not be negative, but one is {ids.min()}.")
  flat = ids.reshape(-1).astype(np.uint64, copy=False)
  noise = np.empty(flat.shape, np.float64)
  for start in range(0, len(flat), _BLOCK):
    block = flat[start : start + _BLOCK]
    zero = np.zeros_like(block)
    words = _philox((block & _LOW, block >> 32, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    bits = (words[0] << np.uint64(20)) | (words[1] >> np.uint64(12))
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-52
    noise[start : start + _BLOCK] = -_log(-_log(uniform))
  return noise.reshape(ids.shape)


def num_selected(num_examples: int, *, ratio: float | None = None, k: int | None = None) -> int:
  """How many examples are kept: `k`, or floor(ratio * num_examples) in exact arithmetic.

  A float such as 0.29 or 1/3 stands for the simple fraction that it prints as, so that 29 of 100
  and 1 of 3 are kept although float products would give 28.999999999999996.

  Raises:
    ValueError: for not exactly one of `ratio` and `k`, a ratio outside (0, 1], or a count that is 0
      or larger than `num_examples`.
  """
  if isinstance(num_examples, bool) or not isinstance(num_examples, numbers.Integral):
    raise ValueError(f"num_examples={num_examples!r} is not an integer.")
  if num_examples < 1:
    raise ValueError(f"Nothing can be selected from {num_examples} examples.")
  if (ratio is None) == (k is None):
    raise ValueError(f"Give exactly one of ratio and k (ratio={ratio}, k={k}).")
  if k is not None:
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k <= num_examples:
      raise ValueError(
        f"k={k} is not an integer between 1 and the number of examples ({num_examples})."
      )
    return int(k)
  ratio = float(ratio)
  if not 0 < ratio <= 1:
    raise ValueError(f"ratio={ratio} is not in (0, 1]; 0.4 keeps 40 % of the examples.")
  simple = Fraction(ratio).limit_denominator(1_000_000)
  exact = simple if float(simple) == ratio else Fraction(ratio)
  kept = math.floor(exact * int(num_examples))
  if kept == 0:
    raise ValueError(
      f"ratio={ratio} of {num_examples} examples keeps none; use at least 1/{num_examples}."
    )
  return kept


def gumbel_top_k(
  scores,
  *,
  ratio: float | None = None,
  k: int | None = None,
  tau: float,
  seed: int,
  ids=None,
) -> np.ndarray:
  """Ids of the K largest `scores + tau * gumbel_noise(seed, ids)`; all scores in memory.

  Args:
    scores: `[N]` finite numbers; larger is better.
    ratio: share to keep, in (0, 1]; or
    k: number to keep, in [1, N].
    tau: noise scale in units of the scores, >= 0; 0 means no noise.
    seed: seed of the noise, 0 <= seed < 2^64.
    ids: `[N]` distinct non-negative integers; 0..N-1 if not given.

  Returns:
    `[K] int64`, ascending. Equal perturbed scores go to the smaller id.

  Raises:
    ValueError: if any of the above does not hold.
  """
  scores = np.asarray(scores)
  count = num_selected(len(scores), ratio=ratio, k=k)
  tau, seed = checked_noise(tau, seed)
  if ids is None:
    ids = np.arange(len(scores), dtype=np.int64)
  elif len(np.unique(ids)) != len(ids):
    values, counts = np.unique(ids, return_counts=True)
    raise ValueError(f"Example id {values[counts > 1][0]} occurs more than once in the scores.")
  ids, scores = _checked_pair(ids, scores, "the scores")
  keys = np.empty(len(scores), np.uint64)
  for start in range(0, len(scores), _READ):
    rows = slice(start, start + _READ)
    keys[rows] = perturbed_keys(ids[rows], scores[rows], tau, seed, "the scores")
  threshold = ranking.nth_largest(ids, keys, count)
  return np.sort(ids[ranking.at_least(ids, keys, threshold)])


# --- noise ----------------------------------------------------------------------------------------

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _philox(counter, key) -> tuple[np.ndarray, ...]:
  """Philox-4x32-10: four counter words and two key words to four random words (held in uint64)."""
  x0, x1, x2, x3 = counter
  k0, k1 = key
  for _ in range(10):
    product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
    x0 = (product1 >> _HALF) ^ x1 ^ np.uint64(k0)
    x2 = (product0 >> _HALF) ^ x3 ^ np.uint64(k1)
    x1, x3 = product1 & _LOW, product0 & _LOW
    k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
  return x0, x1, x2, x3


def _log(x: np.ndarray) -> np.ndarray:
  """Natural logarithm of positive float64 numbers, within 2 ulp, from exact steps only.

  np.log's last bit depends on the processor's vector unit; this uses frexp, +, -, * and / alone:
  x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh((m - 1) / (m + 1)) by its series.
  """
  m, e = np.frexp(x)
  small = m < 0.7071067811865476
  m = np.where(small, 2 * m, m)
  e = (e - small).astype(np.float64)
  s = (m - 1) / (m + 1)
  z = s * s
  series = np.full_like(z, 1 / 23)
  for n in range(21, 1, -2):
    series = series * z + 1 / n
  # ln 2 in two parts, the first short enough for e * high to be exact.
  high, low = 0.6931471803691238, 1.9082149292705877e-10
  return e * high + (2 * s + (2 * s * z * series + e * low))


def _checked_seed(seed) -> int:
  if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 1 << 64:
    raise ValueError(f"seed={seed!r} is not an integer in [0, 2^64).")
  return int(seed)


def checked_noise(tau, seed) -> tuple[float, int]:
  """Scale and seed of the noise; raises ValueError if one is out of range."""
  tau = float(tau)
  if not 0 <= tau <= 1e300:
    raise ValueError(f"tau={tau} is not a finite noise scale >= 0 (0 means no noise).")
  return tau, _checked_seed(seed)


# --- perturbed scores -----------------------------------------------------------------------------

def _checked_pair(ids, scores, where) -> tuple[np.ndarray, np.ndarray]:
  """Ids `[n] int64` and scores `[n]` of some real dtype."""
  ids, scores = np.asarray(ids), np.asarray(scores)
  if ids.ndim != 1 or ids.shape != scores.shape:
    raise ValueError(
      f"Ids and scores must be vectors of one length, but {where} has shapes "
      f"{ids.shape} and {scores.shape}."
    )
  if scores.dtype.kind not in "fiu":
    raise ValueError(f"Scores must be real numbers, but the dtype of {where} is {scores.dtype}.")
  if ids.dtype.kind not in "iu":
    raise ValueError(f"Example ids must be integers, but their dtype in {where} is {ids.dtype}.")
  if len(ids) and (ids.min() < 0 or ids.max() > ranking.LAST_ID):
    raise ValueError(
      f"Example ids must lie in [0, 2^63), but {where} has {ids.min()}..{ids.max()}."
    )
  return ids.astype(np.int64, copy=False), scores


def perturbed_keys(ids, scores, tau, seed, where) -> np.ndarray:
  """Perturbed scores as integers in the same order, `[n] uint64`."""
  values = scores.astype(np.float64)
  finite = np.isfinite(values)
  if not finite.all():
    first = int(np.argmin(finite))
    raise ValueError(
      f"The score of example {ids[first]} in {where} is {values[first]}, not a finite number; "
      "compute the scores again."
    )
  if tau > 0:
    values = values + tau * gumbel_noise(seed, ids)
  return ranking.keys(values)


# --- streaming ------------------------------------------------------------------------------------


def blocks(shards, tau, seed, num_examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """The ids `[n] int64` and keys `[n] uint64` of `(ids, scores)` shards, a block at a time."""
  seen = 0
  for i, (ids, scores) in enumerate(shards):
    ids, scores = _checked_pair(ids, scores, f"score shard {i}")
    seen += len(ids)
    if seen > num_examples:
      check_count(seen, num_examples, "at least ")
    for start in range(0, len(ids), _READ):
      rows = slice(start, start + _READ)
      yield ids[rows], perturbed_keys(ids[rows], scores[rows], tau, seed, f"score shard {i}")


def check_count(seen, num_examples, prefix=""):
  if seen != num_examples:
    raise ValueError(
      f"The shards hold {prefix}{seen} scores, but the corpus has {num_examples} examples; "
      "annotate the corpus again."
    )


def check_unchanged(seen, expected):
  if seen != expected:
    raise ValueError("The score shards changed while they were being read; select again.")


def check_selected(selected, count, threshold):
  if selected != count:
    raise ValueError(
      f"Example id {threshold[1]} occurs more than once: {selected} scores reach the threshold of "
      f"the {count} to keep; give every example its own id."
    )
