"""Captions to rows of GrIT (arXiv:2306.14824, section 3.1), in files that a run goes on with.

1. Phrases: what each caption names, one JSON line a caption: also the questions for a detector that
   runs elsewhere.
2. Rows: the detector's boxes for the phrases, those that count, and the referring expressions.

Both work through the files of their input one by one, here or on many machines (`Spread`), each in
parts of a fixed number of rows with a file of their own. No result depends on who does them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from lmops_jax.data.grit.detection import Detector, Question
from lmops_jax.data.grit.files import GritCorpus, GritExample, Piece, write_jsonl, write_shard
from lmops_jax.data.grit.phrases import Phrase, PhraseFinder
from lmops_jax.data.grit.records import GritRow
from lmops_jax.data.grit.rows import grounded_row, sizes
from lmops_jax.data.images import decode
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.host import seals
from lmops_jax.host.whole_files import json_text

FORMATS = ("jsonl", "tar")
_PHRASES, _ROWS = "phrases", "rows"


class Asked(NamedTuple):
  """An example with the phrases to find."""

  example: GritExample
  phrases: tuple[Phrase, ...]


class Spread(Protocol):
  """Calls functions for items, here or on other machines; `beam.Engine` is one."""

  def each(
    self, function: Callable[..., None], items: Iterable[Any], *, setup: Callable[[], Any]
  ) -> None:
    """Calls `function(setup(), item)` for every item, for what it writes."""


@dataclasses.dataclass(frozen=True)
class Here:
  """One item after another in this process; `told` is called after each."""

  told: Callable[[], Any] = lambda: None

  def each(self, function, items, *, setup):
    """See `Spread`."""
    made = setup()
    for item in items:
      function(made, item)
      self.told()


_HERE = Here()


def write_phrases(
  directory: Path, corpus: GritCorpus, finder: PhraseFinder, *, rows_per_file: int,
  spread: Spread = _HERE,
) -> LeftOut:
  """Writes the phrases of captions, as JSON lines in `phrases/`.

  Args:
    directory: of the files; those that a killed run has finished are kept.
    corpus: the captions; its files are done one by one.
    finder: finds the phrases.
    rows_per_file: captions that are parsed for a file.
    spread: what does the files.

  Returns:
    Counts of "captions", "phrases", and of what is left out: that of reading, "abstract" phrases,
    captions "without_phrase".
  """
  work = functools.partial(_phrases_of_piece, directory / _PHRASES, rows_per_file)
  return _each_piece(directory / _PHRASES, work, corpus, finder, spread)


def read_phrases(directory: Path, number: int, examples: Iterable[GritExample]) -> Iterator[Asked]:
  """The examples of a piece with phrases, in order.

  Args:
    directory: that of `write_phrases`.
    number: the piece's.
    examples: those of the piece.

  Raises:
    ValueError: if the examples are others.
  """
  examples = iter(examples)
  for path in sorted((directory / _PHRASES).glob(f"{number:06d}-*.jsonl")):
    with path.open(encoding="utf-8") as file:
      for line in file:
        asked = json.loads(line)
        example = next((e for e in examples if e.source == asked["source"]), None)
        if example is None or example.row.caption != asked["caption"]:
          raise ValueError(
            f"the caption of {asked['source']} is not the one whose phrases are in {path}: the "
            "captions changed meanwhile; run the stage of the phrases again."
          )
        yield Asked(example, tuple(Phrase(*place) for place in asked["places"]))


@dataclasses.dataclass(frozen=True)
class Rules:
  """How rows are made.

  Attributes:
    min_score, max_overlap: see `detection.selected`.
    form: "jsonl" names each picture by its path; "tar" holds it.
    rows_per_file: captions that are looked at for a file.
    batch_size: questions that the detector gets together.
    num_threads: number of threads that decode; no result depends on it.
  """

  min_score: float
  max_overlap: float
  form: Literal[FORMATS]
  rows_per_file: int
  batch_size: int
  num_threads: int = 8


def write_rows(
  directory: Path, corpus: GritCorpus, phrases: Path, detector: Detector, rules: Rules, *,
  spread: Spread = _HERE,
) -> LeftOut:
  """Writes rows of GrIT in `rows/`, as JSON lines or as tar shards with their pictures.

  Args:
    directory: of the files; those that a killed run has finished are kept.
    corpus: the captions; its files are done one by one.
    phrases: the folder that `write_phrases` wrote to.
    detector: finds the phrases.
    rules: how rows are made.
    spread: what does the files.

  Returns:
    Counts of "rows", "chunks" (noun chunks with boxes) and "chunk_boxes", "expressions",
    "expression_boxes" and "expression_words", and of what is left out: that of `rows.grounded_row`,
    "unreadable" pictures, captions that the detector has "not_looked_at", and those "without_box".

  Raises:
    ValueError: for a picture within a shard and "jsonl".
  """
  work = functools.partial(_rows_of_piece, directory / _ROWS, phrases, rules)
  return _each_piece(directory / _ROWS, work, corpus, detector, spread)


def _each_piece(
  directory: Path, work: Callable[..., None], corpus: GritCorpus, tool: Any,
  spread: Spread,
) -> LeftOut:
  """Calls `work(tool, (number, piece))` for each file of a corpus; the sum of what they counted."""
  counts, scratch = _counts_of(directory), _scratch_of(directory)
  for made in (directory, counts, scratch):
    made.mkdir(parents=True, exist_ok=True)
  spread.each(work, list(enumerate(corpus.pieces())), setup=functools.partial(_given, tool))
  shutil.rmtree(scratch)
  total = LeftOut()
  total.add_all(corpus.found().left_out)
  for path in sorted(counts.glob("*.json")):
    read = json.loads(path.read_text(encoding="utf-8"))
    total.merge(LeftOut(Counter(read["counts"]), read["named"]))
  return total


def _given(value: Any) -> Any:
  return value


def _phrases_of_piece(
  directory: Path, rows_per_file: int, finder: PhraseFinder, item: tuple[int, Piece]
) -> None:
  def write(path: Path, part: Sequence[GritExample], left_out: LeftOut) -> None:
    captions = [example.row.caption for example in part]
    with path.open("w", encoding="utf-8") as file:
      for example, (phrases, num_abstract) in zip(part, finder.phrases(captions)):
        left_out.counts.update({"captions": 1, "phrases": len(phrases)})
        if num_abstract:
          left_out.counts["abstract"] += num_abstract
        if phrases:
          file.write(json.dumps(_question(example, phrases)) + "\n")
        else:
          left_out.add("without_phrase", example.source)

  number, piece = item
  reading = LeftOut()
  _in_parts(directory, "jsonl", number, piece.examples(reading), rows_per_file, write)
  _write_counts(directory, f"{number:06d}", reading)


def _question(example: GritExample, phrases: Sequence[Phrase]) -> dict[str, Any]:
  """What a detector elsewhere needs to know, and what finds the example again."""
  picture, caption = example.picture, example.row.caption
  return {
    "id": example.id if example.row.id is None else example.row.id, "source": example.source,
    "caption": caption, "phrases": [caption[p.start : p.end] for p in phrases],
    "picture": [picture.path, picture.offset, picture.num_bytes],
    "places": list(map(list, phrases)),
  }


def _rows_of_piece(
  directory: Path, phrases: Path, rules: Rules, detector: Detector, item: tuple[int, Piece]
) -> None:
  def write(path: Path, part: Sequence[Asked], left_out: LeftOut) -> None:
    with ThreadPoolExecutor(rules.num_threads, "pictures") as pool:
      found = list(itertools.chain.from_iterable(
        _rows_of(batch, detector, rules, pool, left_out)
        for batch in batches(part, rules.batch_size)))
    for example in found:
      left_out.counts.update(sizes(example.row))
    if rules.form == "tar":
      write_shard(path, found)
    else:
      write_jsonl(path, map(_with_path, found))

  number, piece = item
  asked = read_phrases(phrases, number, piece.examples(LeftOut()))
  _in_parts(directory, rules.form, number, asked, rules.rows_per_file, write)


def _rows_of(
  batch: Sequence[Asked], detector: Detector, rules: Rules, pool: ThreadPoolExecutor,
  left_out: LeftOut,
) -> Iterator[GritExample]:
  """The examples of a batch of which boxes are left, with these."""
  readable = list(_readable(batch, pool, left_out))
  questions = [
    Question(example.id, example.row.caption,
             tuple(example.row.caption[p.start : p.end] for p in phrases), pixels)
    for (example, phrases), pixels in readable]
  answers = detector.detect(questions)
  if len(answers) != len(questions):
    raise ValueError(
      f"the detector gave {len(answers)} answers to {len(questions)} questions; it should give one "
      "to each."
    )
  for ((example, phrases), pixels), detections in zip(readable, answers):
    if detections is None:
      left_out.add("not_looked_at", example.source)
      continue
    row = grounded_row(
      example.row, phrases, detections, min_score=rules.min_score, max_overlap=rules.max_overlap,
      where=example.source, left_out=left_out)
    if row is None:
      left_out.add("without_box", example.source)
    else:
      size = {"width": pixels.shape[1], "height": pixels.shape[0]}
      yield example._replace(row=row._replace(others={**row.others, **size}))


def batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
  """Lists of `size` values, the last one perhaps shorter."""
  values = iter(values)
  return iter(lambda: list(itertools.islice(values, size)), [])


def _readable(
  batch: Sequence[Asked], pool: ThreadPoolExecutor, left_out: LeftOut
) -> Iterator[tuple[Asked, np.ndarray]]:
  """Those of which the picture can be read, and its pixels."""
  def pixels(asked: Asked) -> np.ndarray | str:
    try:
      picture = asked.example.picture
      return np.asarray(decode(picture.read(), picture.where))
    except ValueError as error:
      return str(error)

  for asked, found in zip(batch, pool.map(pixels, batch)):
    if isinstance(found, str):
      left_out.add("unreadable", found)
    else:
      yield asked, found


def _with_path(example: GritExample) -> GritRow:
  """The row with the path of its picture."""
  picture = example.picture
  if not picture.path or picture.num_bytes is not None:
    raise ValueError(
      f"the picture of {example.source} is no file of its own, and JSON lines name files; write "
      "the form 'tar', which holds the pictures."
    )
  return example.row._replace(others={**example.row.others, "image": picture.path})


def _in_parts(
  directory: Path, ending: str, piece: int, items: Iterable[Any], size: int,
  write: Callable[[Path, Sequence[Any], LeftOut], None],
) -> None:
  """Calls `write(path, items, left_out)` for each part of a piece that is not there as a whole."""
  for number, part in enumerate(batches(items, size)):
    name = f"{piece:06d}-{number:06d}"
    path, counts = directory / f"{name}.{ending}", _counts_of(directory) / f"{name}.json"
    if not seals.all_whole([[path, counts]])[0]:
      left_out = LeftOut()
      with seals.replacing_shared(path, _scratch_of(directory)) as partial:
        write(partial, part, left_out)
      _write_counts(directory, name, left_out)


def _counts_of(directory: Path) -> Path:
  """The folder of what was counted beside the folder of files."""
  return directory.with_name(f"{directory.name}_counts")


def _scratch_of(directory: Path) -> Path:
  """The folder of files while they are written; what a killed run leaves there is not read."""
  return directory.with_name(f"{directory.name}_scratch")


def _write_counts(directory: Path, name: str, found: LeftOut) -> None:
  path = _counts_of(directory) / f"{name}.json"
  with seals.replacing_shared(path, _scratch_of(directory)) as partial:
    partial.write_text(
      json_text({"counts": found.counts, "named": found.named}), encoding="utf-8")
