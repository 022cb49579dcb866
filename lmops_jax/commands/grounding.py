"""Boxes of `lmops generate`: into the texts of prompts, and out of what a model wrote."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmops_jax.commands.outputs import check_writable
from lmops_jax.commands.prompts import BOX_UNITS, PromptRow

if TYPE_CHECKING:
  from lmops_jax.data.boxes import BoxTokens, Grounded
  from lmops_jax.data.multimodal import Picture

_PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def add_options(parser) -> None:
  """The options of `lmops generate` about boxes."""
  add = parser.add_argument
  add("--box", action="append", default=[], metavar="X1,Y1,X2,Y2", help="the boxes of a phrase of "
      "each --prompt, several with semicolons between them, or none; given once for each "
      "<phrase>...</phrase>, in order")
  add("--box-unit", choices=BOX_UNITS, help="what the numbers of --box are; cells are two a box")
  add("--boxes", metavar="FILE", help="write captions and what they locate as JSON")
  add("--draw", metavar="FILE", help="draw boxes and names on a prompt's last picture; of several "
      "texts each gets a file with its number")
  add("--grammar", action="store_true", help="let the model write well-formed boxes only")


@dataclasses.dataclass(frozen=True)
class BoxWords:
  """A tokenizer's words for boxes.

  Attributes:
    tokenizer: of `lmops_jax.text`.
    tokens: their ids.
    grid: the side of the grid.
  """

  tokenizer: Any
  tokens: BoxTokens
  grid: int


class Answer(NamedTuple):
  """What a model wrote, with the picture that its boxes are in.

  Attributes:
    prompt: as it was given.
    picture: the last one of the prompt; None if it has none.
    size: width and height of that picture in pixels.
    grounded: the caption and what it locates.
  """

  prompt: str
  picture: Picture | None
  size: tuple[int, int] | None
  grounded: Grounded

  def record(self) -> dict[str, Any]:
    """What is written as JSON: boxes as fractions, and as pixels of the picture."""
    found: dict[str, Any] = {"caption": self.grounded.text}
    if self.picture is not None:
      found |= {"image": self.picture.where, "width": self.size[0], "height": self.size[1]}
    found["entities"] = []
    for entity in self.grounded.entities:
      fields: dict[str, Any] = {**entity._asdict(), "boxes": [*map(list, entity.boxes)]}
      if self.size is not None:
        fields["pixels"] = [
          [side * value for side, value in zip((*self.size, *self.size), box)]
          for box in entity.boxes]
      found["entities"].append(fields)
    return found | {"num_malformed": self.grounded.num_malformed}

  def lines(self) -> list[str]:
    """The caption, and a line for each entity with its boxes in fractions."""
    width = max((len(entity.name) for entity in self.grounded.entities), default=0)
    return [self.grounded.text, *(
      f"  {entity.name:{width}}  " + "  ".join(
        f"({', '.join(f'{value:.3f}' for value in box)})" for box in entity.boxes)
      for entity in self.grounded.entities)]


def check(arguments, rows: Sequence[PromptRow]) -> None:
  """What can be told before a model is looked at; warns of prompts without `<grounding>`.

  Raises:
    ValueError: a file that cannot be written, nothing to draw on, or options that do not go
      together.
  """
  from lmops_jax.data.boxes import GROUNDING

  if arguments.grammar and arguments.count_padding:
    raise ValueError(
      "--count-padding repeats what the port writes for a whole batch, and --grammar lets prompts "
      "that end differently run apart; leave one of them out."
    )
  if arguments.boxes:
    check_writable("--boxes", arguments.boxes)
  if arguments.draw:
    if Path(arguments.draw).suffix.lower() not in _PICTURE_FORMATS:
      raise ValueError(
        f"--draw {arguments.draw} names no picture; let it end in one of "
        f"{', '.join(_PICTURE_FORMATS)}."
      )
    if not Path(arguments.draw).expanduser().parent.is_dir():
      raise ValueError(
        f"--draw {arguments.draw} lies in a folder that does not exist; make it first.")
    without = [i for i, row in enumerate(rows) if not row.pictures]
    if without:
      raise ValueError(f"--draw needs a picture, and prompt {without[0]} has none; give --image.")
  for i, row in enumerate(rows):
    if GROUNDING not in row.text and (row.boxes is not None or _is_located(arguments, row)):
      print(
        f"lmops: warning: prompt {i} has no {GROUNDING}, without which a model seldom writes "
        f'boxes; begin it with "{GROUNDING}" if it should.', file=sys.stderr)


def _asks_for_boxes(arguments) -> bool:
  return bool(arguments.boxes or arguments.draw or arguments.grammar)


def _is_located(arguments, row: PromptRow) -> bool:
  """Whether a prompt or an option is about boxes."""
  from lmops_jax.data.boxes import GROUNDING

  return _asks_for_boxes(arguments) or GROUNDING in row.text or "<phrase>" in row.text


def find(arguments, rows: Sequence[PromptRow], tokenizer) -> BoxWords | None:
  """The tokenizer's words for boxes; None where no prompt and no option is about boxes.

  Raises:
    ValueError: an option or a prompt's boxes need the words, and the tokenizer lacks them.
  """
  from lmops_jax.data.boxes import GROUNDING, box_tokens

  needed = _asks_for_boxes(arguments) or any(row.boxes is not None for row in rows)
  asked = tokenizer.token_id(GROUNDING) is not None and any(GROUNDING in row.text for row in rows)
  if not needed and not asked:
    return None
  return BoxWords(tokenizer, *box_tokens(tokenizer.token_id))


def sizes(pictures: Iterable[Picture]) -> dict[Picture, tuple[int, int]]:
  """Width and height of pictures, upright.

  Raises:
    ValueError: one that cannot be read or decoded.
  """
  from lmops_jax.data.images import decode

  return {picture: decode(picture.read(), picture.where).size for picture in set(pictures)}


def inserted(
  rows: Sequence[PromptRow], words: BoxWords, of: dict[Picture, tuple[int, int]]
) -> list[PromptRow]:
  """Prompts with their boxes behind their phrases.

  Args:
    of: of `sizes`, for pictures whose boxes are in pixels.

  Raises:
    ValueError: see `data.phrase_boxes.with_boxes`.
  """
  from lmops_jax.data.phrase_boxes import with_boxes

  found = []
  for i, row in enumerate(rows):
    if row.boxes is not None:
      where = f"{row.where} of prompt {i}" if row.where.startswith("--") else row.where
      text = with_boxes(
        row.text, row.boxes, row.box_unit, len(row.pictures),
        lambda number, row=row: of[row.pictures[number]], words.grid, where)
      row = row._replace(text=text, boxes=None)
    found.append(row)
  return found


def generate(
  arguments, generator, texts: Sequence, options, words: BoxWords | None, ids: Sequence,
  callback: Callable[[int, str], bool | None] | None = None,
) -> list:
  """The answers to all prompts, of well-formed boxes only if the command line says so.

  Args:
    generator, texts, options, callback: as in `Generator.generate`.
    words: of `find`.
    ids: of each prompt.
  """
  from lmops_jax.decoding import boxes

  how = dict(stop=arguments.stop, add_special=not arguments.chat, callback=callback)
  if not arguments.grammar:
    return generator.generate(texts, options, **how)
  return boxes.generate(generator, words.tokenizer, texts, ids, options, **how)


def read(
  words: BoxWords | None, rows: Sequence[PromptRow], ids: Sequence[Sequence[int]],
  answers: Sequence, arguments, sizes: dict[Picture, tuple[int, int]],
) -> list[Answer | None]:
  """What a prompt's text and its continuation say together, for each answer; None for one that is
  not about boxes.

  Args:
    words: of `find`.
    ids: of each prompt.
    answers: of `generate`.
    sizes: of `sizes`.
  """
  from lmops_jax.data.boxes import extract
  from lmops_jax.evaluation.grounding import with_tags

  if words is None:
    return [None] * len(answers)
  found, each = [], len(answers) // len(rows)
  for i, answer in enumerate(answers):
    row = rows[i // each]
    if not _is_located(arguments, row):
      found.append(None)
      continue
    whole = "".join(with_tags(words.tokenizer, ids[i // each], answer.ids, arguments.stop))
    picture = row.pictures[-1] if row.pictures else None
    found.append(Answer(row.text, picture, sizes.get(picture), extract(whole, words.grid)))
  return found


def write(arguments, answers: Sequence[Answer]) -> None:
  """The files of `--boxes` and `--draw`."""
  if arguments.boxes:
    records = [{"prompt": answer.prompt, **answer.record()} for answer in answers]
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    Path(arguments.boxes).expanduser().write_text(text, encoding="utf-8")
  if arguments.draw:
    from lmops_jax.data.images import decode
    from lmops_jax.reporting.drawn_boxes import draw

    path = Path(arguments.draw).expanduser()
    for i, answer in enumerate(answers):
      image = decode(answer.picture.read(), answer.picture.where)
      file = path if len(answers) == 1 else path.with_stem(f"{path.stem}-{i}")
      draw(image, [(e.name, e.boxes) for e in answer.grounded.entities]).save(file)
