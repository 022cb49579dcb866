"""The prompts of `lmops generate`: texts and pictures, from the command line and from files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lmops_jax.host import foreign_files

if TYPE_CHECKING:
  from lmops_jax.data.multimodal import Part, Picture

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class PromptRow(NamedTuple):
  """One prompt as it was given.

  Attributes:
    text: with `<image>` where each picture goes; a single one without a place stands in front.
    pictures: in order.
  """

  text: str
  pictures: tuple[Picture, ...] = ()


def given(prompts: Sequence[str], images: Sequence[str], file: str | None) -> list[PromptRow]:
  """The prompts that the command line gives, then those of a file.

  Args:
    prompts: texts.
    images: paths of pictures, which go with each of these texts.
    file: see `rows_of`.

  Raises:
    ValueError: no prompt, a picture that is not there, or half a character in a text.
  """
  if images and not prompts:
    raise ValueError(
      '--image belongs to --prompt TEXT; in --prompts FILE each row names its own as "images".'
    )
  pictures = _pictures(list(images), Path(), "--image") if images else ()
  rows = [PromptRow(text, pictures) for text in prompts]
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
  """The lines of a file, or, of one of JSON lines, the fields "prompt" and "images".

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
    rows.append(PromptRow(row["prompt"], pictures))
  return rows


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
