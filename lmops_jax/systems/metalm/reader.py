"""Stage `encoder`: the reader learns to detect replaced tokens, before it is docked.

It is the discriminator of ELECTRA (arXiv:2003.10555), as MetaLM's text encoder is; all arms with an
encoder start from it. The mask is a word of its own, behind the vocabulary's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
from annotated_types import Gt, Lt

from lmops_jax.config.setting_types import Positive, PositiveInt, component
from lmops_jax.data.instances import Instances
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.encoders import TextEncoderConfig, encoder_params
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm.texts import Prepared
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training import language_models, loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.replaced_tokens import ReplacedTokenLosses, ReplacedTokens
from lmops_jax.training.sources import Ahead, Epochs

STAGE = "encoder"


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
    num_tested: unseen rows on which it is tested, at most.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
  """

  generator: TransformerConfig
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 16
  rate: Annotated[float, Gt(0), Lt(1)] = 0.15
  weight: Positive = 50.0
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
    result = loop.train(
      supervised(
        losses.init_params, losses, self.optimizer, keyed=True, check_batch=losses.check_batch,
        partitioner=partitioner),
      Ahead(Epochs(rows, len(instances), self.batch_size, seed)), self.num_steps, seed,
      context.directory, partitioner, records=loop.Records(
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
      "masked_nats": float(np.average(parts.masked_nats, weights=parts.num_masked)),
    }

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
