"""Where the batches of a run come from: functions of the step, so that runs resume anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np

from lmops_jax.data import batches as batches_lib
from lmops_jax.data.mixture import Mixture


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
      params: those of the state before that step, placed on the mesh; None unless `reads_params`.

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
    num: number of rows in all.
    batch_size: rows of a batch in all processes together.
    seed: seed of the order.
    shuffle: False keeps the order as it is.
    whole: ask `rows` for all rows of a batch, not for those of this process alone, because a row
      depends on the others.
    by_epoch: tell `rows` the number of the epoch as `epoch`, because a row is drawn anew in each.
  """

  rows: Callable[..., Mapping[str, np.ndarray]]
  num: int
  batch_size: int
  seed: int
  shuffle: bool = True
  whole: bool = False
  by_epoch: bool = False
  reads_params: ClassVar[bool] = False

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """See `Source`."""
    own = batches_lib.host_rows(self.batch_size, jax.process_index(), jax.process_count())
    index = batches_lib.batch_indices(
      self.num, self.batch_size, self.seed, step, shuffle=self.shuffle)
    told = {}
    if self.by_epoch:
      told["epoch"] = step // batches_lib.num_steps_per_epoch(self.num, self.batch_size)
    if not self.whole:
      return self.rows(index[own], **told)
    return {name: value[own] for name, value in self.rows(index, **told).items()}


@dataclasses.dataclass(frozen=True)
class Endless:
  """Batches of an endless list of rows: a step has those that follow the step before.

  Attributes:
    rows: `numbers [n] int64 -> batch of n rows`, such as `Mixture.batch`; it is asked for all rows
      of a batch, since their weights are relative.
    batch_size: rows of a batch in all processes together.
  """

  rows: Callable[[np.ndarray], Mapping[str, np.ndarray]]
  batch_size: int
  reads_params: ClassVar[bool] = False

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """See `Source`."""
    own = batches_lib.host_rows(self.batch_size, jax.process_index(), jax.process_count())
    numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
    return {name: value[own] for name, value in self.rows(numbers).items()}


class Part(NamedTuple):
  """The source of a part of every group.

  Attributes:
    mixture: the sources of one kind of row. rows_per_group: number of such rows in a group.
  """

  mixture: Mixture
  rows_per_group: int


@dataclasses.dataclass(frozen=True)
class Groups:
  """Batches whose examples are groups of rows by kind, so that all devices have equal work.

  Kosmos-1's step is 128 groups of 2 text rows, 48 image-text pairs and 1 interleaved document. Rows
  of different kinds have arrays of different shapes, and all of them share the axis of the groups.

  Attributes:
    parts: the parts by name, such as "text", "pairs".
    num_groups: groups of a batch in all processes together.
  """

  parts: Mapping[str, Part]
  num_groups: int
  reads_params: ClassVar[bool] = False

  def __post_init__(self):
    for name, part in self.parts.items():
      if part.rows_per_group < 1:
        raise ValueError(
          f"the part {name!r} of a group has rows_per_group={part.rows_per_group}; set it to 1 or "
          "more, or leave the part out."
        )
    if not self.parts or self.num_groups < 1:
      raise ValueError(
        f"num_groups={self.num_groups} of {len(self.parts)} parts make no batch; give a part at "
        "least and a positive number of groups."
      )

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """See `Source`.

    Returns:
      For each part the arrays of its rows under `<part>/<field>`, `[B,rows_per_group,...]`, which
      `part_of` takes out again. With `weight [B] float32` the mean over groups of the loss per
      learned token is the mean over all learned tokens of the batch, so that each kind weighs in
      proportion to its tokens. `example_id [B] int64` is that of a group's first row.
    """
    own = batches_lib.host_rows(
      self.num_groups, jax.process_index(), jax.process_count(), "num_groups")
    batch: dict[str, np.ndarray] = {}
    learned = np.zeros(self.num_groups, np.int64)
    for name, part in self.parts.items():
      size = part.rows_per_group
      numbers = np.arange(self.num_groups * size).reshape(self.num_groups, size)
      numbers += step * numbers.size
      learned += part.mixture.num_learned(numbers.ravel()).reshape(numbers.shape).sum(axis=1)
      rows = dict(part.mixture.batch(numbers[own].ravel()))
      rows.pop("weight", None)  # it is for a batch of one source
      ids = rows.pop("example_id").reshape(-1, size)[:, 0]
      batch.setdefault("example_id", ids)
      for field, value in rows.items():
        batch[f"{name}/{field}"] = value.reshape(-1, size, *value.shape[1:])
    batch["weight"] = (learned[own] * self.num_groups / learned.sum()).astype(np.float32)
    return batch


def part_of(batch: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The arrays of one part of a batch of `Groups`, by field, `[B,rows_per_group,...]`."""
  return {
    key.removeprefix(f"{name}/"): value for key, value in batch.items()
    if key.startswith(f"{name}/")
  }


class Ahead:
  """The batches of another source, made in a thread while the device works on earlier ones.

  A batch is the same as without this class; an error is raised when its batch is asked for.

  Args:
    source: a function of the step alone.
    num_ahead: batches that are made before they are asked for, and are held in memory.

  Raises:
    ValueError: for a source that reads parameters, or a `num_ahead` below 1.
  """

  reads_params = False

  def __init__(self, source: Source, num_ahead: int = 1):
    if source.reads_params:
      raise ValueError(
        "the batches of a source that reads parameters cannot be made ahead; take it as it is.")
    if num_ahead < 1:
      raise ValueError(f"num_ahead={num_ahead} must be 1 or more.")
    self._source, self._num_ahead = source, num_ahead
    self._pool = ThreadPoolExecutor(1, "batches")
    self._made: dict[int, Future] = {}

  def batch(self, step: int, params: Any = None) -> Mapping[str, np.ndarray]:
    """See `Source`."""
    wanted = range(step, step + self._num_ahead + 1)
    for other in [s for s in self._made if s not in wanted]:
      self._made.pop(other).cancel()
    for following in wanted:
      if following not in self._made:
        self._made[following] = self._pool.submit(self._source.batch, following)
    return self._made.pop(step).result()
