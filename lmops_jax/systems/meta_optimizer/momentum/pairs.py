"""Pairs of language models that differ in momentum attention alone, as stages.

Stages: texts, train/<arm>/seed<k>, evaluate/<arm>/seed<k>, report. Both models of a seed start from
the same numbers (the sum has no parameters) and read the same batches in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  NonEmpty,
  Part,
  PositiveInt,
  Seeds,
  component,
)
from lmops_jax.data.batches import epoch_permutation
from lmops_jax.data.tasks import TaskChoice
from lmops_jax.decoding.scoring import OptionScorer
from lmops_jax.evaluation import in_context, lm
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.shared_stages import language_training
from lmops_jax.shared_stages.language_training import LanguageTraining
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.meta_optimizer.momentum import report, texts
from lmops_jax.systems.meta_optimizer.momentum.report import MOMENTUM, RESULTS_FILE, VANILLA
from lmops_jax.training import language_models, losses


@component(module="momentum")
@dataclasses.dataclass(frozen=True)
class Training(LanguageTraining):
  """The training that both models of a pair share; its `model` has no momentum."""

  setting: ClassVar[str] = "momentum.Training"

  def arm(self, eta: float | None) -> Training:
    """The training of the model with decay `eta`; None for the one without momentum."""
    return dataclasses.replace(self, model=dataclasses.replace(self.model, momentum=eta))


@component(module="momentum")
@dataclasses.dataclass(frozen=True)
class Evaluate:
  """What the trained models are measured on.

  Attributes:
    batch_size: instances of the training length in a batch; of shorter ones proportionally more.
    num_train: training instances for the perplexity on seen text.
    task: `@tasks.choose()`; None leaves in-context accuracy out.
    shots: numbers of demonstrations.
    draws: seeds of the demonstrations.
    normalisation: that of the options' scores, see `evaluation.in_context`.
  """

  batch_size: PositiveInt = 32
  num_train: PositiveInt = 128
  task: TaskChoice | None = None
  shots: Annotated[Sequence[Count], NonEmpty, Distinct] = (0, 4)
  draws: Seeds = (0, 1, 2)
  normalisation: Literal[in_context.NORMALISATIONS] = "sum"


@component(module="momentum")
@dataclasses.dataclass(frozen=True)
class Pairs:
  """Trains pairs with and without momentum attention and compares them.

  Attributes:
    eta: decay of the momentum, in (0, 1). The paper gives none.
    texts, training, evaluate: settings of the stages.
    seeds: seeds of initialisation and data order, a pair of models for each.
  """

  eta: Part
  texts: texts.Texts
  training: Training
  evaluate: Evaluate
  seeds: Seeds = (0, 1, 2)

  name = "meta_optimizer_momentum"

  def __post_init__(self):
    if self.training.model.momentum is not None:
      raise ValueError(
        f"momentum.Training.model has momentum={self.training.model.momentum} itself; leave it "
        "None, the decay is momentum.Pairs.eta."
      )
    self.training.arm(self.eta)  # also refuses windows and encoders
    language_models.check_length(self.training.model, self.texts.length)

  def arms(self) -> dict[str, float | None]:
    """Each model's name to its decay."""
    return {VANILLA: None, MOMENTUM: self.eta}

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.training.model.attention, partitioner.platform)
    stages = [skeleton.Stage(
      "texts", functools.partial(texts.run, config=self.texts), reads=("texts",))]
    runs: dict[tuple[str, int], tuple[str, str]] = {}
    for seed in self.seeds:
      for arm, eta in self.arms().items():
        train, evaluate = (f"{stage}/{arm}/seed{seed}" for stage in ("train", "evaluate"))
        runs[arm, seed] = train, evaluate
        stages += [
          skeleton.Stage(
            train,
            functools.partial(self._train, seed=seed, eta=eta, partitioner=partitioner),
            inputs=("texts",),
            reads=("training",) if eta is None else ("training", "eta"), seed=seed,
          ),
          skeleton.Stage(
            evaluate,
            functools.partial(self._evaluate, stage=train, eta=eta, partitioner=partitioner),
            inputs=("texts", train), reads=("evaluate",),
          ),
        ]
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report",
      functools.partial(
        report.run, runs=runs, stages=names, eta=self.eta, seeds=tuple(self.seeds),
        lengths=self.texts.lengths(),
      ),
      inputs=names,
    ))
    return stages

  def _model(self, prepared: texts.Prepared, eta: float | None):
    vocab_size = prepared.vocabulary.vocab_size
    return language_models.language_model(
      self.training.arm(eta).model, vocab_size, self.texts.length
    )

  def _train(self, context: pipeline.StageContext, seed, eta, partitioner) -> None:
    prepared = texts.Prepared(context.input("texts"))
    arm = self.training.arm(eta)
    trained = language_training.train(context, arm, prepared.train, partitioner, seed=seed)
    trained_vocabulary.describe_trained(
      context.directory, trained, prepared.vocabulary, params=f"params/{arm.num_steps}",
      log=context.log,
    )

  def _evaluate(self, context: pipeline.StageContext, stage, eta, partitioner) -> None:
    config, prepared = self.evaluate, texts.Prepared(context.input("texts"))
    model = self._model(prepared, eta)
    params = language_models.load_params(
      context.input(stage), self.training.num_steps, model, partitioner
    )
    corpus = prepared.train
    seen = epoch_permutation(0, 0, len(corpus))[: config.num_train]  # the same for all runs
    parts = {f"train_{corpus.length}": (corpus, seen)}
    for length in self.texts.lengths():
      unseen = prepared.validation(length)
      parts[f"validation_{length}"] = unseen, np.arange(len(unseen))
    example_losses = losses.weighted_example_losses(
      losses.lm_example_losses(model, chunk=self.training.loss_chunk)
    )
    found: dict[str, Any] = {}
    with context.progress(len(parts), "parts") as bar, partitioner.activate():
      for name, (instances, rows) in parts.items():
        size = config.batch_size * corpus.length // instances.length
        found[name] = lm.mean_loss(
          example_losses, params, _token_weighted(instances.batch(rows), size),
          place=partitioner.place_batch, multiple_of=partitioner.num_batch_shards,
        )
        context.flops += len(rows) * instances.length * flops.forward_flops_per_token(
          model.config, instances.length)
        bar.update()
    accuracies = []
    if config.task is not None:
      tokenizer = trained_vocabulary.tokenizer_of(prepared.vocabulary)
      scorer, task = OptionScorer(model, params, partitioner), config.task.load()
      for shots in config.shots:
        for draw in config.draws if shots else (0,):
          result = in_context.evaluate(
            scorer, tokenizer, task, shots=shots, seed=draw, normalisation=config.normalisation
          )
          accuracies.append({
            "shots": shots, "draw": draw, "accuracy": result.accuracy,
            "standard_error": result.standard_error, "num_rows": len(result.labels),
          })
    write_json(context.directory / RESULTS_FILE, {"losses": found, "in_context": accuracies})

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)


def _token_weighted(batch: dict[str, np.ndarray], size: int):
  """Batches whose rows have weights in proportion to their counted tokens."""
  counted = batch["loss_mask"].sum(axis=1)
  kept = counted > 0
  batch = {name: value[kept] for name, value in batch.items()}
  weight = (counted[kept] * kept.sum() / counted.sum()).astype(np.float32)
  for start in range(0, len(weight), size):
    rows = slice(start, start + size)
    yield {name: value[rows] for name, value in batch.items()} | {"weight": weight[rows]}
