"""Stages `proxy` and `pretrain/<method>/seed<k>`: one language-model training on different data.

The proxy is trained on the whole corpus, a final model on a selection; nothing else differs
(PDS, section 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Steps, component
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.shared_stages import language_training
from lmops_jax.shared_stages.language_training import LanguageTraining
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import prepare as prepare_lib


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Pretrain(LanguageTraining):
  """One pre-training run.

  Attributes:
    keep_every: parameters are kept every so many steps (and at the end) for the evaluation.
    keep_steps: steps whose parameters are kept as well, e.g. the proxy checkpoints to solve from.
    shuffle: order the instances by seed; False keeps the corpus order, as the reference does.
    init: a published model to start from, `@pretrained.load()`, whose configuration then replaces
      `model`; the instances must be in its own vocabulary.
  """

  setting: ClassVar[str] = "pds.Pretrain"

  keep_every: PositiveInt | None = None
  keep_steps: Steps = ()
  shuffle: bool = True
  init: PretrainedModel | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.init is not None:
      if not getattr(self.init.config, "causal", False):
        raise ValueError(
          f"pds.Pretrain.init is a {self.init.family} model, which does not predict the next "
          "token; take a decoder."
        )
      object.__setattr__(self, "model", self.init.config)
    late = [s for s in self.keep_steps if s > self.num_steps]
    if late:
      raise ValueError(
        f"pds.Pretrain.keep_steps={list(self.keep_steps)} names step {late[0]}, but the run ends "
        f"at step {self.num_steps}; name steps from 0 to {self.num_steps}."
      )

  def kept_steps(self) -> list[int]:
    every = range(self.keep_every, self.num_steps + 1, self.keep_every) if self.keep_every else ()
    return sorted({*every, *self.keep_steps, self.num_steps})


def proxy_stage(run: int) -> str:
  """The stage of the proxy's training number `run`, from 0."""
  return f"proxy_{run + 1}" if run else "proxy"


def check_vocabulary(init, vocabulary, name: str) -> None:
  """Raises ValueError if a published model would read ids of another vocabulary."""
  if vocabulary.fingerprint() != init.tokenizer().fingerprint:
    raise ValueError(
      f"pds.{name}.init is {init.path}, but the instances are in another vocabulary; include "
      "'data/model_tokenizer.gin' and set VOCABULARY_PATH to that model."
    )


def run(
  context: pipeline.StageContext, config: Pretrain, partitioner, *, seed: int,
  indices_of: Callable[[pipeline.StageContext], np.ndarray] | None = None,
) -> None:
  """Trains on the instances that `indices_of` names (None: the whole corpus); keeps parameters."""
  prepared = prepare_lib.Prepared(context.input("prepare"))
  trained = language_training.train(
    context, config, prepared.corpus, partitioner, seed=seed, shuffle=config.shuffle,
    indices=None if indices_of is None else indices_of(context),
    initial_params=None if config.init is None else lambda: config.init.params(partitioner),
  )
  if context.writes:
    _describe(context, config, trained, prepared.vocabulary)


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
