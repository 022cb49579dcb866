"""The task of `lmops score`: a named one, or a file of rows, with pictures or a template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def chosen(arguments, grid: Callable[[], int]):
  """The task to score, and rows to draw demonstrations from if --train gives them to a template.

  Args:
    arguments: of `lmops score`.
    grid: tells the side of the model's grid; called if boxes stand in texts.

  Raises:
    ValueError: options that do not go together, or a task that cannot be read.
  """
  from lmops_jax.data import tasks

  if arguments.metric and (not Path(arguments.task).suffix or arguments.template is not None):
    raise ValueError(
      "--metric is for a --task that is a file of rows with images; other tasks have their own."
    )
  of_pictures = arguments.template is None and arguments.task in tasks.PICTURE_ENTRIES
  if (arguments.split or arguments.pictures) and not of_pictures:
    raise ValueError(
      "--split and --pictures are for a --task that is a named one with pictures; leave them out.")
  labels = [word.strip() for word in arguments.labels.split(",")] if arguments.labels else None
  if arguments.template is None and not Path(arguments.task).suffix:
    if arguments.train:
      raise ValueError(
        f"--train is for a --task that is a file; {arguments.task} draws from its own train split, "
        "or from FOLDER/train.jsonl with --data FOLDER."
      )
    if of_pictures:
      return _with_pictures(arguments, grid), None
    return tasks.named_task(
      arguments.task, flavour=arguments.flavour, template=arguments.template_index,
      data=arguments.data, limit=arguments.limit, labels=labels,
    ), None
  if arguments.data or arguments.flavour or arguments.template_index:
    raise ValueError(
      "--data, --flavour and --template-index are for named tasks; leave them out for a file."
    )
  if _names_pictures(arguments.task):
    if arguments.template is not None or labels is not None:
      raise ValueError(
        f"--task {arguments.task} has rows with images, which have their own prompt and options; "
        "leave --template and --labels out."
      )
    return tasks.picture_rows_task(
      arguments.task, metric=arguments.metric, limit=arguments.limit, train=arguments.train,
      grid=grid), None
  if arguments.template is None or labels is None:
    raise ValueError(
      f"--task {arguments.task} is a file, so it needs --template and --labels; see lmops score "
      "--help."
    )
  template = arguments.template.replace("\\n", "\n")
  task = tasks.jsonl_task(arguments.task, template, labels, arguments.limit)
  train = arguments.train and tasks.jsonl_task(arguments.train, template, labels).rows
  return task, train


def way(task: str, flavour: str | None = None):
  """How the paper of a named task with pictures, or GPT-3 its own tasks, evaluated it.

  For other tasks it is the usual `Way`.
  """
  from lmops_jax.data.tasks.asked import IN_CONTEXT
  from lmops_jax.data.tasks.pictures.registry import PICTURE_ENTRIES, Way

  if flavour == "gpt3":
    return Way(normalisation=IN_CONTEXT.get(task, "sum"))
  return PICTURE_ENTRIES[task].way if task in PICTURE_ENTRIES else Way()


def _with_pictures(arguments, grid: Callable[[], int]):
  """A named task with pictures, from the folder that its data come in, or from tfds."""
  from lmops_jax.data import tasks

  if arguments.data is None and tasks.PICTURE_ENTRIES[arguments.task].dataset is None:
    raise ValueError(
      f"--task {arguments.task} reads its data set's own folder; give it with --data FOLDER."
    )
  if arguments.flavour or arguments.labels:
    raise ValueError(
      f"--task {arguments.task} has pictures, and prompts and labels of its own; leave --flavour "
      "and --labels out."
    )
  return tasks.picture_task(
    arguments.task, arguments.data, pictures=arguments.pictures, split=arguments.split,
    template=arguments.template_index, limit=arguments.limit, grid=grid)


def _names_pictures(path: str) -> bool:
  """Whether the first row of a file of JSON lines has pictures."""
  from lmops_jax.data.lines import jsonl_rows

  return "images" in next(jsonl_rows(Path(path).expanduser()), (0, {}))[1]
