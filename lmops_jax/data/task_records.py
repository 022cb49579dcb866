"""Rows of tasks as prompts with completions to learn from (multitask finetuning, instructions).

FLAN (arXiv:2109.01652) and MetaLM (arXiv:2206.06336, section 3) take at most 30,000 rows of a data
set, in one wording or each in one drawn from several, and list the options behind the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from lmops_jax.config.setting_types import Count, Name, PositiveInt, Seed, Text, component
from lmops_jax.data.documents import document_id
from lmops_jax.data.grit.pairs import draw
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Picture, Record, parts_of
from lmops_jax.data.tasks.choice import TaskChoice, chosen
from lmops_jax.data.tasks.pictures import PictureTaskChoice
from lmops_jax.data.tasks.task import Example, Task
from lmops_jax.host.hashing import digest, order_key


def listing_options(task: Task) -> Task:
  """A task whose prompts name the options, in the manner of FLAN; open rows stay as they are.

  Raises:
    ValueError: for rows with a prompt, or a picture, for each option.
  """
  return dataclasses.replace(
    task, rows=tuple(_listing(row, task.name) for row in task.rows),
    train=tuple(_listing(row, task.name) for row in task.train),
    null_prompt=None)  # which options it would name depends on the row


def _listing(example: Example, task: str) -> Example:
  if not example.options:
    return example
  _require_one_prompt(example, task)
  options = [option.strip() for option in example.options]
  prompt = "\n".join([example.prompt.rstrip(), "OPTIONS:", *options, "TARGET:"])
  return example._replace(prompt=prompt, options=tuple(f" {option}" for option in options))


def _require_one_prompt(example: Example, task: str) -> None:
  if example.prompts or example.option_images:
    what = "prompt" if example.prompts else "picture"
    raise ValueError(
      f"row {example.id} of the task {task} has another {what} for each option, so that its prompt "
      "alone does not ask anything; take a flavour with one prompt, or give rows with prompt and "
      "completion."
    )


def record_of(example: Example, task: str) -> Record:
  """A row as a prompt, which is given, with its right answer, which is learned.

  Args:
    example: an open one is answered by its last answer, as `Example.demonstration` is.
    task: the task's name; with the row's id it makes up that of the record.

  Raises:
    ValueError: for a row with a prompt, or a picture, for each option.
  """
  _require_one_prompt(example, task)
  where = f"row {example.id} of the task {task}"
  answer = example.options[example.label] if example.options else f" {example.answers[-1]}"
  pictures = [Picture(path, path) for path in example.images]
  parts, num_given = parts_of(example.prompt, pictures, where, answer)
  return Record(document_id(f"{task}:{example.id}"), parts, num_given, where)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TaskRecords(ImageCorpus):
  """The rows of a task that are not for evaluation, as prompts with completions.

  Which rows, and which wording each of them has, are functions of (seed, row id).

  Attributes:
    task: the task; its `num_rows` rows to evaluate on are left to evaluation.
    other_templates: further templates, each as `tasks.choose.template`; a row has one of all.
    list_options: name the options in the prompt (`listing_options`).
    num_rows: the most rows; None is all.
    seed: of the choices.

  Raises:
    ValueError: for a template that the task does not have.
  """

  task: TaskChoice | PictureTaskChoice
  other_templates: Sequence[Count | Text] = ()
  list_options: bool = False
  num_rows: PositiveInt | None = 30_000
  seed: Seed = 0

  def __post_init__(self):
    self._wordings()

  def _wordings(self) -> list[TaskChoice | PictureTaskChoice]:
    return [dataclasses.replace(self.task, template=template)
            for template in (self.task.template, *self.other_templates)]

  def fingerprint(self) -> str:
    return digest([repr(self), self.task.fingerprint()])

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    """The records, ordered by (seed, row id).

    `left_out` also gets rows "over_limit", and "unusable" ones: those of the whole task that no
    wording can use, and those to learn from that the wording drawn for them cannot.

    Raises:
      ValueError: if the task has no rows besides those to evaluate on.
    """
    wordings = self._wordings()
    whole = [dataclasses.replace(wording, num_rows=None).load() for wording in wordings]
    tasks = [chosen(task, task.name, wording.num_rows, wording.rows_seed)
             for task, wording in zip(whole, wordings)]
    # A row that only some wordings can use moves the choice of rows in these.
    tested = {row.id for task in tasks for row in task.rows}
    to_learn = {row.id for task in tasks for row in task.train} - tested
    if not to_learn:
      raise ValueError(
        f"the task {self.task.name} has {len(tested)} rows to evaluate on and none to learn from; "
        "lower tasks.choose.num_rows, or give a train file."
      )
    found = {}
    for number, task in enumerate(tasks):
      task = listing_options(task) if self.list_options else task
      found |= {
        row.id: record_of(row, task.name) for row in task.train
        if row.id in to_learn and self._wording_of(row.id, len(wordings)) == number}
    usable = {row.id for task in whole for row in (*task.rows, *task.train)}
    num_rows = len(whole[0].rows) + len(whole[0].train) + whole[0].skipped
    left_out.counts["unusable"] += num_rows - len(usable) + len(to_learn - found.keys())
    ordered = sorted(found, key=lambda row: (order_key(row, self.seed), row))
    kept = ordered[: self.num_rows]
    left_out.counts["over_limit"] += len(ordered) - len(kept)
    for row in kept:
      yield found[row]

  def _wording_of(self, row: int, num: int) -> int:
    """Which of several wordings a row has."""
    return int(draw(row, "template", self.seed) * num)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TaskClusters:
  """Tasks by cluster, one of which may be held out to be tested on (FLAN's protocol).

  Attributes:
    clusters: by cluster the rows of its tasks, by the task's name.
    held_out: the cluster that is tested and not learned; None: all are learned.
    related: clusters that are not learned either when another one is tested. MetaLM has
      {"nli": ("paraphrase",), "paraphrase": ("nli",)}.
    unused: clusters that are never learned.

  Raises:
    ValueError: for a cluster that does not exist, a task in two clusters, or nothing to learn.
  """

  clusters: Mapping[str, Mapping[str, ImageCorpus]]
  held_out: Name | None = None
  related: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  unused: Sequence[str] = ()

  def __post_init__(self):
    held_out = () if self.held_out is None else (self.held_out,)
    of_related = [name for pair in self.related.items() for name in (pair[0], *pair[1])]
    for setting, names in (("held_out", held_out), ("related", of_related),
                           ("unused", self.unused)):
      for name in names:
        if name not in self.clusters:
          raise ValueError(
            f"data.TaskClusters.{setting} names the cluster {name!r}; the clusters are "
            f"{', '.join(self.clusters)}."
          )
    names = [name for tasks in self.clusters.values() for name in tasks]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(
          f"data.TaskClusters.clusters has the task {name!r} twice; give each task one cluster.")
    if not self.learned():
      raise ValueError(
        f"data.TaskClusters leaves no task to learn from when {self.held_out!r} is held out; give "
        "more clusters, or leave fewer out."
      )

  def learned(self) -> dict[str, ImageCorpus]:
    """The tasks to learn from, by name."""
    tested = self.related.get(self.held_out, ())
    out = {self.held_out, *tested, *self.unused}
    return {name: corpus for cluster, tasks in self.clusters.items() if cluster not in out
            for name, corpus in tasks.items()}

  def tested(self) -> tuple[str, ...]:
    """The names of the tasks that are held out; () if none are."""
    return tuple(self.clusters.get(self.held_out, ()))
