"""What a named task is: where its rows are, and how these read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

FLAVOURS = ("fs", "hf", "paper", "plain", "gpt3", "ask")


class Wording(NamedTuple):
  """How a row reads.

  Attributes:
    prompt: text with fields of the row in braces.
    words: the labels' words, in their order; (): the row has choices of its own.
    option: what follows the prompt, with `{choice}` for the word or the choice.
    lower: put the first letter of a choice in lower case.
    prompts: the prompt of each choice, if they differ.
  """

  prompt: str
  words: tuple[str, ...] = ()
  option: str = " {choice}"
  lower: bool = False
  prompts: str = ""


class Entry(NamedTuple):
  """A named task.

  Attributes:
    dataset: what `tfds.builder` takes; None: only JSON lines.
    train, rows: splits to draw from and to evaluate on; train "": draw from the other rows.
    flavours: wordings by index, by flavour.
    fields: the wordings' fields, each with the places in a row where it may be: "a|b" tries one
      after the other, "a.b" leads into nested ones, "a+b" joins two with a blank.
    label: places of the label, and how it is written: ":key" is A to E (or a text 1 to 5), ":one"
      counts from 1, otherwise it counts from 0.
    choices: places of a row's own options, "a,b" if each has its own place.
    reader: name in `rows.READERS` of the function from a row of the data to rows with these fields.
    classes: other names of each label, in the words' order, "/" between names of one label.
    num_choices: the number of options; rows with another number are skipped.
    metric: see `Task`.
  """

  dataset: str | None
  train: str
  rows: str
  flavours: Mapping[str, Mapping[int, Wording]]
  fields: Mapping[str, str]
  label: str = "label"
  choices: str = ""
  reader: str = "as_is"
  classes: tuple[str, ...] = ()
  num_choices: int | None = None
  metric: str = "accuracy"

  @property
  def words(self) -> tuple[str, ...]:
    """Label words of the default wording; () if rows have their own options."""
    return next(iter(self.flavours.values()))[0].words


def wordings(*found: Wording) -> dict[int, Wording]:
  """Wordings by index."""
  return dict(enumerate(found))


def one(prompt: str, *words: str, **more) -> dict[int, Wording]:
  """One wording, with index 0; arguments as for `Wording`."""
  return {0: Wording(prompt, words, **more)}
