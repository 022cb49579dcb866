"""Labelled texts with a template: rows, the words that stand for labels, and how they read.

A template is text with fields of the row in braces and ends with `{label}`:
"Review: {text}\\nSentiment: {label}". Rows come from JSON lines or from a tfds dataset; the named
tasks are also seqio tasks (`lmops_<name>`), with the template filled as `inputs` and `targets`.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax.data.documents import document_id
from lmops_jax.data.files import jsonl_rows
from lmops_jax.data.hashing import order_key

LABEL = "label"


class Row(NamedTuple):
  """One labelled example.

  Attributes:
    id: stable, from file and line or from dataset and row.
    fields: what the template may name, besides the label.
    label: index into the task's label words.
  """

  id: int
  fields: Mapping[str, str]
  label: int


@dataclasses.dataclass(frozen=True)
class Template:
  """How a row reads.

  Attributes:
    text: with fields in braces, `{label}` last; `{{` and `}}` are braces.

  Raises:
    ValueError: without label, with something after it, without any other field, or with a field
      that asks for formatting.
  """

  text: str

  def __post_init__(self):
    try:
      parts = list(string.Formatter().parse(self.text))
    except ValueError as error:
      raise ValueError(f"the template {self.text!r} has unpaired braces ({error}).") from error
    for _, name, spec, conversion in parts:
      if spec or conversion:
        raise ValueError(
          f"the template {self.text!r} formats its field {name!r}; fields are put in as they are, "
          f"so write {{{name}}}."
        )
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or names[-1] != LABEL or names.count(LABEL) > 1 or parts[-1][1] != LABEL:
      raise ValueError(
        f"the template {self.text!r} must end with {{label}}, once; write for example "
        "'Review: {text}\\nSentiment: {label}'."
      )
    if len(names) == 1:
      raise ValueError(
        f"the template {self.text!r} names no field of the row beside {{label}}; put the text's "
        "field in, for example {text}."
      )

  @property
  def fields(self) -> list[str]:
    """Names of the fields, without the label."""
    names = [name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None]
    return list(dict.fromkeys(name for name in names if name != LABEL))

  def context(self, fields: Mapping[str, str]) -> str:
    """The text in front of the label."""
    return self.text[: self.text.rindex("{" + LABEL + "}")].format(**fields)

  def filled(self, fields: Mapping[str, str], word: str) -> str:
    """The whole text."""
    return self.context(fields) + word


@dataclasses.dataclass(frozen=True)
class Task:
  """Rows to classify.

  Attributes:
    name: for reports.
    rows: all of them.
    words: what stands for each label, in the order of the labels' ids.
    template: how a row reads.
  """

  name: str
  rows: tuple[Row, ...]
  words: tuple[str, ...]
  template: Template

  def __post_init__(self):
    if len(set(self.words)) < 2 or len(set(self.words)) < len(self.words):
      raise ValueError(
        f"the labels {', '.join(map(repr, self.words))} must be at least two different words."
      )
    if not all(self.words):
      raise ValueError(
        f"the labels {', '.join(map(repr, self.words))} hold an empty word, which has no "
        "likelihood; give each label a word."
      )
    if not self.rows:
      raise ValueError(f"the task {self.name} has no rows.")


class Named(NamedTuple):
  """A dataset that tfds knows.

  Attributes:
    dataset: what `tfds.builder` takes.
    train, test: splits; of GLUE the labelled one.
    label_field: the feature with the class.
    words: for the classes in their order.
    template: how a row reads.
  """

  dataset: str
  train: str
  test: str
  label_field: str
  words: tuple[str, ...]
  template: str


NAMED = {
  "sst2": Named(
    "glue/sst2", "train", "validation", "label", ("negative", "positive"),
    "Review: {sentence}\nSentiment: {label}",
  ),
  "imdb": Named(
    "imdb_reviews", "train", "test", "label", ("negative", "positive"),
    "Review: {text}\nSentiment: {label}",
  ),
  "yelp": Named(
    "yelp_polarity_reviews", "train", "test", "label", ("negative", "positive"),
    "Review: {text}\nSentiment: {label}",
  ),
  "ag_news": Named(
    "ag_news_subset", "train", "test", "label", ("world", "sports", "business", "technology"),
    "Article: {title} {description}\nTopic: {label}",
  ),
  "trec": Named(
    "trec", "train", "test", "label-coarse",
    ("description", "entity", "abbreviation", "human", "number", "location"),
    "Question: {text}\nType: {label}",
  ),
  "cola": Named(
    "glue/cola", "train", "validation", "label", ("unacceptable", "acceptable"),
    "Sentence: {sentence}\nGrammar: {label}",
  ),
  "rte": Named(
    "glue/rte", "train", "validation", "label", ("true", "false"),
    "{sentence1}\nQuestion: {sentence2} True or false?\nAnswer: {label}",
  ),
  "boolq": Named(
    "super_glue/boolq", "train", "validation", "label", ("no", "yes"),
    "{passage}\nQuestion: {question}?\nAnswer: {label}",
  ),
}


def jsonl_task(
  path: Path | str, template: str, words: Sequence[str], limit: int | None = None
) -> Task:
  """A task from JSON lines with the template's fields and `label`, a number or one of the words.

  Args:
    path: of the file, plain, `.gz` or `.zst`.
    template: see `Template`.
    words: of the labels, in the order of their ids.
    limit: rows to take from the beginning.

  Raises:
    ValueError: naming file and line, for a row without one of the fields or with another label.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit} must be at least 1, or None for all rows.")
  shape, words, rows = Template(template), tuple(words), []
  for number, row in jsonl_rows(path):
    if limit is not None and len(rows) == limit:
      break
    where = f"{path}:{number}"
    for name in (*shape.fields, LABEL):
      if name not in row:
        raise ValueError(
          f"{where} has no field {name!r} (it has {', '.join(sorted(row)) or 'none'}); name one of "
          "them in the template."
        )
      if not isinstance(row[name], str | int | float):
        raise ValueError(
          f"{where} has {row[name]!r} in its field {name!r}; expected a text or a number."
        )
    rows.append(Row(
      document_id(f"{Path(path).name}:{number}"), {n: str(row[n]) for n in shape.fields},
      _label(row[LABEL], words, where),
    ))
  return Task(Path(path).stem, tuple(rows), words, shape)


