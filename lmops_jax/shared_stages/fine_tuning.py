"""Training a published model further on rows (`data.supervised`), as stages of any system.

The stage that trains is a model folder: `pretrained.load` opens it, `lmops generate --model` runs
it, and `lmops export --checkpoint` writes it for transformers. All learned tokens of a batch count
alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from lmops_jax.data import supervised
from lmops_jax.evaluation.lm import mean_loss, perplexity
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.training import learner, loop, losses
from lmops_jax.training.metrics import read_records
from lmops_jax.training.sources import Epochs

TRAIN, VALIDATION = "train", "validation"
History = Sequence[Mapping[str, Any]]


class Tuning(NamedTuple):
  """What a training is, beside its rows.

  Attributes:
    init: the model to start from.
    optimizer: an optax transformation.
    num_steps, batch_size: optimizer steps, sequences of a batch.
    length: predicted positions of a sequence.
    eval_every: steps between two validations.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    accumulate: micro-batches of a step.
    seed: of the order.
    kept: steps whose parameters are kept until one is chosen.
  """

  init: PretrainedModel
  optimizer: optax.GradientTransformation
  num_steps: int
  batch_size: int
  length: int
  eval_every: int
  checkpoint_every: int | None
  accumulate: int
  seed: int
  kept: Sequence[int]


def check(init: PretrainedModel, batch_size: int, accumulate: int, length: int) -> None:
  """Refuses settings that cannot train.

  Raises:
    ValueError: a batch that does not split, a model that is no decoder, or a length beyond it.
  """
  if batch_size % accumulate:
    raise ValueError(f"batch_size={batch_size} is not a multiple of accumulate={accumulate}.")
  config = init.config
  if not getattr(config, "causal", False):
    raise ValueError(
      f"init is a {init.family} model, which does not predict the next token; take a decoder."
    )
  if length > config.max_length:
    raise ValueError(
      f"length={length} is beyond the {config.max_length} positions of {init.path}; lower it."
    )


def write_rows(
  context: pipeline.StageContext, parts: Mapping[str, Sequence[supervised.Example]], tokenizer,
  length: int, *, pack: bool, too_long: str, batch_size: int,
) -> None:
  """Writes the sequences of each part into its folder; an empty validation part has none.

  Raises:
    ValueError: rows that are too long, or fewer sequences to train on than a batch.
  """
  pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else (tokenizer.eos_id or 0)
  for name, part in parts.items():
    if not part and name == VALIDATION:
      continue
    data = supervised.build(
      part, length, pad_id=pad_id, pack=pack, too_long=too_long, name=name)
    supervised.save(context.directory / name, data)
    context.extra[name] = data.counts
    context.log(", ".join(f"{value} {key}" for key, value in data.counts.items()) + f" ({name})")
  check_batch(context.extra[TRAIN]["sequences"], batch_size, length)


def check_batch(num_sequences: int, batch_size: int, length: int) -> None:
  """Refuses fewer sequences than a batch."""
  if num_sequences < batch_size:
    raise ValueError(
      f"the training rows make {num_sequences} sequences of length {length}, fewer than one "
      f"batch of {batch_size}; lower the batch size or the length, or set pack to False."
    )


def train(
  context: pipeline.StageContext, tuning: Tuning, partitioner,
  choose: Callable[[History], int],
) -> None:
  """Trains on what the stage `prepare` wrote, and leaves a model folder.

  Args:
    choose: of `tuning.kept`, the step whose parameters the model gets, from the run's records; the
      others are removed.
  """
  data = supervised.load(context.input("prepare") / TRAIN)
  check_batch(len(data), tuning.batch_size, tuning.length)
  init, model = tuning.init, tuning.init.model
  loss = losses.weighted_example_losses(losses.lm_example_losses(model))
  hooks = []
  folder = context.input("prepare") / VALIDATION
  if folder.is_dir():
    hooks.append(loop.Evaluate(VALIDATION, tuning.eval_every, _validation(
      loss, supervised.load(folder), tuning.batch_size, partitioner)))
  per_token = 3 * flops.forward_flops_per_token(model.config, tuning.length)
  result = loop.train(
    learner.supervised(
      loop.initializer(model), loss, tuning.optimizer, accumulate=tuning.accumulate,
      check_batch=loss.check_batch, partitioner=partitioner),
    # The rows' weights are those of the whole batch.
    Epochs(data.batch, len(data), tuning.batch_size, tuning.seed, whole=True),
    tuning.num_steps, tuning.seed, context.directory, partitioner, hooks=hooks,
    initial_params=lambda: init.params(partitioner),
    records=loop.Records(
      checkpoint_every=tuning.checkpoint_every, params_at=tuple(tuning.kept),
      flops_per_token=per_token, description=context.name),
  )
  context.flops = result.flops
  context.group.barrier("trained")
  if not context.writes:
    return
  shutil.rmtree(context.directory / "checkpoints")  # only for resuming; the parameters stay
  chosen = choose(result.history)
  for step in set(tuning.kept) - {chosen}:
    shutil.rmtree(context.directory / "params" / str(step))
  context.extra["chosen_step"] = chosen
  model_lib.copy_tokenizer(init, context.directory / model_lib.TOKENIZER_FOLDER)
  model_lib.describe(
    context.directory, init.config, family=init.family,
    params=f"params/{chosen}", original=init.original,
  )


def report(context: pipeline.StageContext, tuning: Tuning, title: str) -> None:
  """Writes the report of a run with the stages `prepare` and `train`."""
  records = read_records(context.input("train") / "metrics.jsonl")
  counts = {name: of for name, of in context.manifest("prepare")["extra"].items()
            if name in (TRAIN, VALIDATION)}
  run = RunReport(context, ("train",))
  cost, = run.costs
  curves = {
    label: [(r["step"], r[key]) for r in records if key in r]
    for label, key in (("training", "loss"), ("validation", f"{VALIDATION}/loss"))
  }
  curves = {label: points for label, points in curves.items() if points}
  summary = {
    "num_steps": tuning.num_steps, "counts": counts,
    "chosen_step": context.manifest("train")["extra"]["chosen_step"],
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
  run.write(summary, html.Report(
    title=title,
    lead=f"The {kind} loss went from {first:.3f} to {last:.3f} nats a learned token "
         f"(perplexity {perplexity(first):.2f} to {perplexity(last):.2f}) in {tuning.num_steps} "
         f"steps of {tuning.batch_size} sequences of {tuning.length}.",
    key_figures=[
      html.KeyFigure(f"{last:.3f}", f"{kind} loss", f"{first:.3f} before"),
      html.KeyFigure(f"{perplexity(last):.2f}", "perplexity", f"{perplexity(first):.2f} before"),
      html.KeyFigure(f"{counts[TRAIN]['learned_tokens']:,}", "learned tokens",
                     f"in {counts[TRAIN]['rows']:,} rows"),
    ],
    sections=[
      html.Section("Loss", figures=[
        run.figure("loss", figure, "Loss by step; lower is better.")]),
      html.Section("Data", "Rows longer than a sequence are dropped or cut.", tables=[html.Table(
        ["part", *(html.Column(name, ",d") for name in sorted(counts[TRAIN]))],
        [[part, *(of[name] for name in sorted(of))] for part, of in counts.items()],
      )]),
    ],
    facts={"model": str(tuning.init.path), "family": tuning.init.family,
           "seconds": f"{cost['seconds']:.0f}", "FLOPs": f"{cost['flops']:.3g}"},
  ))


def table(summary: Mapping[str, Any]) -> str:
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
