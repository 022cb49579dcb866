"""Stage `encoder`: the reader learns to detect replaced tokens, before it is docked.

It is the discriminator of ELECTRA (arXiv:2003.10555), as MetaLM's text encoder is; all arms with an
encoder start from it. The mask is a word of its own, behind the vocabulary's.

A replaced token is told from its neighbours, and attention to these takes thousands of steps to
form when all that is learned is which tokens were replaced. So the encoder may first be trained for
some steps as a causal language model, which learns from every token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
import optax
from annotated_types import Gt, Lt

from lmops_jax.config.setting_types import Positive, PositiveInt, component
from lmops_jax.data.instances import Instances
from lmops_jax.data.spans import NoSpans
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.encoders import TextEncoderConfig, encoder_params
from lmops_jax.models.universal import UniversalConfig
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm.arms import Arm
from lmops_jax.systems.metalm.texts import Prepared
from lmops_jax.systems.metalm.training import Training, train
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training import language_models, loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.replaced_tokens import ReplacedTokenLosses, ReplacedTokens
from lmops_jax.training.sources import Ahead, Epochs

STAGE = "encoder"
_CAUSAL = "causal"  # the folder of the steps as a causal language model


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class ReaderTraining:
  """How the reader is trained.

  Attributes:
    generator: of the tokens that replace others, see `training.ReplacedTokens`; its vocabulary size
      comes from the vocabulary.
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: rows of a batch.
    rate, weight: see `training.ReplacedTokens`.
    causal: how the encoder is trained as a causal language model before; None: not at all.
    num_tested: unseen rows on which it is tested, at most.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
  """

  generator: TransformerConfig
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 16
  rate: Annotated[float, Gt(0), Lt(1)] = 0.15
  weight: Positive = 50.0
  causal: Training | None = None
  num_tested: PositiveInt = 64
  checkpoint_every: PositiveInt | None = 100

  def losses(self, encoder: TextEncoderConfig, vocabulary: Vocabulary) -> ReplacedTokenLosses:
    """What is descended.

    Args:
      encoder: with a vocabulary size, whose last id is the mask.
    """
    size = encoder.trunk.vocab_size
    return ReplacedTokenLosses(
      ReplacedTokens(
        dataclasses.replace(self.generator, vocab_size=size),
        dataclasses.replace(encoder.trunk, detector=True), self.rate, self.weight),
      mask_id=size - 1,
      never_masked=tuple(sorted({vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id})))

  def check(self, encoder: TextEncoderConfig) -> None:
    """See `starts.ReaderStart`.

    Raises:
      ValueError: for an encoder that has its words already.
    """
    if encoder.num_words() is not None:
      raise ValueError(
        "metalm.ReaderTraining trains an encoder from its first step, whose words are the "
        f"vocabulary's, and models.TextEncoderConfig.trunk has vocab_size={encoder.num_words()}; "
        "leave it out, or take @metalm.PublishedReader() for an encoder that is trained."
      )

  def run(
    self, context: pipeline.StageContext, encoder: TextEncoderConfig, prepared: Prepared, *,
    seed: int, partitioner,
  ) -> None:
    """See `starts.ReaderStart`: generator and reader are trained, and tested on unseen rows.

    Raises:
      ValueError: for fewer rows than a batch has.
    """
    instances, unseen, vocabulary = prepared.train, prepared.validation, prepared.vocabulary
    if len(instances) < self.batch_size:
      raise ValueError(
        f"there are {len(instances)} rows to train on, fewer than metalm.ReaderTraining.batch_size="
        f"{self.batch_size}; give more text or make the batch smaller."
      )
    losses = self.losses(encoder, vocabulary)
    rows = functools.partial(_rows, instances, vocabulary.pad_id)
    start = self._start(context, losses, prepared, seed, partitioner)
    result = loop.train(
      supervised(
        losses.init_params, losses, self.optimizer, keyed=True, check_batch=losses.check_batch,
        partitioner=partitioner),
      Ahead(Epochs(rows, len(instances), self.batch_size, seed)), self.num_steps, seed,
      context.directory, partitioner, initial_params=start, records=loop.Records(
        checkpoint_every=self.checkpoint_every, params_at=(self.num_steps,),
        description=context.name, progress=context.progress))
    length = instances.length
    for network in (losses.config.generator, losses.config.discriminator):
      context.flops += 3.0 * result.step * self.batch_size * length * flops.forward_flops_per_token(
        network, length, unembedding=False)
    index = np.arange(min(self.num_tested, len(unseen)))
    batch = _rows(unseen, vocabulary.pad_id, index)
    del batch["example_id"]
    batch["key"] = jax.random.split(jax.random.key(seed), len(index))
    parts = jax.device_get(jax.jit(losses.parts)(jax.device_get(result.state.params), batch))
    context.extra["tested"] = {
      "told_right": float(parts.num_right.sum() / parts.num_real.sum()),
      "kept": float(1 - parts.num_replaced.sum() / parts.num_real.sum()),  # what "kept" alone tells
      "detector_nats": float(np.average(parts.detector_nats, weights=parts.num_real)),
      "masked_nats": float(np.average(parts.masked_nats, weights=parts.num_masked)),
    }

  def _start(self, context, losses: ReplacedTokenLosses, prepared: Prepared, seed, partitioner):
    """What makes the parameters to start from, or None for those that are drawn."""
    if self.causal is None:
      return None
    trunk = dataclasses.replace(losses.config.discriminator, causal=True, detector=False)
    arm, folder = Arm(UniversalConfig(trunk), NoSpans()), context.directory / _CAUSAL
    train(
      context, self.causal, arm, prepared.train, prepared.validation, seed=seed, reader=None,
      partitioner=partitioner, directory=folder)

    def start():
      drawn = nn.unbox(jax.jit(losses.init_params)(jax.random.key(seed)))
      learned = language_models.load_params(
        folder, self.causal.num_steps, arm.model, partitioner)["text"]
      return {**drawn, "discriminator": {**drawn["discriminator"], **learned}}

    return start

  def load(
    self, folder: Path, encoder: TextEncoderConfig, vocabulary: Vocabulary, partitioner
  ) -> Any:
    """The parameters of the reader alone, as a `UniversalLM` has them under `reader`."""
    losses = self.losses(encoder, vocabulary)
    abstract = language_models.abstract_params(losses.init_params, partitioner)
    found = loop.load_kept_params(folder, self.num_steps, abstract)["discriminator"]
    return encoder_params(found, encoder.top_layers)


def _rows(instances: Instances, pad_id: int, index: np.ndarray) -> Mapping[str, np.ndarray]:
  """Packed rows, with padding told apart."""
  batch = instances.batch(index)
  segments = (batch["tokens"] != pad_id).astype(np.int32)
  return {
    "tokens": batch["tokens"], "segment_ids": segments, "example_id": batch["example_id"]}
