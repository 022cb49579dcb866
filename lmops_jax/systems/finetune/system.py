"""Fine-tuning as stages: prepare, train, report.

The stage `train` is a model folder: `pretrained.load` opens it, `lmops generate --model` runs it,
and `lmops export --checkpoint` writes it for transformers. All learned tokens of a batch count
alike.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax

from lmops_jax.config.setting_types import Decay, ExistingPath, PositiveInt, Seed, component
from lmops_jax.data import files, supervised
from lmops_jax.evaluation.lm import mean_loss, perplexity
from lmops_jax.host.hashing import order_key
from lmops_jax.mesh.meshes import single_device
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.training import learner, loop, losses
from lmops_jax.training.metrics import read_records
from lmops_jax.training.sources import Epochs

TRAIN, VALIDATION = "train", "validation"


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
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}."
      )
    config = self.init.config
    if not getattr(config, "causal", False):
      raise ValueError(
        f"init is a {self.init.family} model, which does not predict the next token; take a "
        "decoder."
      )
    if self.length > config.max_length:
      raise ValueError(
        f"length={self.length} is beyond the {config.max_length} positions of {self.init.path}; "
        "lower it."
      )
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
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else (tokenizer.eos_id or 0)
    for name, part in ((TRAIN, examples), (VALIDATION, held_out)):
      if not part and name == VALIDATION:
        continue
      data = supervised.build(
        part, self.length, pad_id=pad_id, pack=self.pack, too_long=self.too_long, name=name
      )
      supervised.save(context.directory / name, data)
      context.extra[name] = data.counts
      context.log(", ".join(f"{value} {key}" for key, value in data.counts.items()) + f" ({name})")
    self._check_batch(context.extra[TRAIN]["sequences"])

  def _check_batch(self, num_sequences: int) -> None:
    if num_sequences < self.batch_size:
      raise ValueError(
        f"the training rows make {num_sequences} sequences of length {self.length}, fewer than one "
        f"batch of {self.batch_size}; lower the batch size or the length, or set pack to False."
      )

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    data = supervised.load(context.input("prepare") / TRAIN)
    self._check_batch(len(data))
    model = self.init.model
    loss = losses.weighted_example_losses(losses.lm_example_losses(model))
    hooks = []
    folder = context.input("prepare") / VALIDATION
    if folder.is_dir():
      hooks.append(loop.Evaluate(VALIDATION, self.eval_every, _validation(
        loss, supervised.load(folder), self.batch_size, partitioner)))
    per_token = 3 * flops.forward_flops_per_token(model.config, self.length)
    result = loop.train(
      learner.supervised(
        loop.initializer(model), loss, self.optimizer, accumulate=self.accumulate,
        check_batch=loss.check_batch, partitioner=partitioner),
      # The rows' weights are those of the whole batch.
      Epochs(data.batch, len(data), self.batch_size, self.seed, whole=True),
      self.num_steps, self.seed, context.directory, partitioner, hooks=hooks,
      initial_params=lambda: self.init.params(partitioner),
      records=loop.Records(
        checkpoint_every=self.checkpoint_every, params_at=(self.num_steps,),
        flops_per_token=per_token, description=context.name),
    )
    context.flops = result.flops
    context.group.barrier("trained")
    if not context.writes:
      return
    shutil.rmtree(context.directory / "checkpoints")  # only for resuming; the parameters stay
    model_lib.copy_tokenizer(self.init, context.directory / model_lib.TOKENIZER_FOLDER)
    model_lib.describe(
      context.directory, self.init.config, family=self.init.family,
      params=f"params/{self.num_steps}", original=self.init.original,
    )

  def _report(self, context: pipeline.StageContext) -> None:
    records = read_records(context.input("train") / "metrics.jsonl")
    counts = context.manifest("prepare")["extra"]
    report = RunReport(context, ("train",))
    cost, = report.costs
    curves = {
      label: [(r["step"], r[key]) for r in records if key in r]
      for label, key in (("training", "loss"), ("validation", f"{VALIDATION}/loss"))
    }
    curves = {label: points for label, points in curves.items() if points}
    summary = {
      "num_steps": self.num_steps, "counts": counts,
      "train_loss": curves["training"][-1][1],
      "validation_loss": [
        {"step": step, "loss": value} for step, value in curves.get("validation", [])
      ],
      "seconds": cost["seconds"], "flops": cost["flops"],
    }
    figure = plots.curves(
      {label: [plots.Run(*zip(*points))] for label, points in curves.items()},
      x_label="optimizer steps", y_label="loss (nats per learned token)",
    )
    shown = curves.get("validation", curves["training"])
    first, last = shown[0][1], shown[-1][1]
    kind = "validation" if "validation" in curves else "training"
    report.write(summary, html.Report(
      title=f"Fine-tuning of {self.init.path.name}",
      lead=f"The {kind} loss went from {first:.3f} to {last:.3f} nats a learned token "
           f"(perplexity {perplexity(first):.2f} to {perplexity(last):.2f}) in {self.num_steps} "
           f"steps of {self.batch_size} sequences of {self.length}.",
      key_figures=[
        html.KeyFigure(f"{last:.3f}", f"{kind} loss", f"{first:.3f} before"),
        html.KeyFigure(f"{perplexity(last):.2f}", "perplexity", f"{perplexity(first):.2f} before"),
        html.KeyFigure(f"{counts[TRAIN]['learned_tokens']:,}", "learned tokens",
                       f"in {counts[TRAIN]['rows']:,} rows"),
      ],
      sections=[
        html.Section("Loss", figures=[
          report.figure("loss", figure, "Loss by step; lower is better.")]),
        html.Section("Data", "Rows longer than a sequence are dropped or cut.", tables=[html.Table(
          ["part", *(html.Column(name, ",d") for name in sorted(counts[TRAIN]))],
          [[part, *(of[name] for name in sorted(of))] for part, of in counts.items()],
        )]),
      ],
      facts={"model": str(self.init.path), "family": self.init.family,
             "seconds": f"{cost['seconds']:.0f}", "FLOPs": f"{cost['flops']:.3g}"},
    ))

  def table(self, summary: Mapping[str, Any]) -> str:
    """The validation losses of a finished run, for the terminal."""
    rows = summary["validation_loss"]
    if not rows:
      return f"  training loss at the end: {summary['train_loss']:.4f}"
    return "\n".join([f"  {'step':>8}  validation loss  perplexity", *(
      f"  {row['step']:8}  {row['loss']:15.4f}  {perplexity(row['loss']):10.2f}" for row in rows)])


def _validation(loss, data, batch_size: int, partitioner):
  """`params -> {"loss": mean over all learned tokens}`."""
  learned = np.asarray(data.arrays["loss_mask"]).sum(axis=1)

  def evaluate(params):
    def batches():
      for start in range(0, len(data), batch_size):
        rows = np.arange(start, min(start + batch_size, len(data)))
        weight = (learned[rows] * len(data) / learned.sum()).astype(np.float32)
        yield {**data.batch(rows), "weight": weight}

    return {"loss": mean_loss(
      loss, params, batches(), place=partitioner.place_batch,
      multiple_of=partitioner.num_batch_shards,
    )}

  return evaluate
