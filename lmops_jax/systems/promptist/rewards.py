"""The reward of a rewritten prompt, from numbers of its pictures (arXiv 2212.09611, section 2.3).

  relevance of a picture = min(20 * cosine(picture, x) - 5.6, 0), the cosine taken as 0 if negative
  score(x, y) = mean over pictures of y of (aesthetic + relevance) - mean aesthetic of pictures of x

x is the user's prompt, to which relevance is always measured, y the rewritten one. Both terms have
a weight, 1 in the paper. The cosine is CLIP's without its logit scale; the knee is at 0.28, and
relevance lies in -5.6 .. 0. The KL term is no part of this.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_SLOPE, _OFFSET = 20.0, 5.6


class Weights(NamedTuple):
  """What the two terms of a score are multiplied with."""

  relevance: float = 1.0
  aesthetic: float = 1.0


class Terms(NamedTuple):
  """Means over each prompt's finite pictures, `[P] float64`; NaN without any.

  Attributes:
    relevance: mean of each picture's relevance, -5.6 .. 0.
    aesthetic: mean rating.
    num: pictures that the means are over, `[P] int64`.
  """

  relevance: np.ndarray
  aesthetic: np.ndarray
  num: np.ndarray


def relevance(cosine: np.ndarray) -> np.ndarray:
  """Relevance of pictures, of any shape, float64: 0 from a cosine of 0.28 on, -5.6 at 0 or less."""
  cosine = np.asarray(cosine, np.float64)
  return np.minimum(_SLOPE * np.maximum(cosine, 0) - _OFFSET, 0)


def finite(cosine: np.ndarray, aesthetic: np.ndarray) -> np.ndarray:
  """Which pictures count, of the same shape, bool: those with two finite numbers."""
  return np.isfinite(cosine) & np.isfinite(aesthetic)


def terms(cosine: np.ndarray, aesthetic: np.ndarray) -> Terms:
  """The means of each prompt's pictures; those that are not finite are left out.

  Args:
    cosine: `[P,n]`, of each picture with the user's prompt.
    aesthetic: `[P,n]`, its rating.
  """
  counts = finite(cosine, aesthetic)
  num = counts.sum(axis=1)
  with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as said
    return Terms(*(
      np.where(counts, values, 0.0).sum(axis=1) / num
      for values in (relevance(cosine), np.asarray(aesthetic, np.float64))
    ), num)


def scores(rewritten: Terms, raw_aesthetic: np.ndarray, weights: Weights) -> np.ndarray:
  """The scores of rewritten prompts, `[P] float64`; NaN if a prompt's pictures all failed.

  Args:
    rewritten: of the pictures of y, relevance to x.
    raw_aesthetic: `[P]` mean rating of the pictures of x.
    weights: of the two terms.
  """
  gain = rewritten.aesthetic - np.asarray(raw_aesthetic, np.float64)
  return weights.aesthetic * gain + weights.relevance * rewritten.relevance
