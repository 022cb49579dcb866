"""Fine-tuning as stages: prepare, train, report.

The stage `train` is a model folder: `pretrained.load` opens it, `lmops generate --model` runs it,
and `lmops export --checkpoint` writes it for transformers. All learned tokens of a batch count
alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import optax

from lmops_jax.config.setting_types import Decay, ExistingPath, PositiveInt, Seed, component
from lmops_jax.data import files, supervised
from lmops_jax.host.hashing import order_key
from lmops_jax.mesh.meshes import single_device
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.shared_stages import fine_tuning
from lmops_jax.shared_stages.fine_tuning import TRAIN, VALIDATION
from lmops_jax.stages import pipeline, skeleton


@component(module="finetune")
@dataclasses.dataclass(frozen=True)
class Finetune:
  """One fine-tuning run.

  Attributes:
    init: the model to start from, `@pretrained.load()`.
    train: a file of JSON lines, see `data.supervised`.
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: sequences of a batch.
    length: predicted positions of a sequence.
    validation: a file of JSON lines; None takes `validation_fraction` of the training rows.
    validation_fraction: share of rows, drawn by (seed, row id); 0 for no validation.
    eval_every: steps between two validations.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    accumulate: micro-batches of a step.
    pack: put several short rows into a sequence.
    too_long: "drop" longer rows, "cut" them, or make them an "error".
    seed: seed of the validation split and the order.

  Raises:
    ValueError: for values out of range, a length beyond the model's, or a file that is not there.
  """

  init: PretrainedModel
  train: ExistingPath
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 8
  length: PositiveInt = 512
  validation: ExistingPath | None = None
  validation_fraction: Decay = 0.05
  eval_every: PositiveInt = 50
  checkpoint_every: PositiveInt | None = 100
  accumulate: PositiveInt = 1
  pack: bool = True
  too_long: Literal[supervised.TOO_LONG] = "drop"
  seed: Seed = 0
  name = "finetune"

  def __post_init__(self):
    fine_tuning.check(self.init, self.batch_size, self.accumulate, self.length)
    for field in ("train", "validation"):
      path = getattr(self, field)
      if path is not None and not Path(path).expanduser().is_file():
        raise ValueError(f"{field}={path!r} is not a file; give JSON lines.")

  @property
  def rows(self) -> dict[str, files.Jsonl]:
    """The files that rows are read from, by the names of their settings."""
    return {name: files.Jsonl(str(Path(path).expanduser()))
            for name in ("train", "validation") if (path := getattr(self, name)) is not None}

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    return [
      skeleton.Stage(
        "prepare", self._prepare, together=False,
        reads=("train", "validation", "validation_fraction", "length", "pack", "too_long", "seed",
               "rows.fingerprint", "init.fingerprint"), checks=("batch_size",),
      ),
      skeleton.Stage(
        "train", functools.partial(self._train, partitioner=partitioner or single_device()),
        inputs=("prepare",), result="model",
        reads=("init", "optimizer", "num_steps", "batch_size", "eval_every", "checkpoint_every",
               "accumulate"),
      ),
      skeleton.Stage("report", self._report, inputs=("prepare", "train"), together=False),
    ]

  def _prepare(self, context: pipeline.StageContext) -> None:
    tokenizer = self.init.tokenizer()
    examples = supervised.read_examples(self.train, tokenizer)
    if not examples:
      raise ValueError(f"finetune.Finetune.train={self.train!r} holds no row.")
    if self.validation is not None:
      held_out = supervised.read_examples(self.validation, tokenizer)
    else:
      limit = self.validation_fraction * 2.0**64
      chosen = [order_key(example.id, self.seed) < limit for example in examples]
      held_out = [e for e, held in zip(examples, chosen) if held]
      examples = [e for e, held in zip(examples, chosen) if not held]
    fine_tuning.write_rows(
      context, {TRAIN: examples, VALIDATION: held_out}, tokenizer, self.length, pack=self.pack,
      too_long=self.too_long, batch_size=self.batch_size)

  @property
  def _tuning(self) -> fine_tuning.Tuning:
    return fine_tuning.Tuning(
      self.init, self.optimizer, self.num_steps, self.batch_size, self.length, self.eval_every,
      self.checkpoint_every, self.accumulate, self.seed, kept=(self.num_steps,))

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    fine_tuning.train(context, self._tuning, partitioner, choose=lambda history: self.num_steps)

  def _report(self, context: pipeline.StageContext) -> None:
    fine_tuning.report(context, self._tuning, f"Fine-tuning of {self.init.path.name}")

  def table(self, summary: Mapping[str, Any]) -> str:
    """The validation losses of a finished run, for the terminal."""
    return fine_tuning.table(summary)
