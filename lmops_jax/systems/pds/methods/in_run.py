"""In-Run Data Shapley as a score: what a training run on the proxies owed to each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import numpy as np
import optax

from lmops_jax import control
from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  Name,
  NonEmpty,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.data.batches import host_rows
from lmops_jax.mesh import processes
from lmops_jax.systems.pds.methods.bench import DIVISORS, Bench
from lmops_jax.systems.pds.methods.sizes import Inner

_GRADIENT, _SLOPES, _PRODUCT = 3, 3, 6  # in forward passes


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class InRun:
  """In-run data values (arXiv 2406.11011) of a training run on the proxy set itself.

  Attributes:
    optimizer: that of the run; values are Shapley's for SGD (see `control.in_run`).
    order: 1, or 2 with the Hessian of the target's loss, whose instances are then differentiated
      all at once.
    epochs: passes over the proxies.
    batch_size: proxies of a step.
    checkpoints, num_target, micro_batch_size, divide_by: as in `PMP`.
    data_seed: of the order.
  """

  optimizer: optax.GradientTransformation
  name: Name = "in_run"
  order: Literal[1, 2] = 1
  epochs: PositiveInt = 1
  batch_size: PositiveInt = 32
  checkpoints: Annotated[Sequence[Count], NonEmpty, Distinct] | None = None
  num_target: PositiveInt | None = None
  micro_batch_size: PositiveInt = 64
  data_seed: Seed = 0
  divide_by: Literal[DIVISORS] | None = None

  def needs_forward_mode(self) -> bool:
    """True: it differentiates the proxy's losses along gradients of the target's."""
    return True

  def inner(self) -> Inner:
    """The size of a batch, which is of proxies."""
    return Inner(self.batch_size, "batch_size", of_proxies=True)

  def score_proxies(self, bench: Bench) -> np.ndarray:
    """`[C,M]`: from each checkpoint, by how much a proxy lowered the target's loss in all."""
    bench.check_sizes(self)
    num = len(bench.proxies["example_id"])
    index, weights = self._batches(num)
    own = index[:, host_rows(self.batch_size, jax.process_index(), jax.process_count())]
    batches = bench.partitioner.place_batch(
      {name: rows[own] for name, rows in bench.proxies.items()}, axis=1)
    target_loss = self._target_loss(bench)
    size = bench.partitioner.micro_batch_size(self.batch_size, self.micro_batch_size)
    rows = []
    for step in self.checkpoints or (bench.proxy.num_steps,):
      params = bench.proxy_params(step)
      with bench.partitioner.activate():
        run = control.TrainingRun(
          bench.example_losses, self.optimizer, params, batches, weights,
          bench.partitioner.device_rows)
        values = processes.fetch(control.in_run_values(
          run, target_loss, second_order=self.order == 2, micro_batch_size=size).values)
      total = np.zeros(num, np.float32)
      np.add.at(total, index, np.asarray(values))
      rows.append(bench.divided(total, params, self.divide_by))
    num_target = len(bench.target_batch(self.num_target)["example_id"])
    positions = len(index) * len(rows) * bench.corpus.length  # of one row a step
    bench.add_flops(positions * self.batch_size, _GRADIENT + _SLOPES)
    bench.add_flops(positions * num_target, _GRADIENT + (_PRODUCT if self.order == 2 else 0))
    return np.stack(rows)

  def _batches(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Which proxies a step takes, `[T,B]`, and their weights; fillers of the last weigh 0."""
    rng = np.random.default_rng(self.data_seed)
    order = np.concatenate([rng.permutation(num) for _ in range(self.epochs)])
    missing = -len(order) % self.batch_size
    weights = np.repeat(np.float32([1 / self.batch_size, 0]), [len(order), missing])
    shape = (-1, self.batch_size)
    return np.append(order, order[:missing]).reshape(shape), weights.reshape(shape)

  def _target_loss(self, bench: Bench):
    if self.order == 1:
      return bench.target_loss(self.num_target, self.micro_batch_size)
    rows = bench.target_batch(self.num_target)
    placed, _ = bench.place_rows(rows, len(rows["example_id"]))
    return control.mean_target_loss(
      bench.example_losses, placed, num_rows=len(rows["example_id"]))
