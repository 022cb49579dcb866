"""Batches drawn by weights that change with the step: how training consumes a learning policy.

A policy gives every example a weight at every step (arXiv 2402.17759). Full-batch training uses the
weights as they are; training on batches draws from them. The draw of a step is a function of
(seed, step) alone, so a run resumes in the middle and does not depend on the number of hosts.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Text, component
from lmops_jax.host.hashing import order_key
from lmops_jax.host.manifests import verify_read


@component(module="data")
@dataclasses.dataclass(frozen=True)
class SamplingWeights:
  """A policy in a file, read when it is first needed.

  Attributes:
    path: an `.npz` file that holds `weights [T,N]`, each row on the simplex (`write`).
    num_steps: steps of the run that consumes it; the policy's T rows are stretched evenly over
      them. None: step t reads row t, and steps from T on read the last row.

  Raises:
    ValueError: if there is no such file or array, or a row is not on the simplex.
  """

  path: Text
  num_steps: PositiveInt | None = None

  @functools.cached_property
  def weights(self) -> np.ndarray:
    """The policy's weights, `[T,N] float32`."""
    path = Path(self.path).expanduser()
    if not path.is_file():
      raise ValueError(f"data.SamplingWeights.path={self.path!r} is not a file.")
    verify_read(path)
    try:
      with np.load(path, allow_pickle=False) as arrays:
        weights = arrays["weights"]
    except (KeyError, OSError, ValueError) as error:
      raise ValueError(
        f"{path} is not a file of sampling weights: it needs an array `weights` [T, N]."
      ) from error
    check_rows(weights, str(path))
    return weights

  def row(self, step: int) -> np.ndarray:
    """Weights `[N]` of a step."""
    num_rows = len(self.weights)
    if self.num_steps is not None:
      step = step * num_rows // self.num_steps
    return self.weights[min(step, num_rows - 1)]

  def batch_indices(self, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Examples of a step's batch, `[batch_size] int64`; see `draw`."""
    return draw(self.row(step), batch_size, seed, step)


def draw(weights: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
  """`batch_size` examples by their weights `[N]`, by systematic resampling.

  One uniform number shifts `batch_size` equidistant points on the cumulative weights: an example
  with weight w comes floor(B w) or ceil(B w) times, B w on average, and the batch's mean loss is
  unbiased for the weighted loss with less variance than independent draws. A weight of 0 is never
  drawn.

  Raises:
    ValueError: for a batch size below 1.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} is not positive; set it to 1 or more.")
  cumulative = np.cumsum(weights, dtype=np.float64)
  shift = (order_key(step, seed) >> 11) * 2.0**-53  # in [0, 1)
  points = (np.arange(batch_size) + shift) / batch_size * cumulative[-1]
  return np.searchsorted(cumulative, points, side="right").clip(max=_last_with_weight(weights))


def _last_with_weight(weights) -> int:
  return int(np.flatnonzero(weights)[-1])


def write(path: Path | str, weights: np.ndarray, **more: np.ndarray) -> None:
  """Writes weights `[T,N]` (and other arrays beside them) as `SamplingWeights` reads them.

  Raises:
    ValueError: for a row that is not on the simplex.
  """
  weights = np.asarray(weights, np.float32)
  check_rows(weights, "the policy")
  with Path(path).open("wb") as file:
    np.savez_compressed(file, weights=weights, **more)


def check_rows(weights: np.ndarray, name: str) -> None:
  """Refuses weights that are not `[T,N]` with rows on the simplex; names the row."""
  if weights.ndim != 2 or not weights.size:
    raise ValueError(f"{name} has weights of shape {weights.shape}; expected [T, N].")
  good = np.isfinite(weights).all(axis=1) & (weights >= 0).all(axis=1)
  good &= np.abs(weights.sum(axis=1, dtype=np.float64) - 1) <= 1e-4
  if not good.all():
    t = int(np.argmin(good))
    raise ValueError(
      f"the weights of step {t} in {name} are not on the simplex (sum "
      f"{weights[t].sum(dtype=np.float64):.6g}, least {weights[t].min():.6g}); each row must be "
      ">= 0 and sum to 1."
    )
