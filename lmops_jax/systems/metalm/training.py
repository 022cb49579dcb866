"""Stages `train` and `finetune`: an arm on packed rows, then on a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.span_sets import SpanSet
from lmops_jax.evaluation import lm
from lmops_jax.models.universal import ENCODER_INPUTS, UniversalLM
from lmops_jax.sizing import universal
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm.arms import Arm
from lmops_jax.training import loop, losses
from lmops_jax.training.learner import Learner, supervised
from lmops_jax.training.sources import Ahead, Epochs, Source

VALIDATION = "validation"
ENCODER, ALL = "encoder", "all"  # what is finetuned
MODES = (ENCODER, ALL)
_COUNTED = 1000  # rows whose spans are counted for the report


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Training:
  """How every arm is trained.

  Attributes:
    optimizer: an optax transformation; as `@optim.partition()` it may freeze layers of the reader.
    num_steps: optimizer steps.
    batch_size: rows of a batch.
    accumulate: micro-batches of a step.
    eval_every: steps between two validations.
    num_validation: rows of each of them.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.

  Raises:
    ValueError: for a batch that does not split.
  """

  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 16
  accumulate: PositiveInt = 1
  eval_every: PositiveInt = 100
  num_validation: PositiveInt = 64
  checkpoint_every: PositiveInt | None = 100

  def __post_init__(self):
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"metalm.Training.batch_size={self.batch_size} is not a multiple of accumulate="
        f"{self.accumulate}; choose one that divides it."
      )


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Finetune:
  """How an arm is finetuned on the tasks of `tasks.TUNED`; only answers are learned.

  Attributes:
    all: an optax transformation that trains everything.
    encoder: one that freezes the decoder, `{'text/.*': None, '.*': ...}` of `@optim.partition()`
      (section 3.4); arms without an encoder have no such run.
    num_steps: optimizer steps.
    batch_size: sequences of a batch, each with several rows.
    length: predicted positions of a sequence.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
  """

  all: optax.GradientTransformation
  encoder: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 8
  length: PositiveInt = 256
  checkpoint_every: PositiveInt | None = None

  def modes(self, arm: Arm) -> tuple[Literal[MODES], ...]:
    """What is finetuned of an arm."""
    return MODES if arm.reads_spans else (ALL,)


@dataclasses.dataclass(frozen=True)
class SpanLosses(losses.LMExampleLosses):
  """`LMExampleLosses` of a model that reads encoded spans.

  Beside what those read, a batch may hold the arrays that `UniversalLM.row_vectors` takes.
  """

  model: UniversalLM

  often_learned = 25 / 32  # spans are a quarter of a row, and their first tokens are learned

  def token_losses(
    self, params, batch: Mapping[str, jax.Array], learned: jax.Array | None = None
  ) -> jax.Array:
    """See `LMExampleLosses`."""
    given = {name: batch[name] for name in ENCODER_INPUTS if name in batch}
    if given:
      vectors = self.model.apply(
        {"params": params}, **given, keys=batch.get("key"), method="row_vectors")
      batch = {**batch, "vectors": vectors}
    return super().token_losses(params, batch, learned if given else None)


def token_mean_losses(model: UniversalLM) -> losses.WeightedExampleLosses:
  """Losses whose mean over a batch with `weight` is the mean over its learned tokens."""
  return losses.weighted_example_losses(SpanLosses(model))


def learner(
  model: UniversalLM, optimizer: optax.GradientTransformation, accumulate: int, partitioner
) -> Learner:
  """What descends those losses, with dropout's keys."""
  example_losses = token_mean_losses(model)
  return supervised(
    loop.initializer(model), example_losses, optimizer, accumulate=accumulate, keyed=True,
    check_batch=example_losses.check_batch, partitioner=partitioner)


def step_flops(
  model: UniversalLM, optimizer: optax.GradientTransformation, num_rows: int,
  shape: universal.RowShape,
) -> float:
  """Operations of a training step, by what the optimizer trains."""
  trained = universal.trained_by(
    optimizer, jax.eval_shape(loop.initializer(model), jax.random.key(0)))
  return num_rows * universal.row_flops(model.config, shape, trained)


