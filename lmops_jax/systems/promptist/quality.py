"""Stage `quality`: what people like of a picture, told from the picture tower's vector.

As LAION's aesthetic predictor it is affine and fitted to people's ratings by least squares; it
never sees a caption. The exact solution with a small penalty takes the place of gradient steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmops_jax.host.whole_files import write_arrays
from lmops_jax.models.aesthetic import Folded
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist.generator import Parts, image_features

STAGE = "quality"
_FILE = "head.npz"
_PENALTY = 1e-3  # of a kernel's squared length, beside the mean squared error of N pictures


def fit_head(features: np.ndarray, ratings: np.ndarray, penalty: float = _PENALTY) -> Folded:
  """The affine function with the least mean squared error plus `penalty` times its squared slope.

  Args:
    features: `[N,D]`.
    ratings: `[N]`.
  """
  features, ratings = np.asarray(features, np.float64), np.asarray(ratings, np.float64)
  middle, mean = features.mean(axis=0), ratings.mean()
  centred = features - middle
  square = centred.T @ centred / len(centred) + penalty * np.eye(features.shape[1])
  kernel = np.linalg.solve(square, centred.T @ (ratings - mean) / len(centred))
  return Folded(kernel.astype(np.float32), np.float32(mean - middle @ kernel))


def run(context: pipeline.StageContext, parts: Parts) -> None:
  """Fits the head, and tests it on pictures that nothing was fitted to."""
  prepared, num = parts.prepared, parts.prepared.num_train
  features = image_features(parts.clip, parts.clip_params, prepared.pictures)
  head = fit_head(features[:num], prepared.ratings[:num])
  write_arrays(context.directory / _FILE, head._asdict())
  told = features[num:] @ head.kernel + head.bias
  context.extra["tested"] = {
    "correlation": float(np.corrcoef(told, prepared.ratings[num:])[0, 1]),
    "error": float(np.sqrt(np.square(told - prepared.ratings[num:]).mean())),
    "spread": float(prepared.ratings[num:].std())}


def load(folder: Path) -> Folded:
  """The head of a finished stage."""
  with np.load(folder / _FILE) as arrays:
    return Folded(**{name: arrays[name] for name in Folded._fields})
