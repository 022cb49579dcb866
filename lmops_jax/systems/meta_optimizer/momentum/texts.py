"""Stage `texts`: a corpus as packed instances, and unseen text packed at several lengths."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import MultipleOf

from lmops_jax.config.setting_types import at_least, component
from lmops_jax.data import instance_writing
from lmops_jax.data import instances as instances_lib
from lmops_jax.shared_stages import corpora, unseen_text
from lmops_jax.stages import pipeline


@component(module="momentum")
@dataclasses.dataclass(frozen=True)
class Texts(unseen_text.SplitTexts):
  """What text to use and how to cut it.

  Attributes:
    length: tokens of a training instance, a multiple of 4; validation is packed at a quarter, a
      half and all of it.
    For the others see `shared_stages.unseen_text.SplitTexts`.
  """

  setting: ClassVar[str] = "momentum.Texts"

  length: Annotated[at_least(8), MultipleOf(4)] = 256

  def lengths(self) -> tuple[int, ...]:
    """Lengths of the validation instances, ascending."""
    return self.length // 4, self.length // 2, self.length


def run(context: pipeline.StageContext, config: Texts) -> None:
  """Writes vocabulary, train and validation/<length>."""
  vocabulary, unseen, statistics = unseen_text.write(context, config)
  for length in config.lengths():
    statistics[f"validation_instances_{length}"] = instance_writing.write_encoded(
      context.directory / "validation" / str(length), corpora.pack(unseen, vocabulary, length),
      vocabulary, length,
    )
  unseen_text.keep_statistics(context, statistics)


class Prepared(unseen_text.Prepared):
  """The finished folder of `texts`."""

  def validation(self, length: int) -> instances_lib.Instances:
    """Instances of unseen text of a length."""
    return instances_lib.open_instances(self.directory / "validation" / str(length))
