"""What training starts from: a reader of its own, a published encoder, or a whole trained model.

Only configurations and shapes are read to tell whether a start fits; weights are read when the
training begins.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from lmops_jax.config.setting_types import ExistingPath, Text, component
from lmops_jax.data.span_examples import SpecialIds
from lmops_jax.mesh import checkpoints
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.universal import UniversalConfig, UniversalLM
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.text_encoders import check_text_encoder, text_encoder_params
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm import texts
from lmops_jax.systems.metalm.arms import sized
from lmops_jax.systems.metalm.texts import Prepared
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training import language_models, loop

_TRAIN = "train"  # the stage of `metalm.Pretrain`


@runtime_checkable
class ReaderStart(Protocol):
  """What makes the parameters that the reader starts from, as the stage `encoder`."""

  def check(self, encoder: TextEncoderConfig) -> None:
    """Raises ValueError for an encoder that it cannot start; nothing has been computed yet.

    Args:
      encoder: `vocab_size` is None if it is to come from the vocabulary.
    """

  def run(
    self, context: pipeline.StageContext, encoder: TextEncoderConfig, prepared: Prepared, *,
    seed: int, partitioner,
  ) -> None:
    """The stage; `context.extra["tested"]` gets figures of the encoder by name.

    Args:
      encoder: with a vocabulary size.
      prepared: the run's texts.
    """

  def load(
    self, folder: Path, encoder: TextEncoderConfig, vocabulary: Vocabulary, partitioner
  ) -> Any:
    """The parameters, as a `UniversalLM` has them under `reader`; `folder` is the stage's."""


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class PublishedReader:
  """A published encoder: a folder of BERT, RoBERTa or ELECTRA, or a model that was trained here.

  The decoder reads the same ids, so the run's vocabulary must be the encoder's.

  Attributes:
    path: what `pretrained.load` takes. The encoder is to be `@pretrained.text_encoder()` of it, or
      one with the same settings.
  """

  path: Text

  def fingerprint(self) -> str:
    """A hash of the encoder's files."""
    return model_lib.load(self.path).fingerprint()

  def check(self, encoder: TextEncoderConfig) -> None:
    """See `ReaderStart`."""
    check_text_encoder(self.path, encoder)

  def run(
    self, context: pipeline.StageContext, encoder: TextEncoderConfig, prepared: Prepared, *,
    seed: int, partitioner,
  ) -> None:
    """See `ReaderStart`; nothing is trained.

    Raises:
      ValueError: for another vocabulary than the encoder's.
    """
    found = model_lib.load(self.path).tokenizer().vocabulary(context.directory / "vocabulary")
    if found.fingerprint != prepared.vocabulary.fingerprint:
      raise ValueError(
        "the texts have another vocabulary than the encoder in metalm.PublishedReader.path="
        f"{self.path!r}; take its own, @data.ModelTokenizer() of the same path."
      )
    context.extra["tested"] = {}

  def load(
    self, folder: Path, encoder: TextEncoderConfig, vocabulary: Vocabulary, partitioner
  ) -> Any:
    """See `ReaderStart`."""
    return text_encoder_params(self.path, encoder, partitioner)


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """A finished run of `metalm.Pretrain`: its vocabulary, and the model that it trained.

  Attributes:
    path: the run's folder, with the stages `texts` and `train`.
  """

  path: ExistingPath

  def fingerprint(self) -> str:
    """That of the run's training."""
    return self._manifest(_TRAIN)["fingerprint"]

  @property
  def vocabulary(self) -> Vocabulary:
    """That of the run.

    Raises:
      ValueError: for a folder without the stages.
    """
    self._manifest(texts.STAGE)
    return Prepared(Path(self.path) / texts.STAGE).vocabulary

  @property
  def ids(self) -> SpecialIds:
    """The special ids of the run's rows, and `vocab_size`, those of the model."""
    return self.vocabulary

  def check(self, model: UniversalConfig) -> None:
    """Raises ValueError unless the run has trained a model of these shapes.

    Args:
      model: sizes of vocabularies that it lacks are the run's.
    """
    step, size = self._step, self.ids.vocab_size
    built = UniversalLM(sized(model, size))
    wanted = jax.eval_shape(lambda key: unboxed(loop.initializer(built)(key)), jax.random.key(0))
    try:
      checkpoints.check_params(Path(self.path) / _TRAIN / "params" / str(step), wanted)
    except checkpoints.MismatchError as error:
      raise ValueError(
        f"metalm.FinishedRun.path={str(self.path)!r} holds another model than metalm.TaskTuning."
        f"model: {str(error).split(';')[0]}; give the settings that it was trained with."
      ) from error

  def params(self, model: UniversalLM, partitioner) -> Any:
    """The trained parameters, placed for training."""
    return language_models.load_params(
      Path(self.path) / _TRAIN, self._step, model, partitioner)

  @property
  def _step(self) -> int:
    """The last step whose parameters the run has kept."""
    self._manifest(_TRAIN)
    found = [int(folder.name) for folder in (Path(self.path) / _TRAIN / "params").glob("[0-9]*")]
    if not found:
      raise ValueError(
        f"metalm.FinishedRun.path={str(self.path)!r} has no parameters in train/params; give the "
        "folder of a run of metalm.Pretrain."
      )
    return max(found)

  def _manifest(self, stage: str) -> dict[str, Any]:
    try:
      return pipeline.read_manifest(self.path, stage)
    except pipeline.StageError as error:
      raise ValueError(
        f"metalm.FinishedRun.path={str(self.path)!r} has no finished stage {stage!r}; give the "
        "folder of a finished run of metalm.Pretrain."
      ) from error
