"""Prompts for an image model, and pairs of a plain one and the engineered one it should become.

What a policy reads is the user's text and the anchor (Promptist, arXiv 2212.09611): the anchor is a
part of the format that it has learned, so no prompt may hold one. Prompts come from any corpus of
`data`: a line each (`TextLines`), JSON lines, Parquet, tfds. Pairs come from JSON lines, Parquet
and tfds with a field for each side, or are made from engineered prompts (`prompt_parts`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lmops_jax.config.setting_types import Text, component
from lmops_jax.data import files, matching
from lmops_jax.data.documents import Corpus, document_id
from lmops_jax.data.lines import ENDINGS, is_text, object_of, text_lines
from lmops_jax.data.named_datasets import Tfds, as_text, feature_at
from lmops_jax.host.foreign_files import printable
from lmops_jax.host.hashing import digest, order_key
from lmops_jax.host.words import shortened

ANCHOR = " Rephrase:"
_ROWS = 1024  # of a table, read together
_SHOWN = 60  # characters of a prompt in a message
Row = tuple[str, str, Callable[[], Mapping[str, Any]]]  # name and number, place, reader


class Prompt(NamedTuple):
  """A user's prompt.

  Attributes:
    id: from file and line, or as the corpus gives it.
    text: stripped, without anchor, not empty.
    where: file and line.
  """

  id: int
  text: str
  where: str


class Pair(NamedTuple):
  """A prompt and what it should become.

  Attributes:
    id: from file and line.
    prompt: plain, stripped.
    completion: engineered, stripped.
    kind: how the plain one was made, such as "MC"; "" if unknown.
    where: file and line.
  """

  id: int
  prompt: str
  completion: str
  kind: str
  where: str


@runtime_checkable
class PairSource(Protocol):
  """Where pairs come from."""

  def pairs(self, counts: Counter[str]) -> Iterator[Pair]:
    """The usable pairs; `counts` gets those that are left out, by reason."""

  def fingerprint(self) -> str:
    """Changes when the pairs may; reads no text."""


def checked_prompt(text: Any, where: str) -> str:
  """A prompt, stripped.

  Args:
    text: anything.
    where: begins the error: file and line, or "prompt 3".

  Raises:
    ValueError: not a text, an empty one, or one with NUL, half a character, or the anchor.
  """
  if not isinstance(text, str):
    raise ValueError(f"{where} is a {type(text).__name__}, not a text.")
  if not text.strip():
    raise ValueError(f"{where} is empty; give it some text, or leave it out.")
  if "\0" in text:
    raise ValueError(f"{where} holds a NUL character, which no text has; repair it.")
  if not is_text(text):
    raise ValueError(f"{where} holds half a character, which is no text; write it in UTF-8.")
  if ANCHOR in f" {text}":
    raise ValueError(
      f"{where} holds the words {ANCHOR.strip()!r}, which end a prompt; take them out.")
  return text.strip()


def asked(prompt: str) -> str:
  """What the policy continues: the stripped prompt and the anchor, nothing behind it."""
  return prompt.strip() + ANCHOR


def as_row(pair: Pair) -> dict[str, str]:
  """A row to learn from as `data.supervised` takes it: the loss is on the completion only."""
  return {"prompt": asked(pair.prompt), "completion": f" {pair.completion}"}


def read_prompts(
  corpus: Corpus, counts: Counter[str] | None = None, strict: bool = True
) -> list[Prompt]:
  """The prompts of a corpus in the order of a hash of their ids, each text once.

  Args:
    corpus: its texts are prompts.
    counts: gets "duplicate" and, unless strict, "unusable" ones, beside what the corpus counts.
    strict: refuse an unusable prompt instead of leaving it out.

  Raises:
    ValueError: no prompt, or, if strict, an unusable one, by file and line.
  """
  counts = Counter() if counts is None else counts
  seen: dict[str, Prompt] = {}
  for document in corpus.documents(counts):
    try:
      text = checked_prompt(document.text, document.source)
    except ValueError:
      if strict:
        raise
      counts["unusable"] += 1
      continue
    if text in seen:
      counts["duplicate"] += 1
    else:
      seen[text] = Prompt(document.id, text, document.source)
  if not seen:
    raise ValueError(f"the corpus {corpus} holds no usable prompt; {_told(counts)}.")
  return list(seen.values())


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Pairs of rows with two fields."""

  def rows(self, counts: Counter[str]) -> Iterator[Row]:
    raise NotImplementedError

  def pairs(self, counts: Counter[str]) -> Iterator[Pair]:
    """See `PairSource`; "same" are pairs of one text, "unusable" what is left out if not strict.

    Raises:
      ValueError: if strict, for a row without the fields or with an unusable prompt, by its line.
    """
    fields = (self.prompt_field, self.completion_field)
    for name, where, read in self.rows(counts):
      try:
        row = read()
        for field, parameter in zip(fields, ("prompt_field", "completion_field")):
          files.check_field(row, field, where, f"data.{type(self).__name__}.{parameter}")
        prompt, completion = (
          checked_prompt(row[field], f"{where}: field {field!r}") for field in fields)
      except ValueError:
        if self.strict:
          raise
        counts["unusable"] += 1
        continue
      if prompt == completion:
        counts["same"] += 1
        continue
      yield Pair(document_id(name), prompt, completion, self.kind, where)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class PairFiles(_Rows):
  """Pairs in JSON lines (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`) or Parquet files.

  Attributes:
    path: a file, a folder, or a pattern with `*` and `**`.
    prompt_field, completion_field: names of the fields or columns.
    kind: how the plain prompts were made, such as "RMC" or "RTP", for reports.
    strict: refuse a bad row; False leaves it out and counts it.
  """

  path: Text
  prompt_field: Text = "prompt"
  completion_field: Text = "completion"
  kind: str = ""
  strict: bool = True

  def fingerprint(self) -> str:
    return files.fingerprint(repr(self), self._found().files)

  def _found(self) -> matching.Found:
    return matching.matching(self.path, "data.PairFiles.path", (*ENDINGS, ".parquet"))

  def rows(self, counts):
    found = self._found()
    counts.update({reason: len(names) for reason, names in found.left_out.items()})
    for name, path in found.files:
      read = _parquet if path.suffix == ".parquet" else _jsonl
      for number, where, row in read(path, (self.prompt_field, self.completion_field), counts,
                                     self.strict):
        yield f"{name}:{number}", where, row


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TfdsPairs(_Rows):
  """Pairs in a tfds dataset.

  Attributes:
    dataset: its name and split; `text_field` and the others of its fields are not read.
    prompt_field, completion_field: features; `/` leads into nested ones.
    kind, strict: see `PairFiles`.
  """

  dataset: Tfds
  prompt_field: Text = "prompt"
  completion_field: Text = "completion"
  kind: str = ""
  strict: bool = True

  def fingerprint(self) -> str:
    return digest([repr(self), self.dataset.fingerprint()])

  def rows(self, counts):
    name = f"{self.dataset.builder.info.full_name}[{self.dataset.split}]"
    for number, example in enumerate(self.dataset.examples()):
      where = f"{name}:{number}"

      def read(example=example, where=where):
        return {
          field: as_text(
            feature_at(example, field, where, f"data.TfdsPairs.{parameter}"), Counter())
          for parameter, field in (("prompt_field", self.prompt_field),
                                   ("completion_field", self.completion_field))}

      yield where, where, read


