"""The prompts of `lmops generate`: texts and pictures, from the command line and from files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmops_jax.host import foreign_files
from lmops_jax.host.words import shortened

if TYPE_CHECKING:
  from lmops_jax.data.multimodal import Part, Picture

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BOX_UNITS = ("fractions", "pixels", "cells")


class PromptRow(NamedTuple):
  """One prompt as it was given.

  Attributes:
    text: with `<image>` where each picture goes; a single one without a place stands in front.
    pictures: in order.
    boxes: for each phrase of the text nothing, a box, or several, see `data.boxes.insert`; None
      for none at all.
    box_unit: one of `BOX_UNITS`, None without boxes.
    where: names the boxes in errors.
  """

  text: str
  pictures: tuple[Picture, ...] = ()
  boxes: list[Any] | None = None
  box_unit: str | None = None
  where: str = ""


def given(
  prompts: Sequence[str], images: Sequence[str], file: str | None, boxes: Sequence[str] = (),
  box_unit: str | None = None,
) -> list[PromptRow]:
  """The prompts that the command line gives, then those of a file.

  Args:
    prompts: texts.
    images: paths of pictures, which go with each of these texts.
    file: see `rows_of`.
    boxes: see `_boxes_of`; for the phrases of each of these texts.
    box_unit: of these boxes.

  Raises:
    ValueError: no prompt, a picture that is not there, half a character in a text, or boxes without
      prompt or unit.
  """
  if images and not prompts:
    raise ValueError(
      '--image belongs to --prompt TEXT; in --prompts FILE each row names its own as "images".'
    )
  pictures = _pictures(list(images), Path(), "--image") if images else ()
  if boxes and not prompts:
    raise ValueError('--box belongs to --prompt TEXT; in --prompts FILE each row has its "boxes".')
  if bool(boxes) != (box_unit is not None):
    raise ValueError(
      "--box and --box-unit belong together; give both, the unit being one of "
      f"{', '.join(BOX_UNITS)}."
    )
  found = _boxes_of(boxes) if boxes else None
  rows = [PromptRow(text, pictures, found, box_unit, "--box") for text in prompts]
  if file:
    rows += rows_of(Path(file).expanduser())
  if not rows:
    raise ValueError("there is nothing to continue; give --prompt TEXT or --prompts FILE.")
  for i, row in enumerate(rows):
    try:
      row.text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"prompt {i} holds {row.text[error.start]!r}, half a character or a byte that is no UTF-8; "
        "write the text in UTF-8."
      ) from error
  return rows


def rows_of(path: Path) -> list[PromptRow]:
  """The lines of a file, or, of JSON lines, "prompt", "images", "boxes" and "box_unit".

  Raises:
    ValueError: a file that cannot be read, a row of another form, or a picture that is not there.
  """
  from lmops_jax.data.lines import jsonl_rows

  if not path.name.endswith(JSONL):
    # Not `splitlines`, which also ends a line at separators within a text, such as U+2028.
    lines = io.StringIO(foreign_files.read_text(path), newline=None)
    return [PromptRow(line.removesuffix("\n")) for line in lines]
  rows = []
  for number, row in jsonl_rows(path):
    if not isinstance(row.get("prompt"), str):
      raise ValueError(
        f'{path}:{number} should be a JSON object with a text in its field "prompt", such as '
        '{"prompt": "The capital of"}.'
      )
    images = row.get("images")
    pictures = () if images is None else _pictures(images, path.parent, f"{path}:{number}")
    boxes, unit = row.get("boxes"), row.get("box_unit")
    if (boxes is None) != (unit is None) or unit not in (None, *BOX_UNITS) or (
      boxes is not None and not isinstance(boxes, list)
    ):
      raise ValueError(
        f'{path}:{number} has "boxes" {shortened(repr(boxes), 60)} and "box_unit" {unit!r}; give '
        f"both, a list with an entry for each phrase and one of {', '.join(BOX_UNITS)}."
      )
    rows.append(PromptRow(row["prompt"], pictures, boxes, unit, f"{path}:{number}: boxes"))
  return rows


def _boxes_of(texts: Sequence[str]) -> list[list[list[float]] | None]:
  """Boxes of phrases from texts such as "0.1,0.2,0.5,0.6", several by semicolons, or "none"."""
  return [None if text == "none" else [
    [_number(part, text) for part in box.split(",")] for box in text.split(";")] for text in texts]


def _number(part: str, text: str) -> float:
  try:
    return int(part) if part.strip().lstrip("-").isdigit() else float(part)
  except ValueError:
    raise ValueError(
      f"--box {text}: {part!r} is no number; write x1,y1,x2,y2, several boxes of one phrase with "
      "semicolons between them, or none."
    ) from None


def _pictures(entries, folder: Path, where: str) -> tuple[Picture, ...]:
  from lmops_jax.data.multimodal import picture_beside

  picture_of = picture_beside(folder)
  return tuple(picture_of(x, where) for x in (entries if isinstance(entries, list) else [entries]))


def parts(rows: Sequence[PromptRow]) -> list[tuple[Part, ...] | None]:
  """The texts and pictures of each prompt in order; None for one that has no picture.

  Raises:
    ValueError: other than a place for each picture, by the number of the prompt.
  """
  from lmops_jax.data.multimodal import parts_of

  found = [parts_of(row.text, row.pictures, f"prompt {i}")[0] for i, row in enumerate(rows)]
  return [own if row.pictures else None for row, own in zip(rows, found)]
