"""Stage `texts`: vocabulary, packed rows to train on and to validate, and unseen documents."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

from lmops_jax.config.setting_types import ByteCount, Part, component
from lmops_jax.data import instance_writing
from lmops_jax.data.documents import Document
from lmops_jax.data.instances import Instances, open_instances
from lmops_jax.host.whole_files import write_json
from lmops_jax.shared_stages import corpora, unseen_text
from lmops_jax.stages import pipeline

STAGE = "texts"
_VALIDATION, _UNSEEN = "validation", "unseen.json"


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Texts(unseen_text.SplitTexts):
  """What text to use and how to cut it; tasks are made of the documents of the validation part.

  For the attributes see `shared_stages.unseen_text.SplitTexts`.
  """

  setting: ClassVar[str] = "metalm.Texts"

  validation_fraction: Part = 0.3
  validation_bytes: ByteCount = 4_000_000


def run(context: pipeline.StageContext, config: Texts) -> None:
  """Writes vocabulary, train, validation and the unseen documents."""
  vocabulary, unseen, statistics = unseen_text.write(context, config)
  statistics["validation_instances"] = instance_writing.write_encoded(
    context.directory / _VALIDATION, corpora.pack(unseen, vocabulary, config.length), vocabulary,
    config.length)
  write_json(context.directory / _UNSEEN, unseen)
  unseen_text.keep_statistics(context, statistics)


class Prepared(unseen_text.Prepared):
  """The finished folder of `texts`."""

  @property
  def validation(self) -> Instances:
    """Packed rows of unseen documents."""
    return open_instances(self.directory / _VALIDATION)

  @property
  def unseen(self) -> list[Document]:
    """The unseen documents."""
    rows = json.loads((self.directory / _UNSEEN).read_text(encoding="utf-8"))
    return [Document(*row) for row in rows]
