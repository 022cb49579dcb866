"""Early stopping: some of the rows are held out, and tell after which epoch a run is at its best.

The paper stops early and does not say on which rows. Here it is a tenth of the rows, if there are
500 or more: fewer held-out rows than 50 tell little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from lmops_jax.systems.prototypes.encoding import Encoded
from lmops_jax.training import loop
from lmops_jax.training.learner import Learner
from lmops_jax.training.metrics import read_records
from lmops_jax.training.records import Evaluate, Records

_LEAST_ROWS, _EVERY = 500, 10
_KEPT_EVERY = 500  # steps between checkpoints, at least; most runs are shorter and cheap to redo


class Trained(NamedTuple):
  """What a run has learned: parameters on the host, its records, and the seconds it took."""

  params: Any
  history: tuple
  seconds: float


class _Enough(Exception):
  """Ends a run that does not get better."""


def parted(m, patience: int):
  """The material without its held-out rows, and these; None if all rows are learned from.

  Rows come in an order whose every part has the classes in proportion, of which every tenth is held
  out, unless it is the last one of its class.

  Args:
    m: `methods.Material`.
    patience: 0 holds nothing out.

  Returns:
    `Material` and None or `(Encoded, targets)`.
  """
  number = len(m.targets)
  if not patience or number < _LEAST_ROWS:
    return m, None
  out = np.arange(number) % _EVERY == _EVERY - 1
  if m.num_classes is not None:
    out &= np.isin(m.targets, m.targets[~out])

  def some(which):
    return Encoded(m.train.hidden[which], m.train.lengths[which], 0), m.targets[which]

  rest, targets = some(~out)
  return m._replace(train=rest, targets=targets), some(out)


def train(
  learner: Learner, source, num_epochs: int, per_epoch: int, m, start: Callable[[], Any],
  patience: int = 0, loss: Callable[[Any], float] | None = None,
) -> Trained:
  """Trains in the material's directory from the parameters that `start` gives.

  Args:
    patience: epochs without a lower `loss` after which it ends; the epoch of the lowest is kept. 0
      goes through all epochs and keeps the last.
    loss: of the rows that `parted` has held out, by parameters; None as `patience` 0.

  Raises:
    ValueError: for a run that stops early in several processes.
  """
  num_steps, began = num_epochs * per_epoch, time.monotonic()
  stops = patience > 0 and loss is not None
  if stops and jax.process_count() > 1:
    raise ValueError(
      f"this job has {jax.process_count()} processes, and when to stop is told in one; set "
      "patience to 0, or start one process."
    )
  ends = [per_epoch * (1 + i) for i in range(num_epochs)]
  records = Records(
    log_every=per_epoch, checkpoint_every=max(_KEPT_EVERY, num_steps // 4), description=m.describe,
    params_at=ends if stops else (), tensorboard=False)

  def figures(params):
    losses = [*_losses(m.directory), float(loss(params))]
    if len(losses) - 1 - int(np.argmin(losses)) >= patience:
      raise _Enough
    return {"loss": losses[-1]}

  hooks = [Evaluate("held", per_epoch, figures)] if stops else []
  try:
    done = loop.train(
      learner, source, num_steps, m.seed, m.directory, m.partitioner, records=records,
      initial_params=start, hooks=hooks)
    params, history = jax.device_get(learner.params(done.state)), tuple(done.history)
  except _Enough:
    history = tuple(read_records(m.directory / "metrics.jsonl"))
  if stops:
    best = ends[int(np.argmin(_losses(m.directory)))]
    abstract = nn.unbox(jax.eval_shape(learner.params, loop.abstract_state(learner)))
    params = jax.device_get(loop.load_kept_params(m.directory, best, abstract))
    history = tuple(record for record in history if 0 < record["step"] <= best)
  return Trained(params, history, time.monotonic() - began)


def mean_loss(said: np.ndarray, targets: np.ndarray) -> float:
  """Nats of log-probabilities `[N,C]`, or squared error of values `[N]`, a row."""
  if said.ndim == 1:
    return float(np.square(said - targets).mean())
  return float(-said[np.arange(len(said)), targets].mean())


def _losses(directory) -> list[float]:
  """Held-out losses after each epoch so far; that of the start is left out."""
  return [record["held/loss"] for record in read_records(directory / "metrics.jsonl")
          if record["step"] and "held/loss" in record]
