"""Stage `tasks`: what all arms are asked, made from documents that no arm was trained on.

Each row is a function of the documents, a seed and its index.

- next passage: which of some passages continues this one. The paper's tasks that choose an ending
  (StoryCloze, HellaSwag) are of this kind.
- file kind: what kind of file an excerpt is from, with a few examples in context, and finetuned.
- same document: whether two passages stand in one document or in two of different kinds, as natural
  language inference relates two texts; it is finetuned.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Seed, at_least, component
from lmops_jax.data.documents import Document
from lmops_jax.data.tasks import Example, Task
from lmops_jax.data.tasks.choice import read_task, write_task
from lmops_jax.data.tasks.installed_kind import TEMPLATES, WORDS
from lmops_jax.host.hashing import order_key
from lmops_jax.stages import pipeline

STAGE = "tasks"
NEXT_PASSAGE, FILE_KIND, SAME_DOCUMENT = "next_passage", "file_kind", "same_document"
NAMES = (NEXT_PASSAGE, FILE_KIND, SAME_DOCUMENT)
TUNED = (SAME_DOCUMENT, FILE_KIND)  # tasks that are finetuned together
SAME_WORDS = ("no", "yes")
_SAME_TEMPLATE = "First: {first} Second: {second} Same:"
_SEEDS = 2  # of rows to evaluate on, and to train on


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Tasks:
  """Rows of the tasks.

  Attributes:
    num_rows: rows of each task to evaluate on.
    num_train: rows of "same document" and of "file kind" each to finetune on and to draw
      demonstrations from, of other documents than those to evaluate on.
    num_kinds: kinds of files that are told apart, those with the most documents.
    num_options: passages of which one continues.
    context_chars, option_chars: characters of a passage and of what may continue it, at most.
    kind_chars: characters of an excerpt whose kind is asked, at most.
    pair_chars: characters of each of two passages, at most.
    seed: of all rows.
  """

  num_rows: PositiveInt = 200
  num_train: PositiveInt = 2000
  num_kinds: at_least(2) = 5
  num_options: at_least(2) = 4
  context_chars: at_least(16) = 200
  option_chars: at_least(16) = 80
  kind_chars: at_least(16) = 120
  pair_chars: at_least(16) = 64
  seed: Seed = 0


def run(
  context: pipeline.StageContext, documents: Sequence[Document], config: Tasks
) -> None:
  """Writes the tasks, for `read`."""
  for name, task in tasks(documents, config).items():
    folder = context.directory / name
    folder.mkdir(exist_ok=True)
    write_task(folder, task)
    context.log(f"{name}: {len(task.rows)} rows, {len(task.train)} to learn from")


def read(folder: Path, name: str) -> Task:
  """A task that the stage in a folder wrote."""
  return read_task(Path(folder) / name)


def tasks(documents: Sequence[Document], config: Tasks) -> dict[str, Task]:
  """The three tasks, by name; rows to train on and to evaluate on are of different documents.

  Args:
    documents: that no model was trained on.

  Raises:
    ValueError: for too few documents of sufficient length.
  """
  ordered = sorted(documents, key=lambda document: (order_key(document.id, config.seed),
                                                    document.id))
  parts = ordered[::2], ordered[1::2]
  seeds = tuple(_SEEDS * config.seed + i for i in range(_SEEDS))

  def rows(make, num, part) -> tuple[Example, ...]:
    return tuple(make(parts[part], config, seeds[part], index) for index in range(num))

  kinds = _kinds(parts, config.num_kinds)
  of_kinds = functools.partial(file_kind, kinds=kinds)
  return {
    NEXT_PASSAGE: Task(NEXT_PASSAGE, rows(next_passage, config.num_rows, 0)),
    FILE_KIND: Task(
      FILE_KIND, rows(of_kinds, config.num_rows, 0), rows(of_kinds, config.num_train, 1),
      tuple(map(_word, kinds))),
    SAME_DOCUMENT: Task(
      SAME_DOCUMENT, rows(same_document, config.num_rows, 0),
      rows(same_document, config.num_train, 1), SAME_WORDS),
  }


def _kinds(parts: Sequence[Sequence[Document]], num: int) -> list[str]:
  """The kinds with the most documents in the part that has the fewest of them, by name."""
  counts = [collections.Counter(one.kind for one in part) for part in parts]
  found = sorted(
    set(counts[0]) & set(counts[1]), key=lambda kind: (-min(of[kind] for of in counts), kind))
  if len(found) < num:
    raise ValueError(
      f"the unseen documents are of {len(found)} kinds ({', '.join(found)}) and metalm.Tasks."
      f"num_kinds={num}; give text of more kinds or ask for fewer."
    )
  return sorted(found[:num])


def _word(kind: str) -> str:
  return WORDS.get(kind, kind)


def with_words(task: Task, words: Sequence[str]) -> Task:
  """A task whose rows have other label words."""
  options = tuple(f" {word}" for word in words)
  return dataclasses.replace(task, words=tuple(words), **{
    part: tuple(row._replace(options=options) for row in getattr(task, part))
    for part in ("rows", "train")})


def next_passage(
  documents: Sequence[Document], config: Tasks, seed: int, index: int
) -> Example:
  """A passage as it stands in its document, and what may follow: the true passage among others.

  The wrong ones are of other documents of its kind, if there are enough of these.

  Raises:
    ValueError: if too few documents are long enough.
  """
  draws = np.random.default_rng((seed, index, 0))
  size = config.context_chars + config.option_chars
  usable = _longer_than(documents, 2 * size, config.num_options, NEXT_PASSAGE)

  def made() -> Example | None:
    own = usable[draws.integers(len(usable))]
    alike = [one for one in usable if one.kind == own.kind and one is not own]
    if len(alike) < config.num_options - 1:
      alike = [one for one in usable if one is not own]
    others = [alike[i] for i in draws.permutation(len(alike))[: config.num_options - 1]]
    start = _after_blank(own.text, int(draws.integers(len(own.text) - size)))
    middle = _last_blank(own.text, start + config.context_chars)
    context = own.text[start:middle]
    options = [_option(own.text, middle, config.option_chars), *(
      _option(one.text, _last_blank(one.text, int(draws.integers(size, len(one.text)))),
              config.option_chars) for one in others)]
    order = draws.permutation(config.num_options)
    if not context.strip() or not all(map(str.strip, options)) or len(
        set(map(str.strip, options))) < len(options):
      return None
    label = int(np.flatnonzero(order == 0)[0])
    return Example(index, context, tuple(options[i] for i in order), label)

  return _first(made, NEXT_PASSAGE)


def file_kind(
  documents: Sequence[Document], config: Tasks, seed: int, index: int, *, kinds: Sequence[str]
) -> Example:
  """An excerpt in one line, whose kind is asked; rows have the kinds in turn.

  Args:
    kinds: those that are told apart, each of some document.

  Raises:
    ValueError: if all excerpts are blank.
  """
  draws = np.random.default_rng((seed, index, 2))
  label = index % len(kinds)
  usable = [document for document in documents if document.kind == kinds[label]]

  def made() -> Example | None:
    text = _line(usable[draws.integers(len(usable))].text, draws, config.kind_chars)
    if not text:
      return None
    return Example(
      index, TEMPLATES["fs"][0].format(text=text), tuple(f" {_word(kind)}" for kind in kinds),
      label)

  return _first(made, FILE_KIND)


def same_document(
  documents: Sequence[Document], config: Tasks, seed: int, index: int
) -> Example:
  """Two passages without line ends; rows of odd index have both from one document.

  The others have two of different kinds, if there are.

  Raises:
    ValueError: if too few documents are long enough.
  """
  draws = np.random.default_rng((seed, index, 1))
  size = config.pair_chars
  usable = _longer_than(documents, 6 * size, 2, SAME_DOCUMENT)
  label = index % 2

  def made() -> Example | None:
    first = usable[draws.integers(len(usable))]
    if label:  # from the two halves, so that they do not overlap
      half = len(first.text) // 2
      texts = [first.text[:half], first.text[half:]]
    else:
      others = [one for one in usable if one.kind != first.kind] or [
        one for one in usable if one is not first]
      texts = [first.text, others[draws.integers(len(others))].text]
    texts = [texts[i] for i in draws.permutation(2)]
    shown = [_line(text, draws, size) for text in texts]
    if not all(shown):
      return None
    return Example(
      index, _SAME_TEMPLATE.format(first=shown[0], second=shown[1]),
      tuple(f" {word}" for word in SAME_WORDS), label)

  return _first(made, SAME_DOCUMENT)


def _line(text: str, draws: np.random.Generator, size: int) -> str:
  """A passage of a text in one line."""
  start = _after_blank(text, int(draws.integers(max(len(text) - 2 * size, 1))))
  line = " ".join(text[start : start + 4 * size].split())
  return line if len(line) <= size else line[: _last_blank(line, size)]


def _option(text: str, start: int, size: int) -> str:
  """From a blank on, up to another one."""
  return text[start : _last_blank(text, start + size)]


def _after_blank(text: str, start: int) -> int:
  """The first place from `start` on that follows white space, or `start`."""
  for place in range(max(start, 1), len(text)):
    if text[place - 1].isspace():
      return place
  return start


def _last_blank(text: str, end: int) -> int:
  """The last place up to `end` where white space stands, or `end` if there is none near it."""
  for place in range(min(end, len(text) - 1), max(end - 40, 0), -1):
    if text[place].isspace():
      return place
  return end


def _longer_than(documents, size: int, least: int, task: str) -> list[Document]:
  usable = [document for document in documents if len(document.text) > size]
  if len(usable) < least:
    raise ValueError(
      f"{len(usable)} of {len(documents)} unseen documents are longer than {size} characters, and "
      f"the task {task} needs {least}; raise metalm.Texts.validation_fraction or validation_bytes, "
      "or ask for shorter passages."
    )
  return usable


def _first(made: Callable[[], Example | None], task: str, most: int = 100) -> Example:
  """The first row that can be used; each attempt draws anew."""
  for _ in range(most):
    row = made()
    if row is not None:
      return row
  raise ValueError(
    f"{most} draws gave no row of the task {task}: passages are blank or equal; give other text.")
