"""Named tasks, read through tfds or from a folder of JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.data.lines import ENDINGS, jsonl_rows
from lmops_jax.data.tasks import installed_kind, rows
from lmops_jax.data.tasks.registry import Entry, Wording, entry, worded, wording
from lmops_jax.data.tasks.task import Example, Task

_STEMS = ("test", "validation", "dev")


def named_task(
  name: str,
  *,
  flavour: str | None = None,
  template: int = 0,
  data: Path | str | None = None,
  split: str | None = None,
  limit: int | None = None,
  data_dir: str | None = None,
  labels: Sequence[str] | None = None,
) -> Task:
  """One of the tasks of `registry.ENTRIES`, or "installed_kind".

  Args:
    name: the task's.
    flavour: one of `registry.FLAVOURS`; None: fs, or the first that the task has.
    template: index within the flavour.
    data: folder with `train.jsonl` and `test.jsonl` (or `validation.jsonl`, `dev.jsonl`), or
      `all.jsonl` alone, plain or `.gz` or `.zst`; rows have the dataset's field names, those of
      text classification also plain "text" and "label". None: tfds, which must have prepared it.
    split: the split to evaluate on; None: the papers', or the first of the above in the folder.
    limit: rows to take from the beginning of that split.
    data_dir: where tfds keeps datasets; None is its own default.
    labels: for a folder whose label numbers are not the task's: the label words (or class names) in
      the order of the file's numbers, for example "description entity abbreviation human location
      number" for TREC, "subjective objective" for Subj.

  Returns:
    The task. `train` is empty if the data has only one split, or `split` is the train split.

  Raises:
    ValueError: if there is no such task, flavour, template or data, a row lacks a field or has a
      label outside the options, or `labels` are not the task's.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit} must be at least 1, or None for all rows.")
  check_named(name, flavour, template, data, split, labels)
  if name == installed_kind.NAME:
    return installed_kind.installed_kind(flavour=flavour, template=template, limit=limit)
  of_name, how = entry(name), wording(name, flavour, template)
  if data is not None:
    sources = _folder(name, Path(data).expanduser(), split)
    order = None if labels is None else _order(labels, of_name, how)
  else:
    sources, order = _tfds(name, of_name, split, data_dir), None
  found, train = _read(sources[0], of_name, how, order, limit), ([], 0)
  if sources[1] is not None:
    train = _read(sources[1], of_name, how, order, None)
  return Task(
    name, tuple(found[0]), tuple(train[0]), how.words, rows.null_prompt(of_name, how),
    of_name.metric, found[1] + train[1],
  )


def check_named(
  name: str, flavour: str | None, template: int, data: Path | str | None, split: str | None,
  labels: Sequence[str] | None,
) -> None:
  """Refuses, as `named_task` does, what can be told without reading rows or importing tfds."""
  if name == installed_kind.NAME:
    if data is not None or split is not None or labels is not None:
      raise ValueError(
        f"the task {name} comes from the installed packages; leave data, split and labels out."
      )
    worded(name, installed_kind.TEMPLATES, flavour, template)
    return
  of_name, how = entry(name), wording(name, flavour, template)
  if data is not None:
    _folder(name, Path(data).expanduser(), split)
    if labels is not None:
      _order(labels, of_name, how)
  elif labels is not None:
    raise ValueError("labels= tells the order of a folder's numbers; give it with data=.")


def _read(source, of_name: Entry, how: Wording, order, limit) -> tuple[list[Example], int]:
  kept, skipped = [], 0
  for example in rows.examples(source, of_name, how, order):
    if example is None:
      skipped += 1
      continue
    kept.append(example)
    if limit is not None and len(kept) == limit:
      break
  return kept, skipped


def _order(labels: Sequence[str], of_name: Entry, how: Wording) -> list[int]:
  if not how.words:
    raise ValueError("labels= is for tasks with label words; this one's rows have own options.")
  order = [rows.label_of_word(label, of_name, how.words, "labels=") for label in labels]
  if sorted(order) != list(range(len(how.words))):
    raise ValueError(
      f"labels={', '.join(labels)} does not hold each of the labels {', '.join(how.words)} once."
    )
  return order


def _folder(name: str, folder: Path, split: str | None):
  """Rows to evaluate on and rows to draw from; the latter are None if there is only one file."""
  if not folder.is_dir():
    raise ValueError(f"data={str(folder)!r} is no folder; give one with train and test.jsonl.")

  def file(stem: str) -> Path | None:
    # A link that leads nowhere is taken, so that reading it raises an error.
    return next((p for e in ENDINGS if os.path.lexists(p := folder / f"{stem}{e}")), None)

  stems = (*_STEMS, "all") if split is None else (split,)
  chosen = next((p for stem in stems if (p := file(stem)) is not None), None)
  if chosen is None:
    there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise ValueError(
      f"{folder} has no {' or '.join(f'{stem}.jsonl' for stem in stems)} for the task {name} (it "
      f"has {there})."
    )
  train = file("train")
  return _lines(chosen), None if train in (None, chosen) or chosen.name.startswith("all.") else (
    _lines(train)
  )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  for number, row in jsonl_rows(path):
    yield f"{path.name}:{number}", row


def _tfds(name: str, of_name: Entry, split: str | None, data_dir: str | None):
  if of_name.dataset is None:
    raise ValueError(
      f"tfds has no dataset for the task {name}; give a folder with its rows as JSON lines, "
      "--data FOLDER or data=."
    )
  builder = tfds_builder(name, of_name.dataset, data_dir)
  split = of_name.rows if split is None else split
  train = of_name.train if of_name.train != split else ""
  return tfds_rows(builder, of_name, split), tfds_rows(builder, of_name, train) if train else None


def tfds_builder(name: str, dataset: str, data_dir: str | None):
  """The prepared dataset of a task. Imports tfds.

  Raises:
    ValueError: if it is not there.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(dataset, data_dir=data_dir)
  if not builder.is_prepared():
    raise ValueError(
      f"the tfds dataset {dataset!r} of task {name} is not prepared in {builder.data_dir}; "
      f"run python -m tensorflow_datasets.scripts.cli.main build {dataset} where there is "
      "a network, or give a folder with its rows, --data FOLDER or data=."
    )
  return builder


def tfds_rows(builder, of_name: Entry, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """The rows of one split as plain Python values, each behind the place where it is."""
  import tensorflow_datasets as tfds

  dataset = builder.as_dataset(split=split)
  for number, row in enumerate(tfds.as_numpy(dataset)):
    yield f"{of_name.dataset}[{split}]:{number}", _plain(row)


def _plain(value: Any) -> Any:
  """The value with arrays as lists and bytes as text."""
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if type(value).__name__ == "RaggedTensorValue":
    value = value.to_list()
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  return value
