"""A finished vision-language training as what finetuning starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lmops_jax.config.setting_types import component
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.shared_stages import corpora
from lmops_jax.systems.metalm.starts import FinishedRun
from lmops_jax.systems.metalm.vision_language import ROWS, read_ids
from lmops_jax.text.vocabularies import Vocabulary


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class FinishedPictureRun(FinishedRun):
  """A finished run of `metalm.VisionLanguage`: its vocabulary and ids, and the model.

  Attributes:
    path: the run's folder, with the stages `rows` and `train`.
  """

  @property
  def vocabulary(self) -> Vocabulary:
    """That of the run, without the special tokens of pictures."""
    self._manifest(ROWS)
    return corpora.open_vocabulary(Path(self.path) / ROWS)

  @property
  def ids(self) -> ImageTokens:
    """The special ids of the run's rows."""
    self._manifest(ROWS)
    return read_ids(Path(self.path) / ROWS)
