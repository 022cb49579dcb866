"""Rows that name their pictures: Raven's matrices, and JSON lines of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.multimodal import IMAGE
from lmops_jax.data.tasks.picture_prompts import YES, matrix_prompt
from lmops_jax.data.tasks.pictures.source import Source
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import printable


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
  """JSON lines with `images`, `prompt` and `answers`, or `options` and `label` (from 0).

  The prompt holds `<image>` for each picture; with none in it, a single picture stands in front.
  An option follows the prompt after a blank. `answer` is a single one of `answers`.
  """
  path = source.folder
  for number, row in jsonl_rows(path):
    where = f"{printable(path)}:{number}"
    pictures, prompt = _paths(row, "images", where), row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError(f"{where} has the prompt {prompt!r}; expected a text.")
    if IMAGE not in prompt and len(pictures) == 1:
      prompt = f"{IMAGE} {prompt}"
    if prompt.count(IMAGE) != len(pictures):
      raise ValueError(
        f"{where} has {prompt.count(IMAGE)} {IMAGE} in its prompt and {len(pictures)} images; "
        "write one for each."
      )
    if "options" in row:
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
