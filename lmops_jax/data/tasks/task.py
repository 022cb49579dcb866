"""What an evaluation in context works on: formatted rows, and demonstrations drawn from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lmops_jax.data.boxes import GRID
from lmops_jax.data.multimodal import IMAGE, Picture
from lmops_jax.data.tfds_images import StoredPicture
from lmops_jax.host.hashing import order_key

OF_OPTIONS = ("accuracy", "roc_auc")
OF_BOXES = ("phrase_grounding", "referring")
METRICS = (
  *OF_OPTIONS, *OF_BOXES, "exact_match", "f1", "vqa", "cider", "meteor", "explained",
  "rouge_l")


class Example(NamedTuple):
  """One formatted row.

  Attributes:
    id: a stable number, from dataset or file and row.
    prompt: text in front of the answer.
    options: the answers as they follow the prompt, with the leading space if there is one; () if
      the answer is open.
    label: index into `options`; -1 if the answer is open.
    answers: gold answers of an open row, without leading space.
    prompts: one prompt for each option, if they differ (Winogrande, Winograd); the options are then
      the text that follows each, and `prompt` is what the prompts have in common.
    images: the pictures that stand for the `IMAGE`s in the prompt, in their order: paths, or what
      reads as a `Picture` does.
    option_images: one picture for each option, if they differ in it (Raven's matrices): it stands
      for the last `IMAGE` of the prompt, which `images` leave to it.
    boxes: where what the prompt ends with is in its last picture, any of them: (x1, y1, x2, y2),
      fractions of the picture.
    categories: what the row's score counts for besides the whole task; perhaps several.
  """

  id: int
  prompt: str
  options: tuple[str, ...]
  label: int
  answers: tuple[str, ...] = ()
  prompts: tuple[str, ...] = ()
  images: tuple[str | Picture | StoredPicture, ...] = ()
  option_images: tuple[str, ...] = ()
  boxes: tuple[tuple[float, float, float, float], ...] = ()
  categories: tuple[str, ...] = ()

  @property
  def demonstration(self) -> str:
    """The whole text with the right answer; for an open row, with the last answer listed."""
    if not self.options:
      return f"{self.prompt} {self.answers[-1]}"
    prompt = self.prompts[self.label] if self.prompts else self.prompt
    return prompt + self.options[self.label]


@dataclasses.dataclass(frozen=True)
class Task:
  """Rows to evaluate on, and rows to draw demonstrations from.

  Attributes:
    name: the task's name in reports.
    rows: rows to evaluate on.
    train: rows to draw demonstrations from; (): draw from `rows`; those drawn are not evaluated on.
    words: the word of each label, in the labels' order, if all rows share their options; for open
      answers all that are possible, if they are names of classes.
    null_prompt: a prompt whose fields are "N/A", for calibration (arXiv:2102.09690); None if the
      prompt is the question itself.
    metric: for options "accuracy" or "roc_auc" (two options, the second is the positive one), for
      open answers "exact_match", "f1", "vqa", "cider", "meteor", "rouge_l" or "explained" ("LABEL
      because EXPLANATION"), for boxes "phrase_grounding" (any of a phrase's boxes, of the first 1,
      5 and 10) or "referring" (the first box).
    grid: side of the grid that boxes in the rows' texts are written on, if there are any.
    skipped: number of rows left out while reading, `train` included: another number of options than
      the task's, an empty or repeated option, an empty prompt, no answer, no box.

  Raises:
    ValueError: for no rows, a row without prompt, a single option, an empty or repeated option, a
      label outside the options, an open row without answer, or equal words.
  """

  name: str
  rows: tuple[Example, ...]
  train: tuple[Example, ...] = ()
  words: tuple[str, ...] = ()
  null_prompt: str | None = None
  metric: str = "accuracy"
  skipped: int = 0
  grid: int = GRID

  def __post_init__(self):
    if self.metric not in METRICS:
      raise ValueError(f"metric={self.metric!r} is not one of {', '.join(METRICS)}.")
    if self.words:
      _check_words(self.words)
    if not self.rows:
      raise ValueError(
        f"the task {self.name} has no rows" + (
          f" ({self.skipped} were left out)." if self.skipped else "."
        )
      )
    for example in (*self.rows, *self.train):
      problem = problem_of(example)
      unlike = example.options and self.words and len(example.options) != len(self.words)
      if problem is None and unlike:
        problem = f"has {len(example.options)} options for {len(self.words)} label words"
      if problem is None and (self.metric in OF_OPTIONS) != bool(example.options):
        problem = f"does not fit metric={self.metric!r}: it has {len(example.options)} options"
      if problem is None and self.metric in OF_BOXES and not example.boxes:
        problem = f"does not fit metric={self.metric!r}: it has no box"
      if problem is not None:
        raise ValueError(f"row {example.id} of the task {self.name} {problem}.")


  def require_text(self) -> None:
    """Refuses rows with pictures, for models that only read.

    Raises:
      ValueError: if a row has one.
    """
    for example in (*self.rows, *self.train):
      if example.images or example.option_images:
        raise ValueError(
          f"row {example.id} of the task {self.name} has pictures, and the model reads text alone; "
          "give a model that sees, or a task without pictures."
        )


def _check_words(words: Sequence[str]) -> None:
  if len(set(words)) < 2 or len(set(words)) < len(words):
    raise ValueError(
      f"the labels {', '.join(map(repr, words))} must be at least two different words."
    )
  if not all(word.strip() for word in words):
    raise ValueError(
      f"the labels {', '.join(map(repr, words))} hold an empty word, which has no likelihood; give "
      "each label a word."
    )


def problem_of(example: Example) -> str | None:
  """Why a row cannot be evaluated on, as the end of a sentence; None if it can."""
  if not all(prompt.strip() for prompt in (example.prompts or (example.prompt,))):
    return "has an empty prompt"
  if example.images or example.option_images:
    places = {prompt.count(IMAGE) for prompt in (example.prompts or (example.prompt,))}
    num = len(example.images) + bool(example.option_images)
    if places != {num}:
      found = " or ".join(map(str, sorted(places)))
      return f"has {found} {IMAGE} in its prompt and {num} pictures for them"
  if not example.options:
    if not example.answers or not all(answer.strip() for answer in example.answers):
      return "has neither options nor an answer"
    return None if example.label == -1 else f"has the label {example.label} and no options"
  if len(example.options) < 2:
    return f"has one option only, {example.options[0]!r}"
  if not all(option.strip() for option in example.options):
    return "has an empty option"
  for name, each in (("prompts", example.prompts), ("pictures", example.option_images)):
    if len(each) not in (0, len(example.options)):
      return f"has {len(each)} {name} for {len(example.options)} options"
  none = [""] * len(example.options)
  whole = list(zip(example.prompts or none, example.option_images or none, example.options))
  if len(set(whole)) < len(whole):
    return "has the same option twice"
  if not 0 <= example.label < len(example.options):
    return f"has the label {example.label}; its {len(example.options)} options have 0 to " + str(
      len(example.options) - 1
    )
  return None


def demonstrations(
  rows: Sequence[Example], count: int, seed: int, balanced: bool = False
) -> list[Example]:
  """`count` rows, chosen and ordered by (seed, row id).

  Args:
    rows: the rows to draw from.
    count: how many to draw.
    seed: seed of the draw.
    balanced: draw numbers of each label as equal as `count` allows, labels in turn.

  Raises:
    ValueError: if there are fewer rows (or, balanced, fewer of a label).
  """
  if count < 0:
    raise ValueError(f"{count} demonstrations are asked for; ask for 0 or more.")
  ordered = sorted(rows, key=lambda row: (order_key(row.id, seed), row.id))
  if count > len(ordered):
    raise ValueError(
      f"{count} demonstrations are asked for and there are {len(ordered)} rows to draw from; ask "
      "for fewer, or give a larger file with --train."
    )
  if not balanced:
    return ordered[:count]
  of_label: dict[int, list[Example]] = {}
  for row in ordered:
    of_label.setdefault(row.label, []).append(row)
  turns = sorted(of_label, key=lambda label: order_key(label, seed))
  chosen: list[Example] = []
  for turn in range(count):
    label = turns[turn % len(turns)]
    if not of_label[label]:
      raise ValueError(
        f"{count} balanced demonstrations need more rows of label {label} than there are; ask for "
        "fewer, or give a larger file with --train."
      )
    chosen.append(of_label[label].pop(0))
  return sorted(chosen, key=lambda row: (order_key(row.id, seed + 1), row.id))
