"""Figures of merit of two-class decisions by scores: the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def roc_auc(scores: Sequence[float], labels: Sequence[int]) -> float:
  """The area under the ROC curve: how often a positive row scores above a negative one.

  Ties count half. HatefulMemes is measured by it.

  Args:
    scores: `[N]`, higher for label 1; see `share_of`.
    labels: `[N]`, 0 or 1, both there.

  Raises:
    ValueError: different lengths, a score that is not finite, other labels, or one label only.
  """
  from sklearn.metrics import roc_auc_score

  scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
  if scores.ndim != 1 or scores.shape != labels.shape:
    raise ValueError(
      f"the scores and labels of a ROC curve have the shapes {scores.shape} and {labels.shape}; "
      "give one of each a row."
    )
  if not np.isfinite(scores).all():
    row = int(np.flatnonzero(~np.isfinite(scores))[0])
    raise ValueError(f"the score of row {row} is {scores[row]}; a ROC curve needs finite ones.")
  if set(np.unique(labels)) != {0, 1}:
    raise ValueError(
      f"the labels of a ROC curve are {', '.join(map(str, np.unique(labels))) or 'none'}; it needs "
      "rows of both 0 and 1, and no others."
    )
  return float(roc_auc_score(labels, scores))


def roc_auc_error(scores: Sequence[float], labels: Sequence[int]) -> float:
  """The standard error of `roc_auc` over rows (DeLong et al. 1988); arguments as there.

  Returns:
    NaN if one of the labels has a single row.
  """
  from scipy.stats import rankdata

  scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
  ranks, variance = rankdata(scores), 0.0
  for label in (0, 1):
    own = labels == label
    # Of each row, how many of the other label lie below it, ties half.
    below = (ranks[own] - rankdata(scores[own])) / (~own).sum()
    variance += below.var(ddof=1) / own.sum() if own.sum() > 1 else np.nan
  return float(np.sqrt(variance))


def share_of(log_likelihoods: np.ndarray, option: int) -> np.ndarray:
  """How likely an option is among all: p(yes) / (p(yes) + p(no)), for `roc_auc`.

  Args:
    log_likelihoods: `[N,options]`, nats.
    option: which.

  Returns:
    `[N] float64`.
  """
  values = np.asarray(log_likelihoods, np.float64)
  values = np.exp(values - values.max(axis=-1, keepdims=True))
  return values[:, option] / values.sum(axis=-1)