def _jsonl(path: Path, fields: Sequence[str], counts: Counter[str], strict: bool):
  del fields
  for number, text in text_lines(path, None if strict else counts):
    where = f"{printable(path)}:{number}"
    yield number, where, lambda text=text, where=where: object_of(text, where)


def _parquet(path: Path, fields: Sequence[str], counts: Counter[str], strict: bool):
  del counts, strict
  import pyarrow
  import pyarrow.parquet

  shown, number = printable(path), 0
  try:
    with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
      columns = [name for name in dict.fromkeys(fields) if name in file.schema_arrow.names]
      for batch in file.iter_batches(_ROWS, columns=columns):
        for row in range(batch.num_rows):
          number += 1

          def read(batch=batch, row=row, where=f"{shown}:{number}"):
            try:
              return {name: batch.column(name)[row].as_py() for name in columns}
            except UnicodeDecodeError as error:
              raise ValueError(f"{where} is not UTF-8 text ({error.reason}).") from error

          yield number, f"{shown}:{number}", read
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"{shown} cannot be read as Parquet: {printable(error)}.") from error


def read_pairs(sources: Sequence[PairSource], counts: Counter[str] | None = None) -> list[Pair]:
  """The pairs of several sources, each pair of texts once, in the order of a hash of their ids.

  Args:
    counts: gets "duplicate" beside what the sources count.

  Raises:
    ValueError: no pair, two with one id, or what a source refuses.
  """
  counts = Counter() if counts is None else counts
  found: dict[tuple[str, str], Pair] = {}
  ids: dict[int, str] = {}
  for source in sources:
    for pair in source.pairs(counts):
      key = pair.prompt, pair.completion
      if key in found:
        counts["duplicate"] += 1
        continue
      if pair.id in ids:
        raise ValueError(
          f"the pairs of {ids[pair.id]} and {pair.where} have one id; give the files other names, "
          "or name each source once."
        )
      found[key], ids[pair.id] = pair, pair.where
  if not found:
    raise ValueError(f"there is no usable pair; {_told(counts)}.")
  return sorted(found.values(), key=lambda pair: order_key(pair.id))


