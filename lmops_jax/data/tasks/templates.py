"""Tasks from a file of JSON lines and a template of the user's own.

A template is text with fields of the row in braces and ends with `{label}`:
"Review: {text}\\nSentiment: {label}".
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.data.documents import document_id
from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.tasks.rows import NULL_FIELD
from lmops_jax.data.tasks.task import Example, Task
from lmops_jax.host.foreign_files import printable

LABEL = "label"


@dataclasses.dataclass(frozen=True)
class Template:
  """How a row reads.

  Attributes:
    text: text with fields in braces, `{label}` last; `{{` and `}}` are braces.

  Raises:
    ValueError: for a text without `{label}` at its end or without any other field, or a field that
      is no plain name or asks for formatting.
  """

  text: str

  def __post_init__(self):
    try:
      parts = list(string.Formatter().parse(self.text))
    except ValueError as error:
      raise ValueError(f"the template {self.text!r} has unpaired braces ({error}).") from error
    for _, name, spec, conversion in parts:
      if name is not None and (not name or name.isdigit() or "." in name or "[" in name):
        raise ValueError(
          f"the template {self.text!r} has {{{name}}}, which is no name of a field; write the "
          "name alone, for example {text}."
        )
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

  def prompt_and_options(
    self, fields: Mapping[str, str], words: Sequence[str]
  ) -> tuple[str, tuple[str, ...]]:
    """The text in front of the label, without the blanks at its end, and these before each word."""
    literal = self.text[: self.text.rindex("{" + LABEL + "}")]
    blanks = literal[len(literal.rstrip(" ")) :]
    prompt = literal[: len(literal) - len(blanks)].format(**fields)
    return prompt, tuple(blanks + word for word in words)


def jsonl_task(
  path: Path | str,
  template: str,
  words: Sequence[str],
  limit: int | None = None,
  train: Path | str | None = None,
) -> Task:
  """A task from JSON lines with the template's fields and `label`, a number or one of the words.

  Args:
    path: the file, plain, `.gz` or `.zst`.
    template: see `Template`; blanks in front of `{label}` become part of the options.
    words: the labels' words, in the order of their numbers.
    limit: rows to take from the beginning.
    train: file to draw demonstrations from; None: the rows themselves.

  Raises:
    ValueError: for a row without one of the fields or with another label; it names file and line.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit} must be at least 1, or None for all rows.")
  shape, words = Template(template), tuple(words)
  null_prompt, _ = shape.prompt_and_options(dict.fromkeys(shape.fields, NULL_FIELD), words)
  return Task(
    printable(Path(path).stem), _examples(path, shape, words, limit),
    () if train is None else _examples(train, shape, words, None), words, null_prompt,
  )


def _examples(path, shape: Template, words: tuple[str, ...], limit) -> tuple[Example, ...]:
  rows = []
  for number, row in jsonl_rows(path):
    if limit is not None and len(rows) == limit:
      break
    where = f"{printable(path)}:{number}"
    for name in (*shape.fields, LABEL):
      if name not in row:
        raise ValueError(
          f"{where} has no field {name!r} (it has {', '.join(sorted(row)) or 'none'}); name one of "
          "them in the template."
        )
      if not (isinstance(row[name], str) or isinstance(row[name], int | float)
              and math.isfinite(row[name])):
        raise ValueError(
          f"{where} has {row[name]!r} in its field {name!r}; expected a text or a number."
        )
    fields = {name: str(row[name]) for name in shape.fields}
    prompt, options = shape.prompt_and_options(fields, words)
    identifier = document_id(f"{Path(path).name}:{number}")
    rows.append(Example(identifier, prompt, options, _label(row[LABEL], words, where)))
  return tuple(rows)


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