def tfds_task(
  name: str, split: str = "test", data_dir: str | None = None, limit: int | None = None
) -> Task:
  """One of the `NAMED` tasks, read through tfds; it must be prepared in `data_dir`.

  Args:
    name: of the task.
    split: "train" or "test", the latter what the dataset has labels for.
    data_dir: where tfds keeps datasets; None is its own default.
    limit: rows to take from the beginning.

  Raises:
    ValueError: no such task, or its dataset is not there.
  """
  from lmops_jax.settings import nearest

  if name not in NAMED:
    raise ValueError(
      f"there is no task {name!r}{nearest(name, NAMED)} A task is one of {', '.join(NAMED)}, or a "
      "file of JSON lines with a template and labels."
    )
  import tensorflow_datasets as tfds

  named = NAMED[name]
  builder = tfds.builder(named.dataset, data_dir=data_dir)
  if not builder.is_prepared():
    raise ValueError(
      f"the tfds dataset {named.dataset!r} of task {name} is not prepared in {builder.data_dir}; "
      f"run python -m tensorflow_datasets.scripts.cli.main build {named.dataset} where there is a "
      "network, or give a file of JSON lines."
    )
  rows, shape = [], Template(named.template)
  part = named.train if split == "train" else named.test
  for number, example in enumerate(tfds.as_numpy(builder.as_dataset(split=part))):
    if limit is not None and number == limit:
      break
    fields = {f: example[f].decode("utf-8", "replace") for f in shape.fields}
    identifier = document_id(f"{named.dataset}[{part}]:{number}")
    rows.append(Row(identifier, fields, int(example[named.label_field])))
  return Task(name, tuple(rows), named.words, shape)


