"""A task with pictures as a gin file names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lmops_jax.config.setting_types import Count, Name, PositiveInt, Seed, Text, component
from lmops_jax.data.lines import ENDINGS as LINES
from lmops_jax.data.tasks.choice import chosen, shown_name, stage_of
from lmops_jax.data.tasks.pictures import named
from lmops_jax.data.tasks.pictures.registry import picture_entry
from lmops_jax.data.tasks.pictures.source import ENDINGS as PICTURES
from lmops_jax.data.tasks.task import Task
from lmops_jax.host.foreign_files import is_there, read_bytes
from lmops_jax.host.hashing import digest
from lmops_jax.stages import skeleton


@component("choose_pictures", module="tasks")
@dataclasses.dataclass(frozen=True)
class PictureTaskChoice:
  """Which task with pictures, from where, in which words.

  Attributes:
    task: one of those with pictures of `lmops list tasks`, or a file of JSON lines with images.
    data: folder of a named task's data.
    pictures: folder that its annotations' paths start from; None is `data`.
    template: index of a named task's prompt.
    split: the split to evaluate on; None is the paper's.
    num_rows: the most rows to evaluate on, chosen by (rows_seed, id); None is all of them. If there
      is no other part, demonstrations are drawn from the rows not chosen.
    rows_seed: seed of that choice, the same for all seeds of a study.
    label: the name in stages and reports; None is the task's name.

  Raises:
    ValueError: for a named task without a folder, a file with one, or values out of range.
  """

  task: Text
  data: Text | None = None
  pictures: Text | None = None
  template: Count = 0
  split: Text | None = None
  num_rows: PositiveInt | None = 500
  rows_seed: Seed = 1
  label: Name | None = None

  def __post_init__(self):
    if self.is_file:
      given = [n for n in ("data", "pictures", "split", "template") if getattr(self, n)]
      if given:
        raise ValueError(
          f"tasks.choose_pictures.{given[0]} is for named tasks, and {self.task!r} is a file, "
          "whose pictures are found from its own folder; leave it out."
        )
      if not is_there(Path(self.task).expanduser()):
        raise ValueError(
          f"tasks.choose_pictures.task={self.task!r} is not a file; give JSON lines.")
      return
    picture_entry(self.task)
    if self.data is None:
      raise ValueError(
        f"tasks.choose_pictures.task={self.task!r} needs tasks.choose_pictures.data, the folder of "
        "its data."
      )
    named.check_picture_task(self.task, self.data, self.pictures, self.template)

  @property
  def is_file(self) -> bool:
    """Whether `task` is a path."""
    return self.task.endswith(LINES)

  @property
  def name(self) -> str:
    """The name in stages and reports."""
    return self.label or shown_name(self.task)

  def fingerprint(self) -> str:
    """A hash of the annotations, and of the pictures' names if folders tell the classes."""
    if self.is_file:
      return digest([read_bytes(Path(self.task).expanduser())])
    folder = Path(self.data).expanduser()
    patterns = picture_entry(self.task).files
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    parts: list[str | bytes] = []
    for path in paths:
      parts.append(f"{path.relative_to(folder)}\0")
      if path.suffix.lower() not in PICTURES and path.is_file():
        parts.append(read_bytes(path))
    return digest(parts)

  def stage(self, where: str) -> skeleton.Stage:
    """The stage `task/NAME`, which `read_task` reads."""
    return stage_of(self.name, where, self.load)

  def load(self) -> Task:
    """The rows.

    Raises:
      ValueError: as `picture_task` and `picture_rows_task` do.
    """
    if self.is_file:
      whole = named.picture_rows_task(self.task)
    else:
      whole = named.picture_task(
        self.task, self.data, pictures=self.pictures, template=self.template, split=self.split)
    return chosen(whole, self.name, self.num_rows, self.rows_seed)
