"""Stage `evaluate`: the test loss of every kept set of parameters.

This is the first stage that opens the target's test part.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping

import numpy as np

from lmops_jax.config.setting_types import Count, PositiveInt, component
from lmops_jax.evaluation import lm
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import prepare, pretrain
from lmops_jax.training import language_models, losses

FILE = "evaluations.json"
TARGET, CORPUS = "target_test_loss", "corpus_loss"


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Evaluate:
  """What the final models are measured on.

  Attributes:
    batch_size: instances evaluated at a time.
    max_held_out: the most held-out corpus instances used for the corpus loss; None: all.
  """

  batch_size: PositiveInt = 64
  max_held_out: Count | None = 256


def run(
  context: pipeline.StageContext, config: Evaluate, model_config: pretrain.Pretrain, partitioner,
  runs: Mapping[tuple[str, int], str],
) -> None:
  """Evaluates the runs `(method, seed) -> stage`: target loss by step, corpus loss at the end.

  A loss is the mean over instances of the token mean in nats (the objective J, on other text).
  """
  prepared = prepare.Prepared(context.input("prepare"))
  test, held_out = prepared.target_test, prepared.held_out
  num_held_out = len(held_out) if config.max_held_out is None else config.max_held_out
  parts = {
    TARGET: test.batch(np.arange(len(test))),
    CORPUS: held_out.batch(np.arange(min(num_held_out, len(held_out)))),
  }
  parts = {name: rows for name, rows in parts.items() if len(rows["example_id"])}
  corpus = prepared.corpus
  model = language_models.language_model(model_config.model, corpus.vocab_size, corpus.length)
  example_losses = losses.lm_example_losses(model, chunk=model_config.loss_chunk)
  steps = model_config.kept_steps()
  results, num_rows = [], 0
  with context.progress(len(runs) * len(steps), "checkpoints", "evaluate") as bar:
    for (method, seed), stage in runs.items():
      curve = []
      for step in steps:
        params = language_models.load_params(context.input(stage), step, model, partitioner)
        wanted = parts if step == steps[-1] else {TARGET: parts[TARGET]}
        with partitioner.activate():
          means = {
            name: lm.mean_loss(
              example_losses, params, _batches(rows, config.batch_size),
              place=partitioner.place_rows, multiple_of=partitioner.num_batch_shards,
            )
            for name, rows in wanted.items()
          }
        num_rows += sum(len(rows["example_id"]) for rows in wanted.values())
        curve.append({"step": step, **means})
        bar.update(1)
      results.append({"method": method, "seed": seed, "curve": curve})
  if context.writes:
    (context.directory / FILE).write_text(json.dumps(results, indent=1) + "\n")
  per_token = flops.forward_flops_per_token(model.config, corpus.length)
  context.flops += num_rows * corpus.length * per_token


def _batches(rows: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  num = len(rows["example_id"])
  for start in range(0, num, batch_size):
    yield {name: values[start : start + batch_size] for name, values in rows.items()}