def register_seqio_tasks(data_dir: str | None = None) -> list[str]:
  """Registers `lmops_<name>` for each `NAMED` task with seqio and returns their names.

  Features are texts, `inputs` (the filled template up to the label) and `targets` (the word);
  a vocabulary is for the user's mixture to choose, so they pass through. Imports TensorFlow.
  """
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds

  added = []
  for name, named in NAMED.items():
    task = f"lmops_{name}"
    added.append(task)
    if task in seqio.TaskRegistry.names():
      continue
    shape = Template(named.template)

    def fill(example, named=named, shape=shape):
      before = shape.text[: shape.text.rindex("{" + LABEL + "}")]
      pieces = []
      for literal, field, _, _ in string.Formatter().parse(before):
        pieces.append(tf.constant(literal))
        if field is not None:
          pieces.append(example[field])
      words = tf.constant(named.words)
      label = tf.maximum(tf.cast(example[named.label_field], tf.int32), 0)
      return {"inputs": tf.strings.join(pieces), "targets": tf.gather(words, label)}

    def read(split, shuffle_files, seed=None, named=named):
      config = tfds.ReadConfig(shuffle_seed=seed)
      builder = tfds.builder(named.dataset, data_dir=data_dir)
      part = named.train if split == "train" else named.test
      return builder.as_dataset(split=part, shuffle_files=shuffle_files, read_config=config)

    seqio.TaskRegistry.add(
      task,
      source=seqio.FunctionDataSource(read, splits=("train", "test")),
      preprocessors=[seqio.map_over_dataset(fill)],
      output_features={
        feature: seqio.Feature(seqio.PassThroughVocabulary(size=1), add_eos=False, rank=0,
                               dtype=tf.string)
        for feature in ("inputs", "targets")
      },
    )
  return added


def demonstrations(rows: Sequence[Row], count: int, seed: int, balanced: bool = False) -> list[Row]:
  """`count` rows in an order, both by (seed, row id), so that they do not depend on others.

  Args:
    rows: to draw from.
    count: how many.
    seed: of the draw.
    balanced: as equal numbers of each label as `count` allows, labels in turn.

  Raises:
    ValueError: there are fewer rows (or, balanced, fewer of a label).
  """
  if count < 0:
    raise ValueError(f"{count} demonstrations are asked for; ask for 0 or more.")
  ordered = sorted(rows, key=lambda row: (order_key(row.id, seed), row.id))
  if count > len(ordered):
    raise ValueError(
      f"{count} demonstrations are asked for and there are {len(ordered)} rows to draw from; ask "
      "for fewer, or give a larger file with --train."
    )
  if not balanced:
    return ordered[:count]
  of_label: dict[int, list[Row]] = {}
  for row in ordered:
    of_label.setdefault(row.label, []).append(row)
  turns = sorted(of_label, key=lambda label: order_key(label, seed))
  chosen: list[Row] = []
  for turn in range(count):
    label = turns[turn % len(turns)]
    if not of_label[label]:
      raise ValueError(
        f"{count} balanced demonstrations need more rows of label {label} than there are; ask for "
        "fewer, or give a larger file with --train."
      )
    chosen.append(of_label[label].pop(0))
  return sorted(chosen, key=lambda row: (order_key(row.id, seed + 1), row.id))


def _label(value: Any, words: Sequence[str], where: str) -> int:
  if isinstance(value, bool):
    value = int(value)
  if isinstance(value, int) and 0 <= value < len(words):
    return value
  if isinstance(value, str) and value.strip() in words:
    return words.index(value.strip())
  raise ValueError(
    f"{where} has the label {value!r}; the labels are {', '.join(words)} or their numbers 0 to "
    f"{len(words) - 1}."
  )
