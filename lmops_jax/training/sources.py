"""Where the batches of a run come from: functions of the step, so that runs resume anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from lmops_jax.data import batches as batches_lib


class Source(Protocol):
  """The batches of a run.

  Attributes:
    reads_params: whether a batch depends on the parameters (rollouts do).
  """

  reads_params: bool

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """The batch of a step, the same whenever it is asked for.

    Args:
      step: counted from 0.
      params: of the state before that step, placed on the mesh; None unless `reads_params`.

    Returns:
      Host arrays, the rows of this process. `example_id [B]` stays on the host and names examples
      in errors.
    """


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches that a function `step -> batch` makes."""

  at: Callable[[int], Mapping[str, np.ndarray]]
  reads_params: ClassVar[bool] = False

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """See `Source`."""
    return self.at(step)


@dataclasses.dataclass(frozen=True)
class Epochs:
  """Batches that go through numbered rows again and again, each time in another order.

  Attributes:
    rows: `indices [n] int64 -> batch of n rows`.
    num: rows in all.
    batch_size: of all processes together.
    seed: of the order.
    shuffle: False keeps the order as it is.
    whole: `rows` is asked for all rows of a batch and not for those of this process alone, because
      a row depends on the others.
  """

  rows: Callable[[np.ndarray], Mapping[str, np.ndarray]]
  num: int
  batch_size: int
  seed: int
  shuffle: bool = True
  whole: bool = False
  reads_params: ClassVar[bool] = False

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """See `Source`."""
    own = batches_lib.host_rows(self.batch_size, jax.process_index(), jax.process_count())
    index = batches_lib.batch_indices(
      self.num, self.batch_size, self.seed, step, shuffle=self.shuffle)
    if not self.whole:
      return self.rows(index[own])
    return {name: value[own] for name, value in self.rows(index).items()}
