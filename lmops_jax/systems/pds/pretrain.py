"""Stages `proxy` and `pretrain/<method>/seed<k>`: the same language-model training, other data.

The proxy is trained on the whole corpus, a final model on a selection; nothing else differs
(PDS, section 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optax

from lmops_jax.config.setting_types import PositiveInt, Steps, component
from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import prepare as prepare_lib
from lmops_jax.training import loop, losses
from lmops_jax.training.language_models import batch_source, language_model
from lmops_jax.training.learner import supervised


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Pretrain:
  """One pre-training run.

  Attributes:
    model: `models.TransformerConfig`; its vocabulary size comes from the vocabulary.
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: instances of a global batch.
    keep_every: parameters are kept every so many steps (and at the end) for the evaluation.
    keep_steps: steps whose parameters are kept as well, e.g. the proxy checkpoints to solve from.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    accumulate: micro-batches of a step; fewer where the mesh has more shards than one has rows.
    shuffle: order the instances by seed; False keeps the corpus order, as the reference does.
    loss_chunk: sequence positions whose logits exist at a time; None leaves the default.
    init: a published model to start from, `@pretrained.load()`, whose configuration then replaces
      `model`; the instances must be in its own vocabulary.
  """

  model: TransformerConfig
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 16
  keep_every: PositiveInt | None = None
  keep_steps: Steps = ()
  checkpoint_every: PositiveInt | None = 100
  accumulate: PositiveInt = 1
  shuffle: bool = True
  loss_chunk: PositiveInt | None = None
  init: PretrainedModel | None = None

  def __post_init__(self):
    if self.init is not None:
      if not getattr(self.init.config, "causal", False):
        raise ValueError(
          f"pds.Pretrain.init is a {self.init.family} model, which does not predict the next "
          "token; take a decoder."
        )
      object.__setattr__(self, "model", self.init.config)
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"pds.Pretrain.batch_size={self.batch_size} is not a multiple of "
        f"pds.Pretrain.accumulate={self.accumulate}; choose one that divides it."
      )
    late = [s for s in self.keep_steps if s > self.num_steps]
    if late:
      raise ValueError(
        f"pds.Pretrain.keep_steps={list(self.keep_steps)} names step {late[0]}, but the run ends "
        f"at step {self.num_steps}; name steps from 0 to {self.num_steps}."
      )

  def kept_steps(self) -> list[int]:
    """Steps whose parameters the run leaves behind, ascending."""
    every = range(self.keep_every, self.num_steps + 1, self.keep_every) if self.keep_every else ()
    return sorted({*every, *self.keep_steps, self.num_steps})


def check_vocabulary(init, vocabulary, name: str) -> None:
  """Raises ValueError where a published model would read ids of another vocabulary."""
  if vocabulary.fingerprint() != init.tokenizer().fingerprint:
    raise ValueError(
      f"pds.{name}.init is {init.path}, but the instances are in another vocabulary; include "
      "'data/model_tokenizer.gin' and set VOCABULARY_PATH to that model."
    )


def learner(model, example_losses, config: Pretrain, partitioner):
  """What `config` makes of a model: the one that `fit` trains and `programs` compiles."""
  return supervised(
    loop.initializer(model), example_losses, config.optimizer, accumulate=config.accumulate,
    check_batch=example_losses.check_batch, partitioner=partitioner)


def fit(
  model, example_losses, config: Pretrain, source, partitioner, *, directory: Path, seed: int,
  description: str, initial_params=None,
):
  """Trains `model` by `config` in `directory` and returns the last parameters."""
  result = loop.train(
    learner(model, example_losses, config, partitioner), source, config.num_steps, seed, directory,
    partitioner, initial_params=initial_params,
    records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=config.kept_steps(),
      description=description),
  )
  return result.state.params


def run(
  context: pipeline.StageContext, config: Pretrain, partitioner, *, seed: int,
  indices_of: Callable[[pipeline.StageContext], np.ndarray] | None = None,
) -> None:
  """Trains on the instances that `indices_of` names (None: the whole corpus); keeps parameters."""
  prepared = prepare_lib.Prepared(context.input("prepare"))
  corpus = prepared.corpus
  indices = None if indices_of is None else indices_of(context)
  num = len(corpus) if indices is None else len(indices)
  if num < config.batch_size:
    raise ValueError(
      f"{context.name} has {num} instances, fewer than one batch of "
      f"pds.Pretrain.batch_size={config.batch_size}; select more or make the batch smaller."
    )
  model = language_model(config.model, corpus.vocab_size, corpus.length)
  fit(
    model, losses.lm_example_losses(model, chunk=config.loss_chunk), config,
    batch_source(corpus, indices, config.batch_size, seed, config.shuffle), partitioner,
    directory=context.directory, seed=seed, description=context.name,
    initial_params=None if config.init is None else lambda: config.init.params(partitioner),
  )
  num_positions = config.num_steps * config.batch_size * corpus.length
  context.flops += 3 * num_positions * flops.forward_flops_per_token(model.config, corpus.length)
  context.extra.update(
    num_steps=config.num_steps, num_positions=num_positions,
    epochs=config.num_steps * config.batch_size / num,
  )
  if context.writes:
    _describe(context, config, model.config, prepared.vocabulary)


def _describe(context, config: Pretrain, model_config, vocabulary) -> None:
  """Makes the stage a model folder, which `pretrained.load` and `lmops export` open."""
  params, folder = f"params/{config.num_steps}", context.directory / model_lib.TOKENIZER_FOLDER
  if config.init is not None:
    model_lib.copy_tokenizer(config.init, folder)
    model_lib.describe(
      context.directory, model_config, family=config.init.family, params=params,
      original=config.init.original,
    )
    return
  trained_vocabulary.describe_trained(
    context.directory, model_config, vocabulary, params=params, log=context.log
  )
