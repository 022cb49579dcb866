"""Stage `texts`: vocabulary, packed rows to train on and to validate, and the tasks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lmops_jax.config.setting_types import ByteCount, Part, component
from lmops_jax.data import instance_writing
from lmops_jax.data.instances import Instances, open_instances
from lmops_jax.data.tasks import Task
from lmops_jax.data.tasks.choice import read_task, write_task
from lmops_jax.shared_stages import corpora, unseen_text
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm import tasks as tasks_lib

STAGE = "texts"
_VALIDATION, _TASKS = "validation", "tasks"


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Texts(unseen_text.SplitTexts):
  """What text to use and how to cut it; tasks are made from the documents of the validation part.

  For the attributes see `shared_stages.unseen_text.SplitTexts`.
  """

  setting: ClassVar[str] = "metalm.Texts"

  validation_fraction: Part = 0.3
  validation_bytes: ByteCount = 4_000_000


def run(context: pipeline.StageContext, config: Texts, asked: tasks_lib.Tasks) -> None:
  """Writes vocabulary, train, validation and tasks/<name>."""
  vocabulary, unseen, statistics = unseen_text.write(context, config)
  statistics["validation_instances"] = instance_writing.write_encoded(
    context.directory / _VALIDATION, corpora.pack(unseen, vocabulary, config.length), vocabulary,
    config.length)
  for name, task in tasks_lib.tasks(unseen, asked).items():
    folder = context.directory / _TASKS / name
    folder.mkdir(parents=True)
    write_task(folder, task)
    statistics[f"{name}_rows"], statistics[f"{name}_train"] = len(task.rows), len(task.train)
  unseen_text.keep_statistics(context, statistics)


class Prepared(unseen_text.Prepared):
  """The finished folder of `texts`."""

  @property
  def validation(self) -> Instances:
    """Packed rows of unseen documents."""
    return open_instances(self.directory / _VALIDATION)

  def task(self, name: str) -> Task:
    """A task by its name."""
    return read_task(self.directory / _TASKS / name)