def train(
  context: pipeline.StageContext, config: Training, arm: Arm, instances, validation, *,
  seed: int, reader: Callable[[], Any] | None, partitioner, directory: Path | None = None,
) -> None:
  """Trains an arm from scratch, its reader from `reader`.

  Args:
    instances: rows to train on. validation: unseen rows.
    reader: makes the parameters that the reader starts from; None for an arm without one.
    directory: see `run`.

  Raises:
    ValueError: for fewer rows than a batch has.
  """
  if len(instances) < config.batch_size:
    raise ValueError(
      f"there are {len(instances)} rows to train on, fewer than metalm.Training.batch_size="
      f"{config.batch_size}; give more text or make the batch smaller."
    )
  model, rows = arm.model, arm.rows(instances, seed)

  def initial():
    drawn = dict(nn.unbox(jax.jit(loop.initializer(model))(jax.random.key(seed))))
    return drawn if reader is None else {**drawn, "reader": reader()}

  result = run(
    context, model, config.optimizer, config.num_steps, config.accumulate,
    config.checkpoint_every, seed, initial, partitioner,
    Epochs(
      rows.batch, len(rows), config.batch_size, seed, whole=True, by_epoch=True),
    hooks=[_validation(model, arm.validation(validation), config, partitioner)],
    directory=directory)
  context.flops += result.step * step_flops(
    model, config.optimizer, config.batch_size,
    universal.RowShape(instances.length, rows.encoder_length))
  context.extra["num_params"] = sum(x.size for x in jax.tree.leaves(result.state.params))
  context.extra["spans"] = rows.counts(np.arange(min(len(rows), _COUNTED)))


def _validation(model, rows, config: Training, partitioner) -> loop.Evaluate:
  """A hook: nats a learned token of unseen rows, under the arm's own objective."""
  batch = rows.batch(np.arange(min(config.num_validation, len(rows))))
  example_losses = token_mean_losses(model)

  def figures(params):
    return {"loss": lm.mean_loss(
      example_losses, params, [batch], place=partitioner.place_batch,
      multiple_of=partitioner.num_batch_shards)}

  return loop.Evaluate(VALIDATION, config.eval_every, figures)


def finetune(
  context: pipeline.StageContext, config: Finetune, arm: Arm, params, rows: SpanSet,
  mode: Literal[MODES], *, seed: int, partitioner,
) -> None:
  """Finetunes a trained arm.

  Args:
    params: makes the trained parameters.
    rows: sequences of the tasks; an arm without an encoder reads them as words.

  Raises:
    ValueError: for fewer rows than a batch has.
  """
  if len(rows) < config.batch_size:
    raise ValueError(
      f"the rows to finetune on make {len(rows)} sequences, fewer than metalm.Finetune.batch_size="
      f"{config.batch_size}; raise metalm.Tasks.num_train or make smaller batches."
    )
  given = rows if arm.reads_spans else rows.rows
  optimizer = config.encoder if mode == ENCODER else config.all
  result = run(
    context, arm.model, optimizer, config.num_steps, 1, config.checkpoint_every, seed, params,
    partitioner, Epochs(given.batch, len(given), config.batch_size, seed, whole=True))
  context.flops += result.step * step_flops(
    arm.model, optimizer, config.batch_size, universal.RowShape(
      rows.rows.arrays["tokens"].shape[1], rows.encoder_length if arm.reads_spans else 0))
  context.extra["rows"] = dict(rows.counts)


def run(
  context: pipeline.StageContext, model: UniversalLM, optimizer: optax.GradientTransformation,
  num_steps: int, accumulate: int, checkpoint_every: int | None, seed: int,
  initial: Callable[[], Any], partitioner, source: Source, hooks=(),
  directory: Path | None = None,
) -> loop.TrainResult:
  """Trains a model and leaves `metrics.jsonl` and the last parameters in a folder.

  Args:
    initial: makes the parameters to start from.
    source: of the batches.
    hooks: of `loop.train`.
    directory: the folder; None is the stage's.
  """
  return loop.train(
    learner(model, optimizer, accumulate, partitioner), Ahead(source), num_steps, seed,
    directory or context.directory, partitioner, initial_params=initial, hooks=hooks,
    records=loop.Records(
      checkpoint_every=checkpoint_every, params_at=(num_steps,), description=context.name,
      progress=context.progress))
