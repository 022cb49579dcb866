"""A task as a gin file names it; the rows to evaluate on are chosen by their ids."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import MinLen

from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  Name,
  PositiveInt,
  Seed,
  Text,
  component,
)
from lmops_jax.data.files import Jsonl
from lmops_jax.data.lines import ENDINGS as LINES
from lmops_jax.data.tasks.named import check_named, named_task
from lmops_jax.data.tasks.task import Example, Task, demonstrations
from lmops_jax.data.tasks.templates import Template, jsonl_task
from lmops_jax.host.foreign_files import is_there, printable
from lmops_jax.stages import pipeline, skeleton

TASK_FILE = "task.json"


@runtime_checkable
class TaskSource(Protocol):
  """A setting with a `name` whose stage writes a task, for `read_task`."""

  def stage(self, where: str) -> skeleton.Stage:
    """The stage `task/NAME`; `where` is the source's dotted name in the system."""


@component("choose", module="tasks")
@dataclasses.dataclass(frozen=True)
class TaskChoice:
  """Which task, from where, in which words.

  Attributes:
    task: one of `lmops list tasks`, "installed_kind" among them, or a file of JSON lines, which
      then needs `template` as text and `labels`.
    data: folder of a named task's rows; None takes tfds.
    flavour: wording of a named task; None is its first.
    template: index within the flavour, or for a file text such as "Review: {text} Label: {label}".
    labels: a file's label words, or for a folder the words in the order of its numbers.
    num_rows: the most rows to evaluate on, chosen by (rows_seed, id); None is all of them. If there
      is no other part, demonstrations are drawn from the rows not chosen.
    rows_seed: seed of that choice, the same for all seeds of a study.
    data_dir: where tfds keeps datasets.
    label: the name in stages and reports; None is the task's name.

  Raises:
    ValueError: for a file without template or labels, or values out of range.
  """

  task: Text
  data: Text | None = None
  flavour: Text | None = None
  template: Count | Text = 0
  labels: Annotated[Sequence[Text], MinLen(2), Distinct] | None = None
  num_rows: PositiveInt | None = 500
  rows_seed: Seed = 1
  data_dir: Text | None = None
  label: Name | None = None

  def __post_init__(self):
    if self.is_file and (isinstance(self.template, int) or not self.labels):
      raise ValueError(
        f"tasks.choose.task={self.task!r} is a file, so it needs tasks.choose.template, such as "
        "'Review: {text} Sentiment: {label}', and tasks.choose.labels."
      )
    if self.is_file:
      Template(self.template)
      if not is_there(Path(self.task).expanduser()):
        raise ValueError(f"tasks.choose.task={self.task!r} is not a file; give JSON lines.")
      return
    if isinstance(self.template, str):
      raise ValueError(
        f"tasks.choose.template={self.template!r} is text and {self.task!r} no .jsonl file; give "
        "the index of one of the task's templates (lmops list tasks)."
      )
    check_named(self.task, self.flavour, self.template, self.data, None, self.labels)

  @property
  def is_file(self) -> bool:
    """Whether `task` is a path."""
    return self.task.endswith(LINES)

  @property
  def name(self) -> str:
    """The name in stages and reports."""
    return self.label or shown_name(self.task)

  def fingerprint(self) -> str:
    """Names and hashes of the local files; "" if the rows come from elsewhere."""
    place = self.task if self.is_file else self.data
    if place is None:
      return ""
    path = Path(place).expanduser()
    files = [path] if self.is_file else sorted(
      p for p in path.glob("[!.]*") if p.name.endswith(LINES))
    return ", ".join(f"{printable(file.name)} {Jsonl(str(file)).fingerprint()}"
                     for file in files if os.path.lexists(file))

  def stage(self, where: str) -> skeleton.Stage:
    """The stage `task/NAME`, which `read_task` reads."""
    return stage_of(self.name, where, self.load)

  def load(self) -> Task:
    """The rows.

    Raises:
      ValueError: as `named_task` and `jsonl_task` do.
    """
    if self.is_file:
      whole = jsonl_task(self.task, self.template, self.labels)
    else:
      whole = named_task(
        self.task, flavour=self.flavour, template=self.template, data=self.data,
        data_dir=self.data_dir, labels=self.labels)
    return chosen(whole, self.name, self.num_rows, self.rows_seed)


def shown_name(task: str) -> str:
  """The name of a task that is given by its own, or as a file, whose ending is left out."""
  return printable(Path(task).name.split(".")[0]) if task.endswith(LINES) else task


def chosen(whole: Task, name: str, num_rows: int | None, seed: int) -> Task:
  """A task under another name with some of the rows, chosen by (seed, id).

  Args:
    num_rows: the most rows; None is all. A task without rows to draw from gets those not chosen.
  """
  if num_rows is None or num_rows >= len(whole.rows):
    return dataclasses.replace(whole, name=name)
  ids = {row.id for row in demonstrations(whole.rows, num_rows, seed)}
  return dataclasses.replace(
    whole, name=name, rows=tuple(row for row in whole.rows if row.id in ids),
    train=whole.train or tuple(row for row in whole.rows if row.id not in ids))


def stage_of(name: str, where: str, load: Callable[[], Task]) -> skeleton.Stage:
  """The stage `task/NAME` of a source whose dotted name in the system is `where`."""
  def run(context: pipeline.StageContext) -> None:
    task = load()
    write_task(context.directory, task)
    skipped = f", {task.skipped} rows left out" if task.skipped else ""
    context.log(f"{len(task.rows)} rows, {len(task.train)} to draw from{skipped}")

  return skeleton.Stage(f"task/{name}", run, reads=(where,))


def checked(
  stage: skeleton.Stage, check: Callable[[Task], Any], *settings: str
) -> skeleton.Stage:
  """The stage of a task, which also runs `check` on the task that it has read.

  Args:
    check: raises ValueError for a task that does not fit.
    settings: dotted names of the settings that `check` reads.
  """
  def run(context: pipeline.StageContext) -> None:
    stage.run(context)
    check(read_task(context.directory))

  return dataclasses.replace(stage, run=run, checks=(*stage.checks, *settings))


def write_task(folder: Path, task: Task) -> None:
  """Writes a task into a folder, for `read_task`."""
  found = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
  text = json.dumps(found, ensure_ascii=False) + "\n"
  (Path(folder) / TASK_FILE).write_text(text, encoding="utf-8")


def read_task(folder: Path) -> Task:
  """The task in a folder that `write_task`, or the stage of a `TaskChoice`, wrote."""
  found = json.loads((Path(folder) / TASK_FILE).read_text(encoding="utf-8"))
  for part in ("rows", "train"):
    found[part] = tuple(
      Example(*map(_in_tuples, row))
      for row in found[part])
  return Task(**{**found, "words": tuple(found["words"])})


def _in_tuples(value):
  return tuple(map(_in_tuples, value)) if isinstance(value, list) else value