def split_pairs(
  pairs: Iterable[Pair], fraction: float, seed: int, counts: Counter[str] | None = None
) -> tuple[list[Pair], list[Pair]]:
  """Pairs to learn from, and held-out ones that share neither side with those.

  All pairs of one completion fall on the same side. A held-out pair whose prompt is also learned
  (short main contents recur) is left out.

  Args:
    fraction: of the completions, drawn by (seed, hash of the text), 0 .. 1.
    counts: gets "shared".
  """
  counts = Counter() if counts is None else counts
  learned, held = [], []
  for pair in pairs:
    place = order_key(document_id(_same(pair.completion)), seed)
    (held if place < fraction * 2.0**64 else learned).append(pair)
  known = {_same(pair.prompt) for pair in learned} | {_same(pair.completion) for pair in learned}
  kept = [pair for pair in held if known.isdisjoint(map(_same, (pair.prompt, pair.completion)))]
  counts["shared"] += len(held) - len(kept)
  return learned, kept


def refuse_leakage(
  learned: Iterable[Pair | Prompt], held_out: Iterable[Pair | Prompt], name: str
) -> None:
  """Refuses held-out prompts that are also learned from, letter case and white space aside.

  Args:
    learned, held_out: prompts or pairs, of which both sides count.
    name: of the held-out set, for the error.

  Raises:
    ValueError: naming the first text and both of its places.
  """
  places = {_same(text): where for row in learned for text, where in _texts(row)}
  for row in held_out:
    for text, where in _texts(row):
      if _same(text) in places:
        raise ValueError(
          f"the held-out set {name} holds {shortened(text, _SHOWN)!r} ({where}), which is also "
          f"learned from ({places[_same(text)]}); leave it out of one of them."
        )


def _texts(row: Pair | Prompt) -> Iterator[tuple[str, str]]:
  fields = row._asdict()
  for name in ("text", "prompt", "completion"):
    if name in fields:
      yield fields[name], row.where


def _same(text: str) -> str:
  """What texts have in common that are the same prompt."""
  return " ".join(text.casefold().split())


def _told(counts: Counter[str]) -> str:
  return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()) if n) or "none is there"
