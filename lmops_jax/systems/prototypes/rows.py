"""Labelled texts: from files of one's own, or from the packages that are installed here."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lmops_jax.config.setting_types import (
  ExistingPath,
  Part,
  PositiveInt,
  Seed,
  Text,
  at_least,
  component,
)
from lmops_jax.data.documents import Corpus, document_id
from lmops_jax.data.files import Jsonl
from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.tasks.installed_kind import excerpt
from lmops_jax.host.foreign_files import printable
from lmops_jax.host.hashing import order_key, order_keys

ROWS_FILE = "rows.json"


class Labelled(NamedTuple):
  """Texts and what is to be told of them.

  Attributes:
    ids: stable numbers of the rows.
    texts: one for each row; an empty one is allowed.
    others: the second texts of pairs, or None.
    targets: class numbers from 0, or numbers.
    names: of the classes; () if targets are numbers.
  """

  ids: tuple[int, ...]
  texts: tuple[str, ...]
  others: tuple[str, ...] | None
  targets: tuple[float, ...]
  names: tuple[str, ...]

  @property
  def inputs(self) -> tuple:
    """The texts, or the pairs."""
    return self.texts if self.others is None else tuple(zip(self.texts, self.others))

  def taken(self, index: Sequence[int]) -> Labelled:
    """Some of the rows, in the order of `index`."""
    def of(values):
      return None if values is None else tuple(values[i] for i in index)
    return Labelled(*map(of, self[:4]), self.names)


@runtime_checkable
class Rows(Protocol):
  """A setting with a `name` that gives rows to learn from and rows to test on."""

  def read(self) -> tuple[Labelled, Labelled]:
    """Rows to learn from, and held-out ones."""

  def fingerprint(self) -> str:
    """Changes when the data do."""


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class LabelledFile:
  """Rows of JSON lines, each with a text and a label.

  Attributes:
    train: the file to learn from.
    test: the file to test on; None holds out a share of the first, by a hash of the text.
    test_share: that share.
    text, other, label: fields; `other` is the second text of a pair, None for single texts.
    numbers: whether labels are numbers to predict; else each different label is a class.
    num_test: most rows to test on, chosen by a hash; None is all.

  Raises:
    ValueError: when read, for a row without a field or with another kind of label (file and line
      are named), a label to test on that no row to learn from has, or fewer than two classes.
  """

  train: ExistingPath
  test: ExistingPath | None = None
  test_share: Part = 0.2
  text: Text = "text"
  other: Text | None = None
  label: Text = "label"
  numbers: bool = False
  num_test: PositiveInt | None = None

  @property
  def name(self) -> str:
    """The file's name, or its folder's if the file is called after a part."""
    path = Path(self.train)
    stem = path.name.split(".")[0]
    return printable(path.resolve().parent.name if stem in ("train", "all") else stem)

  def fingerprint(self) -> str:
    """See `Rows`."""
    return ", ".join(Jsonl(str(path)).fingerprint() for path in (self.train, self.test) if path)

  def read(self) -> tuple[Labelled, Labelled]:
    """See `Rows`."""
    found = list(self._rows(self.train))
    if self.test is None:
      held = [order_key(document_id(row[0]), 1) / 2**64 < self.test_share for row in found]
      train = [row for row, out in zip(found, held) if not out]
      test = [row for row, out in zip(found, held) if out]
    else:
      train, test = found, list(self._rows(self.test))
    names: list[Any] = [] if self.numbers else sorted({row[2] for row in train}, key=_by_kind)
    if not self.numbers and len(names) < 2:
      raise ValueError(
        f"{printable(self.train)} has {len(names)} different labels to learn from, and a "
        "classifier tells two or more apart; give rows of other classes."
      )
    for row in test:
      if not self.numbers and row[2] not in names:
        raise ValueError(
          f"{row[3]} has the label {row[2]!r}, which no row to learn from has; they have "
          f"{', '.join(map(repr, names[:8]))}."
        )
    if not test:
      raise ValueError(
        f"no row is left to test on: {printable(self.test or self.train)} has too few; give "
        "prototypes.LabelledFile.test, or a larger test_share."
      )
    if self.num_test is not None:
      test.sort(key=lambda row: order_key(row[4], 2))
      test = test[: self.num_test]
    number_of = {name: i for i, name in enumerate(names)}
    return tuple(
      Labelled(
        tuple(row[4] for row in rows), tuple(row[0] for row in rows),
        None if self.other is None else tuple(row[1] for row in rows),
        tuple(row[2] if self.numbers else number_of[row[2]] for row in rows),
        tuple(map(str, names)))
      for rows in (train, test))

  def _rows(self, path):
    for number, row in jsonl_rows(path):
      where = f"{printable(path)}:{number}"
      texts = [_text_of(row, field, where) for field in (self.text, self.other) if field]
      if self.label not in row:
        raise ValueError(
          f"{where} has no field {self.label!r}; it has {', '.join(row) or 'none'}: name the "
          "label's field with prototypes.LabelledFile.label."
        )
      label = row[self.label]
      is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
      if self.numbers and not (is_number and np.isfinite(label)):
        raise ValueError(f"{where} has the label {label!r}, and numbers=True wants finite numbers.")
      if not self.numbers and not isinstance(label, (str, int)):
        raise ValueError(
          f"{where} has the label {label!r}; a class is a text or a whole number, and numbers to "
          "predict need prototypes.LabelledFile.numbers=True."
        )
      # The id decides which rows are chosen, so that it must not depend on where the file lies.
      yield texts[0], texts[-1], label, where, document_id(f"{number}:{texts[0]}")


def _text_of(row, field, where):
  text = row.get(field)
  if not isinstance(text, str):
    raise ValueError(
      f"{where} has no text in the field {field!r}; it has {', '.join(row) or 'none'}: name the "
      "fields with prototypes.LabelledFile.text and .other."
    )
  return text


def _by_kind(label):
  return isinstance(label, str), label


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class InstalledPackages:
  """Which package an excerpt of the embedded corpus comes from, a task without any download.

  Attributes:
    corpus: documents whose sources begin with the package's folder, such as `data.InstalledText`.
    num_packages: classes, the packages with most documents.
    num_train, num_test: rows of each class; fewer if the smallest package has too few.
    num_chars: most characters of an excerpt.
    seed: which documents, by (seed, id).
  """

  corpus: Corpus
  num_packages: at_least(2) = 12
  num_train: PositiveInt = 100
  num_test: PositiveInt = 25
  num_chars: PositiveInt = 240
  seed: Seed = 0

  name = "package"

  def fingerprint(self) -> str:
    """See `Rows`."""
    return self.corpus.fingerprint()

  def read(self) -> tuple[Labelled, Labelled]:
    """See `Rows`.

    Raises:
      ValueError: if fewer packages than asked for have documents.
    """
    documents = list(self.corpus.documents(collections.Counter()))
    counts = collections.Counter(_package(document) for document in documents)
    names = sorted(sorted(counts, key=lambda p: (-counts[p], p))[: self.num_packages])
    if len(names) < self.num_packages:
      raise ValueError(
        f"prototypes.InstalledPackages.num_packages={self.num_packages} and the corpus has "
        f"documents of {len(names)}; ask for fewer."
      )
    documents.sort(key=lambda document: (order_key(document.id, self.seed), document.id))
    rows: dict[str, list] = {name: [] for name in names}
    wanted, seen = self.num_train + self.num_test, set()
    for document in documents:
      of_class = rows.get(_package(document))
      text = "" if of_class is None else excerpt(document.text, self.num_chars)
      if text and text not in seen and len(of_class) < wanted:  # licences repeat each other
        seen.add(text)
        of_class.append((document.id, text))
    each = min(map(len, rows.values()))
    num_test = min(self.num_test, max(1, each * self.num_test // wanted))
    parts = []
    for first, last in ((num_test, each), (0, num_test)):
      chosen = [(*rows[name][i], label) for i in range(first, last)
                for label, name in enumerate(names)]
      ids, texts, labels = zip(*chosen)
      parts.append(Labelled(ids, texts, None, labels, tuple(names)))
    return tuple(parts)


def _package(document) -> str:
  return document.source.split("/")[0].split("#")[0]


@component("choose", module="prototypes")
def chosen(
  installed: Rows, train: ExistingPath | None = None, test: ExistingPath | None = None,
  text: Text = "text", other: Text | None = None, label: Text = "label", numbers: bool = False,
  num_test: PositiveInt | None = None,
) -> Rows:
  """Rows of a file, see `LabelledFile`; `installed` if none is given."""
  if train is None:
    return installed
  return LabelledFile(
    train, test, text=text, other=other, label=label, numbers=numbers, num_test=num_test)


def nested_order(
  targets: Sequence[float], ids: Sequence[int], seed: int, classes: bool
) -> np.ndarray:
  """An order of rows whose every beginning has the classes in proportion, `[N] int64`.

  Rows of a class are ordered by (seed, id) and spread evenly, so that a larger subset holds the
  smaller ones.

  Args:
    classes: False orders by (seed, id) alone, for targets that are numbers.
  """
  keys = order_keys(np.asarray(ids), seed)
  by_key = np.argsort(keys, kind="stable")
  if not classes:
    return by_key
  targets = np.asarray(targets)
  place = np.empty(len(keys))
  for label in np.unique(targets):
    own = by_key[targets[by_key] == label]
    place[own] = (np.arange(len(own)) + 0.5) / len(own)
  return by_key[np.argsort(place[by_key], kind="stable")]


def write_rows(folder: Path, train: Labelled, test: Labelled) -> None:
  """Writes both into a folder, for `read_rows`."""
  text = json.dumps({"train": train._asdict(), "test": test._asdict()}, ensure_ascii=False)
  (folder / ROWS_FILE).write_text(text + "\n", encoding="utf-8")


def read_rows(folder: Path) -> tuple[Labelled, Labelled]:
  """What `write_rows` wrote: rows to learn from, and held-out ones."""
  found = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))
  return tuple(
    Labelled(*(None if value is None else tuple(value) for value in found[part].values()))
    for part in ("train", "test"))
