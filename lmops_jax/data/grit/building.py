"""Captions to rows of GrIT (arXiv:2306.14824, section 3.1), in files that a run goes on with.

1. Phrases: what each caption names, one JSON line a caption: also the questions for a detector that
   runs elsewhere.
2. Rows: the detector's boxes for the phrases, those that count, and the referring expressions.

Both work through their input in parts of a fixed number of rows, each with a file of its own.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmops_jax.data.grit.detection import Detection, Detector, Question, selected
from lmops_jax.data.grit.files import GritExample, write_jsonl, write_shard
from lmops_jax.data.grit.phrases import Phrase, PhraseFinder
from lmops_jax.data.grit.records import GritRow, Region
from lmops_jax.data.grit.spans import outermost
from lmops_jax.data.images import decode
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.host.whole_files import replacing, write_json

FORMATS = ("jsonl", "tar")
_PHRASES, _ROWS, _COUNTS = "phrases", "rows", "counts"


class Asked(NamedTuple):
  """An example with the phrases to find."""

  example: GritExample
  phrases: tuple[Phrase, ...]


def grounded_row(
  row: GritRow, phrases: Sequence[Phrase], detections: Iterable[Detection], *, min_score: float,
  max_overlap: float, where: str, left_out: LeftOut,
) -> GritRow | None:
  """A caption with the boxes that count.

  Args:
    row: the caption. phrases: what was asked. detections: what was found.
    min_score, max_overlap, where, left_out: see `detection.selected`; expressions that lie in
      another one are counted as "inside".

  Returns:
    The row with noun chunks, surest first, and with the referring expressions that lie in no other
    one and have the boxes of their chunks; None if no box counts.
  """
  found = selected(
    detections, min_score=min_score, max_overlap=max_overlap, where=where, left_out=left_out)
  chunks, expressions = [], []
  for detection in found:
    phrase = phrases[detection.phrase]
    chunks.append(Region(phrase.start, phrase.end, detection.box, detection.score))
    expressions.append(Region(
      phrase.expression_start, phrase.expression_end, detection.box, detection.score))
  outer = outermost(expressions)
  if len(outer) < len(expressions):
    left_out.counts["inside"] += len(expressions) - len(outer)
  return row._replace(noun_chunks=tuple(chunks), ref_exps=tuple(outer)) if chunks else None


# --------------------------------------------------------------------------------------- in parts


def write_phrases(
  directory: Path, examples: Iterable[GritExample], finder: PhraseFinder, *, rows_per_file: int
) -> LeftOut:
  """Writes the phrases of captions, as JSON lines.

  Args:
    directory: of the files; those that a killed run has finished are kept.
    rows_per_file: captions that are parsed for a file.

  Returns:
    Counts of "captions", "phrases", and of what is left out: "abstract" phrases, captions
    "without_phrase".
  """
  def write(path: Path, part: Sequence[GritExample], left_out: LeftOut) -> None:
    captions = [example.row.caption for example in part]
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
      for example, (phrases, num_abstract) in zip(part, finder.phrases(captions)):
        left_out.counts.update({"captions": 1, "phrases": len(phrases)})
        if num_abstract:
          left_out.counts["abstract"] += num_abstract
        if phrases:
          file.write(json.dumps(_question(example, phrases)) + "\n")
        else:
          left_out.add("without_phrase", example.source)

  return _in_parts(directory / _PHRASES, "jsonl", examples, rows_per_file, write)


def _question(example: GritExample, phrases: Sequence[Phrase]) -> dict[str, Any]:
  """What a detector elsewhere needs to know, and what finds the example again."""
  picture, caption = example.picture, example.row.caption
  return {
    "id": example.id if example.row.id is None else example.row.id, "source": example.source,
    "caption": caption, "phrases": [caption[p.start : p.end] for p in phrases],
    "picture": [picture.path, picture.offset, picture.num_bytes],
    "places": list(map(list, phrases)),
  }


def read_phrases(directory: Path, examples: Iterable[GritExample]) -> Iterator[Asked]:
  """The examples with phrases, in order.

  Args:
    directory: that of `write_phrases`.
    examples: those that it was given, in the same order.

  Raises:
    ValueError: if the examples are others.
  """
  examples = iter(examples)
  for path in sorted((directory / _PHRASES).glob("*.jsonl")):
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


def write_rows(
  directory: Path, asked: Iterable[Asked], detector: Detector, *, min_score: float,
  max_overlap: float, form: Literal[FORMATS], rows_per_file: int, batch_size: int,
  num_threads: int = 8,
) -> LeftOut:
  """Writes rows of GrIT, as JSON lines or as tar shards with their pictures.

  Args:
    directory: of the files; those that a killed run has finished are kept.
    min_score, max_overlap: see `detection.selected`.
    form: "jsonl" names each picture by its path; "tar" holds it.
    rows_per_file: captions that are looked at for a file.
    batch_size: questions that the detector gets together.
    num_threads: number of threads that decode; no result depends on it.

  Returns:
    Counts of "rows", "chunks" (noun chunks with boxes) and "chunk_boxes", "expressions",
    "expression_boxes" and "expression_words", and of what is left out: that of `grounded_row`,
    "unreadable" pictures, captions that the detector has "not_looked_at", and those "without_box".

  Raises:
    ValueError: for a picture within a shard and "jsonl".
  """
  def write(path: Path, part: Sequence[Asked], left_out: LeftOut) -> None:
    with ThreadPoolExecutor(num_threads, "pictures") as pool:
      found = list(itertools.chain.from_iterable(
        rows_of(batch, pool, left_out) for batch in batches(part, batch_size)))
    for example in found:
      left_out.counts.update(_sizes(example.row))
    if form == "tar":
      write_shard(path, found)
    else:
      write_jsonl(path, map(_with_path, found))

  def rows_of(batch: Sequence[Asked], pool, left_out: LeftOut) -> Iterator[GritExample]:
    readable = list(_readable(batch, pool, left_out))
    questions = [
      Question(example.id, example.row.caption,
               tuple(example.row.caption[p.start : p.end] for p in phrases), pixels)
      for (example, phrases), pixels in readable]
    answers = detector.detect(questions)
    if len(answers) != len(questions):
      raise ValueError(
        f"the detector gave {len(answers)} answers to {len(questions)} questions; it should give "
        "one to each."
      )
    for ((example, phrases), pixels), detections in zip(readable, answers):
      if detections is None:
        left_out.add("not_looked_at", example.source)
        continue
      row = grounded_row(
        example.row, phrases, detections, min_score=min_score, max_overlap=max_overlap,
        where=example.source, left_out=left_out)
      if row is None:
        left_out.add("without_box", example.source)
      else:
        size = {"width": pixels.shape[1], "height": pixels.shape[0]}
        yield example._replace(row=row._replace(others={**row.others, **size}))

  return _in_parts(directory / _ROWS, form, asked, rows_per_file, write)


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


def _sizes(row: GritRow) -> dict[str, int]:
  expressions = {(region.start, region.end) for region in row.ref_exps}
  return {
    "rows": 1, "chunks": len({(r.start, r.end) for r in row.noun_chunks}),
    "chunk_boxes": len(row.noun_chunks), "expressions": len(expressions),
    "expression_boxes": len(row.ref_exps),
    "expression_words": sum(len(row.caption[a:b].split()) for a, b in expressions)}


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
  directory: Path, ending: str, items: Iterable[Any], size: int,
  write: Callable[[Path, Sequence[Any], LeftOut], None],
) -> LeftOut:
  """Calls `write(path, items, left_out)` for each part that lacks its counts; sums all counts."""
  folder = directory.with_name(f"{directory.name}_{_COUNTS}")
  for made in (directory, folder):
    made.mkdir(parents=True, exist_ok=True)
  total = LeftOut()
  for number, part in enumerate(batches(items, size)):
    counts = folder / f"{number:06d}.json"
    if not counts.exists():
      found = LeftOut()
      write(directory / f"{number:06d}.{ending}", part, found)
      write_json(counts, {"counts": found.counts, "named": found.named})
    read = json.loads(counts.read_text(encoding="utf-8"))
    total.merge(LeftOut(Counter(read["counts"]), read["named"]))
  return total
