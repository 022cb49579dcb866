"""How well predicted scores order examples: Spearman's rank correlation and top-fraction agreement.

Used to choose a data scorer's checkpoint (PDS, arXiv 2410.07064, section 3.2 and its reference
code: highest validation Spearman, accuracy and F1 of "is in the top 30 %").
"""

import numpy as np
from scipy import stats


def spearman(predicted, actual) -> float:
  """Spearman's rank correlation, ties given their average rank.

  Args:
    predicted: `[N]` real numbers, N >= 2.
    actual: `[N]` real numbers.

  Returns:
    A float in [-1, 1].

  Raises:
    ValueError: shapes differ, fewer than two values, a non-finite value, or constant values (the
      correlation is then undefined; returning 0 or NaN would hide a collapsed scorer).
  """
  predicted, actual = _pair(predicted, actual)
  ranks = []
  for name, values in (("predicted", predicted), ("actual", actual)):
    if np.all(values == values[0]):
      raise ValueError(
        f"Spearman's correlation is undefined: all {len(values)} {name} scores equal {values[0]!s}."
      )
    # Ranks average to (N + 1) / 2 whatever the ties; centring first keeps the sums exact.
    ranks.append(stats.rankdata(values) - (len(values) + 1) / 2)
  x, y = ranks
  return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def top_fraction_metrics(predicted, actual, fraction: float = 0.3) -> dict[str, float]:
  """Accuracy and F1 of "the example is among the top `fraction`", with chance levels.

  Both sets hold `k = round(fraction * N)` examples (at least 1), so precision, recall and F1
  coincide. Equal scores are ranked by position. Chance is the expectation for a random set of k.

  Returns:
    `accuracy`, `f1`, and `random_accuracy`, `random_f1`, what chance gives on average.

  Raises:
    ValueError: shapes differ, a non-finite value, or `fraction` outside (0, 1).
  """
  predicted, actual = _pair(predicted, actual)
  if not 0 < fraction < 1:
    raise ValueError(f"fraction={fraction} is not between 0 and 1; 0.3 marks the best 30 %.")
  n = len(predicted)
  k = min(max(round(fraction * n), 1), n - 1)
  top = [np.argsort(-values, kind="stable")[:k] for values in (predicted, actual)]
  overlap = len(np.intersect1d(*top, assume_unique=True))

  by_chance = k * k / n
  return {
    "accuracy": 1 - 2 * (k - overlap) / n,
    "f1": overlap / k,
    "random_accuracy": 1 - 2 * (k - by_chance) / n,
    "random_f1": by_chance / k,
  }


def _pair(predicted, actual) -> tuple[np.ndarray, np.ndarray]:
  predicted, actual = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
  if predicted.ndim != 1 or predicted.shape != actual.shape:
    raise ValueError(
      f"Predicted and actual scores must be vectors of one length, "
      f"but their shapes are {predicted.shape} and {actual.shape}."
    )
  if len(predicted) < 2:
    raise ValueError(f"Ranking needs at least 2 scores, but {len(predicted)} were given.")
  for name, values in (("predicted", predicted), ("actual", actual)):
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      raise ValueError(
        f"{bad.size} of {len(values)} {name} scores are not finite; the first is "
        f"{values[bad[0]]} at position {bad[0]}."
      )
  return predicted, actual
