"""Named tasks with pictures, read from the folders of their data sets or through tfds."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from lmops_jax.data.named_datasets import Tfds
from lmops_jax.data.tasks.named import tfds_builder
from lmops_jax.data.tasks.pictures import items
from lmops_jax.data.tasks.pictures.registry import picture_entry
from lmops_jax.data.tasks.pictures.source import NotThere, Source, published_grid
from lmops_jax.data.tasks.task import OF_BOXES, Example, Task
from lmops_jax.host.foreign_files import is_there, printable

_TFDS_SPLITS = {"val": "validation"}  # where tfds has names of its own


def picture_task(
  name: str, data: Path | str | None = None, *, pictures: Path | str | None = None,
  template: int = 0, split: str | None = None, limit: int | None = None,
  grid: Callable[[], int] = published_grid, data_dir: str | None = None,
) -> Task:
  """One of the tasks of `registry.PICTURE_ENTRIES`.

  Pictures stay paths; nothing opens them here, but the first is looked for.

  Args:
    name: the task's.
    data: the folder of its data set, as that is distributed; None: tfds, which must have prepared
      it. Pictures are then read when they are needed if it is stored as ArrayRecord, else at once.
    pictures: folder that its annotations' paths start from; None is `data`.
    template: index of the prompt.
    split: the split to evaluate on; None: the paper's.
    limit: rows to take from the beginning of that split.
    grid: tells the side of the model's grid; called if boxes stand in texts.
    data_dir: where tfds keeps datasets; None is its own default.

  Returns:
    The task. `train` is empty if there is only one split, if `split` is the train split, or if the
    data has none.

  Raises:
    ValueError: if there is no such task, template, folder, file or picture, or a row does not have
      the data set's form.
  """
  check_picture_task(name, data, pictures, template)
  _check_limit(limit)
  entry, folder = picture_entry(name), Path(data or "").expanduser()
  root = folder if pictures is None else Path(pictures).expanduser()
  source = Source(name, folder, root, "", entry.templates[template], grid)
  if data is None:
    tfds_builder(name, entry.dataset, data_dir)

  def of_split(split: str) -> Source:
    at_tfds = None if data is not None else Tfds(
      entry.dataset, split=_TFDS_SPLITS.get(split, split), data_dir=data_dir)
    return source._replace(split=split, dataset=at_tfds)

  split = split or entry.rows
  rows, skipped = _kept(entry.read(of_split(split)), limit)
  train, more = (), 0
  if entry.train and entry.train != split:
    with contextlib.suppress(NotThere):
      train, more = _kept(entry.read(of_split(entry.train)), None)
  words = entry.words
  if entry.names is not None:
    words = tuple(dict.fromkeys(entry.names(of_split(split)).values()))
  return _checked(Task(
    name, rows, train, words, None, entry.metric, skipped + more, _grid_of((*rows, *train), grid)))


def picture_rows_task(
  path: Path | str, *, metric: str | None = None, limit: int | None = None,
  train: Path | str | None = None, grid: Callable[[], int] = published_grid,
) -> Task:
  """A task from JSON lines of the user's own; see `items.own_rows` for their fields.

  Args:
    path: the file; pictures' paths start from its folder.
    metric: see `Task`; None: "accuracy" if rows have options, "referring" if boxes are asked for,
      otherwise "exact_match".
    limit: rows to take from the beginning.
    train: file to draw demonstrations from; None: the rows themselves.
    grid: see `picture_task`.

  Raises:
    ValueError: for a row with other fields or another number of pictures; it names file and line.
  """
  _check_limit(limit)

  def read(file, num):
    file = Path(file).expanduser()
    if not is_there(file):
      raise ValueError(f"{printable(file)} is not a file; give JSON lines with images.")
    return _kept(items.own_rows(Source(file.name, file, file.parent, "", "", grid)), num)

  rows, skipped = read(path, limit)
  drawn, more = read(train, None) if train is not None else ((), 0)
  located = any(row.boxes for row in rows)
  if metric is None:
    metric = "referring" if located else "exact_match"
    metric = "accuracy" if rows and rows[0].options else metric
  if located and metric not in OF_BOXES:
    raise ValueError(
      f"{printable(path)} has rows with a target, which metric={metric!r} does not measure; take "
      f"one of {', '.join(OF_BOXES)}, or give answers instead."
    )
  name = printable(Path(path).name.split(".")[0])
  return _checked(Task(
    name, rows, drawn, (), None, metric, skipped + more, _grid_of((*rows, *drawn), grid)))


def check_picture_task(
  name: str, data: Path | str | None, pictures: Path | str | None, template: int
) -> None:
  """Refuses, as `picture_task` does, what can be told without reading rows."""
  entry = picture_entry(name)
  if not 0 <= template < len(entry.templates):
    raise ValueError(
      f"the task {name} has no template {template}; its indices are "
      f"{', '.join(map(str, range(len(entry.templates))))}."
    )
  if data is None and (entry.dataset is None or pictures is not None):
    raise ValueError(
      f"the task {name} reads its data set's own folder ({entry.source}); give it with data."
      if entry.dataset is None else
      f"pictures={str(pictures)!r} belongs to annotations in a folder, and tfds holds the pictures "
      f"of the task {name}; leave it out, or give data."
    )
  for label, place in (("data", data), ("pictures", pictures)):
    if place is not None and not Path(place).expanduser().is_dir():
      raise ValueError(
        f"{label}={str(place)!r} is no folder; give the one of the task {name} ({entry.source})."
      )


def _check_limit(limit: int | None) -> None:
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit} must be at least 1, or None for all rows.")


def _kept(
  found: Iterable[Example | None], limit: int | None
) -> tuple[tuple[Example, ...], int]:
  kept, skipped = [], 0
  for example in found:
    if example is None:
      skipped += 1
    else:
      kept.append(example)
    if limit is not None and len(kept) == limit:
      break
  return tuple(kept), skipped


def _grid_of(rows: Iterable[Example], grid: Callable[[], int]) -> int:
  """The side of the grid if boxes stand in texts, else the published model's."""
  texts = (text for row in rows for text in (row.prompt, *row.answers))
  return grid() if any("<object>" in text for text in texts) else published_grid()


def _checked(task: Task) -> Task:
  """The task; raises ValueError if its first picture is not there."""
  rows = itertools.chain(task.rows[:1], task.train[:1])
  for path in (path for row in rows for path in (*row.images, *row.option_images)):
    if isinstance(path, str) and not is_there(Path(path)):
      raise ValueError(
        f"the task {task.name} names the picture {printable(path)}, which is not there; give the "
        "folder of its pictures with pictures=."
      )
  return task
