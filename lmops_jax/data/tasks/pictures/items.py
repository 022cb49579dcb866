"""Rows that name their pictures: Raven's matrices, and JSON lines of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.data import phrase_boxes
from lmops_jax.data.boxes import Box
from lmops_jax.data.images import upright_size
from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.multimodal import IMAGE
from lmops_jax.data.tasks.picture_prompts import EXPRESSION, QUESTION, YES, matrix_prompt
from lmops_jax.data.tasks.pictures.source import Source, fields_of
from lmops_jax.data.tasks.pictures.truths import as_words
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import printable, read_bytes
from lmops_jax.host.words import shortened

_UNITS = ("fractions", "pixels")
# Prompts that are made of a field, without the picture in front.
_ASKED = {
  "question": QUESTION.removeprefix(f"{IMAGE} "), "phrase": EXPRESSION.removeprefix(IMAGE)}


def raven(source: Source) -> Iterator[Example | None]:
  """JSON lines with `context` (3, 4 or 8 paths), `candidates` (paths) and `answer`, from 0."""
  path = source.file(f"{source.split}.jsonl", "items.jsonl")
  for number, row in jsonl_rows(path):
    where = f"{printable(path)}:{number}"
    context, candidates = (_paths(row, name, where) for name in ("context", "candidates"))
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not (
        0 <= answer < len(candidates)):
      raise ValueError(
        f"{where} has the answer {answer!r}; expected the number of one of its {len(candidates)} "
        "candidates, from 0."
      )
    try:
      prompt = matrix_prompt(len(context))
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
    yield source.example(str(number), prompt, context, options=[YES] * len(candidates),
                         label=answer, option_pictures=candidates)


def own_rows(source: Source) -> Iterator[Example | None]:
  """JSON lines with `images`, a prompt, and `answers`, or `options` and `label` (from 0), or boxes.

  The prompt is `prompt`, or it is made of a `question` or of a `phrase` to be located. It holds
  `<image>` for each picture; with none in it, a single picture stands in front. An option follows
  the prompt after a blank. `answer` is a single one of `answers`.

  `target` is where the phrase is that the prompt ends with, a box or several, (x1, y1, x2, y2) in
  the last picture in front of it; `boxes` has an entry for each phrase of the prompt, null for the
  one to be located. `box_unit` says what the numbers of both are, "fractions" of the picture or
  "pixels". A row with an empty `target` is left out.
  """
  path = source.folder
  for number, row in jsonl_rows(path):
    where = f"{printable(path)}:{number}"
    pictures, prompt = _paths(row, "images", where), _prompt_of(row, where)
    if IMAGE not in prompt and len(pictures) == 1:
      prompt = f"{IMAGE} {prompt}"
    if prompt.count(IMAGE) != len(pictures):
      raise ValueError(
        f"{where} has {prompt.count(IMAGE)} {IMAGE} in its prompt and {len(pictures)} images; "
        "write one for each."
      )
    unit = _unit_of(row, where)
    size_of = functools.partial(_size_of, [source.pictures / path for path in pictures])
    located: dict[str, Any] = {}
    if "target" in row:
      truths = _target_of(row, prompt, unit, len(pictures), size_of, where)
      if not truths:
        yield None
        continue
      located = {"boxes": truths, "answers": [as_words(truths, source.grid())]}
    if row.get("boxes") is not None:
      prompt = phrase_boxes.with_boxes(
        prompt, row["boxes"], unit, len(pictures), size_of, source.grid(), f"{where}: boxes")
    if located:
      yield source.example(str(number), prompt, pictures, **located)
    elif "options" in row:
      options, label = _texts(row, "options", where), row.get("label")
      if isinstance(label, str) and label in options:
        label = options.index(label)
      if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(options):
        raise ValueError(
          f"{where} has the label {label!r}; expected one of its {len(options)} options or its "
          "number, from 0."
        )
      yield source.example(str(number), prompt, pictures, label=label,
                           options=[f" {option}" for option in options])
    else:
      name = "answers" if "answers" in row else "answer"
      yield source.example(str(number), prompt, pictures, answers=_texts(row, name, where))


def _prompt_of(row: dict[str, Any], where: str) -> str:
  """The prompt, or the one that asks a question or for a phrase."""
  given = [name for name in ("prompt", *_ASKED) if name in row] or ["prompt"]
  if len(given) > 1:
    raise ValueError(f"{where} has the fields {' and '.join(given)}; give one of them.")
  text = row.get(given[0])
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"{where} has the {given[0]} {text!r}; expected a text.")
  if given == ["phrase"] and "<" in text:
    raise ValueError(
      f'{where} has the phrase {text!r}; a "<" in it would begin a tag, so write it without, or '
      "give the whole prompt.")
  return fields_of(_ASKED[given[0]], **{given[0]: text.strip()}) if given[0] in _ASKED else text


def _unit_of(row: dict[str, Any], where: str) -> str | None:
  """The unit of a row's boxes, None without any."""
  named = [name for name in ("target", "boxes") if row.get(name) is not None]
  unit = row.get("box_unit")
  if (unit is None) != (not named) or unit not in (None, *_UNITS):
    raise ValueError(
      f'{where} has {" and ".join(named) or "no boxes"} and the box_unit {unit!r}; boxes need it, '
      f"one of {', '.join(_UNITS)}."
    )
  if not isinstance(row.get("boxes"), list | None):
    raise ValueError(
      f"{where} has the boxes {shortened(repr(row['boxes']), 60)}; expected a list with an entry "
      "for each phrase of the prompt."
    )
  return unit


def _target_of(
  row: dict[str, Any], prompt: str, unit: str | None, num_pictures: int,
  size_of: Callable[[int], phrase_boxes.Size], where: str,
) -> tuple[Box, ...]:
  """Where the phrase is that a prompt ends with."""
  unwanted = [name for name in ("answer", "answers", "options", "label") if name in row]
  if unwanted:
    raise ValueError(
      f"{where} has a target and {unwanted[0]}; the target is the answer, so leave {unwanted[0]} "
      "out.")
  phrase = phrase_boxes.LAST_PHRASE.search(prompt)
  if phrase is None:
    raise ValueError(
      f"{where} has a target, and its prompt {prompt[-60:]!r} does not end with <phrase>..."
      "</phrase>, so that nothing is asked to be located; let it end with the phrase."
    )
  last = (row.get("boxes") or [None])[-1]
  if last is not None:
    raise ValueError(
      f"{where} has a target, and boxes give the phrase that is to be located away; let the last "
      "of boxes be null.")
  place = f"{where}: target"

  def size() -> phrase_boxes.Size:
    return size_of(phrase_boxes.picture_in_front(
      prompt[: phrase.start()], prompt, num_pictures, place))

  return phrase_boxes.true_boxes(row["target"], unit, size, place)


def _size_of(pictures: Sequence[Path], number: int) -> phrase_boxes.Size:
  return upright_size(read_bytes(pictures[number]), str(pictures[number]))


def _texts(row: dict[str, Any], name: str, where: str) -> list[str]:
  value = row.get(name)
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
    raise ValueError(f"{where} has {value!r} in its field {name}; expected texts.")
  return values


def _paths(row: dict[str, Any], name: str, where: str) -> list[str]:
  value = row.get(name, [])
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
    raise ValueError(f"{where} has {value!r} in its field {name}; expected paths of pictures.")
  return values
