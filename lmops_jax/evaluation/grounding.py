"""How well a model locates what a prompt names (Kosmos-2, arXiv:2306.14824, section 4.1).

A prompt ends with `<phrase>` NAME `</phrase>`. The boxes of all entities of that name in what
follows count, in their order. A box is right if its intersection over union with any box of the
truth is at least 0.5; without boxes a box without area stands for them, as in the authors' scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.box_overlap import iou
from lmops_jax.data.boxes import GRID, GROUNDING, Box, box_tokens, decode, encode, extract
from lmops_jax.data.boxes import checked as checked_boxes
from lmops_jax.data.phrase_boxes import LAST_PHRASE
from lmops_jax.data.tasks import Example
from lmops_jax.data.tasks.task import OF_BOXES
from lmops_jax.decoding.text import find_stop
from lmops_jax.evaluation.captions import Scores
from lmops_jax.evaluation.estimates import Estimate, estimate, picture_of

FIRST = (1, 5, 10)  # of how many boxes the recall is told
THRESHOLD = 0.5
_AT_ONCE = 1024  # rows whose boxes are compared together


class Located(NamedTuple):
  """What an answer locates.

  Attributes:
    boxes: `[n,4] float64`, those of the prompt's phrase.
    num_malformed: groups of boxes in the answer that are none.
  """

  boxes: np.ndarray
  num_malformed: int


class Measured(NamedTuple):
  """What `measure` found.

  Attributes:
    estimates: the task's figures, the main one first.
    scores: by the figures' names, `[N] float64` of each row.
    located: of each row.
  """

  estimates: list[Estimate]
  scores: dict[str, np.ndarray]
  located: list[Located]

  @property
  def score(self) -> Scores:
    """The main figure."""
    main = self.estimates[0]
    return Scores(main.value, self.scores[main.name])

  def record(self, index: int) -> dict[str, Any]:
    """What a file of answers says about one row besides the answer."""
    found = self.located[index]
    return {
      "boxes": found.boxes.tolist(), "num_malformed": found.num_malformed,
      "scores": {name: float(values[index]) for name, values in self.scores.items()}}


def located(prompt: str, answer: str, grid: int = GRID) -> Located:
  """The boxes that an answer gives to the phrase that its prompt ends with.

  Args:
    prompt: a text that ends with `<phrase>` NAME `</phrase>`.
    answer: what was generated behind it, with its tags.
    grid: the side of the model's grid.

  Raises:
    ValueError: a prompt that ends otherwise.
  """
  named = LAST_PHRASE.search(prompt)
  if named is None:
    raise ValueError(
      f"the prompt {prompt[-60:]!r} does not end with <phrase>...</phrase>, so that nothing is "
      "asked to be located; let it end with the phrase."
    )
  found = extract(named[0].rstrip() + answer.lstrip(), grid)
  boxes = [
    box for entity in found.entities if entity.name == named[1].strip() for box in entity.boxes]
  return Located(np.array(boxes, np.float64).reshape(-1, 4), found.num_malformed)


def phrase_scores(
  found: Sequence[np.ndarray], truths: Sequence[Sequence[Box]]
) -> dict[str, np.ndarray]:
  """Recall of phrases: whether one of the first boxes meets any box of the truth.

  Args:
    found: of each row, `[n,4]` boxes, fractions of the picture.
    truths: of each row, one or more boxes.

  Returns:
    `[N] float64` by name: "R@1", "R@5", "R@10", and "R@all", which no order of boxes exceeds.

  Raises:
    ValueError: different numbers of rows, none, or a truth that is no box.
  """
  best = _best(found, truths)
  every = {f"R@{k}": best[:, :k].max(axis=1) for k in FIRST} | {"R@all": best.max(axis=1)}
  return {name: (values >= THRESHOLD).astype(np.float64) for name, values in every.items()}


def referring_scores(
  found: Sequence[np.ndarray], truths: Sequence[Sequence[Box]], grid: int = GRID
) -> dict[str, np.ndarray]:
  """Precision of referring expressions.

  Args:
    found, truths: see `phrase_scores`.
    grid: the side of the model's grid.

  Returns:
    `[N] float64` by name: "P@1", whether the first box is right; "mean", whether the mean of all
    boxes is; "upper bound", whether any is; "IoU", that of the first box; "grid", whether the
    truth itself, in cells of the grid, would be.

  Raises:
    ValueError: as `phrase_scores`.
  """
  best = _best(found, truths)
  means = [boxes.mean(axis=0, keepdims=True) if len(boxes) else boxes for boxes in found]
  written = [decode(encode(of_row, grid), grid) for of_row in truths]
  right = {
    "P@1": best[:, 0], "mean": _best(means, truths)[:, 0], "upper bound": best.max(axis=1),
    "grid": _best(written, truths).max(axis=1)}
  scores = {name: (values >= THRESHOLD).astype(np.float64) for name, values in right.items()}
  return scores | {"IoU": best[:, 0]}


def _best(found: Sequence[np.ndarray], truths: Sequence[Sequence[Box]]) -> np.ndarray:
  """`[N,K]`: of each box in its order the best intersection over union; 0 for boxes there are not.
  """
  if len(found) != len(truths) or not len(found):
    raise ValueError(
      f"boxes of {len(found)} answers and truths of {len(truths)} rows are given; give one a row, "
      "and at least one."
    )
  for i, of_row in enumerate(truths):
    if not len(checked_boxes(of_row, f"the truth of row {i}")):
      raise ValueError(f"row {i} has no box as its truth; leave it out.")
  one, other = _padded(found), _padded(truths)
  blocks = (slice(start, start + _AT_ONCE) for start in range(0, len(found), _AT_ONCE))
  return np.concatenate(
    [iou(one[rows, :, None], other[rows, None]).max(axis=2) for rows in blocks])


def _padded(rows: Sequence[Any]) -> np.ndarray:
  """`[N,K,4]` with boxes without area behind each row's, at least one in all."""
  padded = np.zeros((len(rows), max(1, *map(len, rows)), 4))
  for i, boxes in enumerate(rows):
    padded[i, : len(boxes)] = np.reshape(boxes, (-1, 4))
  return padded


_SCORES: dict[str, Callable[..., dict[str, np.ndarray]]] = {
  "phrase_grounding": lambda found, truths, grid: phrase_scores(found, truths),
  "referring": referring_scores,
}
assert set(_SCORES) == set(OF_BOXES)


def measure(
  metric: str, rows: Sequence[Example], answers: Sequence[str], grid: int = GRID
) -> Measured:
  """The figures of a task's answers.

  Args:
    metric: "phrase_grounding" or "referring".
    rows: with the prompts and the true boxes.
    answers: as they were generated, with their tags.
    grid: the side of the model's grid.

  Raises:
    ValueError: another metric, or as `located` and the scores.
  """
  if metric not in _SCORES:
    raise ValueError(f"there is no metric {metric!r} of boxes; give one of {', '.join(_SCORES)}.")
  found = [located(row.prompt, answer, grid) for row, answer in zip(rows, answers, strict=True)]
  scores = _SCORES[metric]([of.boxes for of in found], [row.boxes for row in rows], grid)
  groups = [picture_of(row) for row in rows]
  estimates = [estimate(name, values, groups) for name, values in scores.items()]
  return Measured(estimates, scores, found)


def check_words(
  prompts: Sequence[str], tokenizer, written: int, grammar: bool = False
) -> int | None:
  """The side of the grid that boxes are written on; None if nothing is about boxes.

  Args:
    prompts: of a task's rows and demonstrations.
    tokenizer: the model's, with `token_id`.
    written: the side of the grid that boxes in prompts are written on, `Task.grid`.
    grammar: whether answers keep to the grammar of boxes.

  Raises:
    ValueError: the vocabulary has no words for boxes, or prompts have boxes on another grid.
  """
  if not grammar and not any(GROUNDING in text or "<phrase>" in text for text in prompts):
    return None
  _, grid = box_tokens(tokenizer.token_id)
  if grid != written and any("<object>" in prompt for prompt in prompts):
    raise ValueError(
      f"the prompts have boxes on a grid of {written} x {written} cells, and the model's is {grid} "
      f"x {grid}; make the task with grid=lambda: {grid}."
    )
  return grid


def with_tags(
  tokenizer, prompt: Sequence[int], answer: Sequence[int], stop: Sequence[str] = ()
) -> tuple[str, str]:
  """A prompt's text behind its last picture, and its continuation, both with their tags.

  Args:
    tokenizer: the model's; tags are kept even if it calls them special.
    prompt: ids; slots of pictures may have any.
    answer: ids of the continuation.
    stop: texts that the continuation is cut before.
  """
  silent = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id,
            tokenizer.token_id("<mask>"), *tokenizer.stop_ids}

  def spoken(ids):
    return tokenizer.decode([token for token in ids if token not in silent], False)

  prompt, image_end = list(prompt), tokenizer.token_id("</image>")
  if image_end in prompt:
    prompt = prompt[len(prompt) - prompt[::-1].index(image_end) :]
  front = spoken(prompt)
  rest = spoken([*prompt, *answer])[len(front) :]
  cut = find_stop(rest, stop)
  return front, rest if cut is None else rest[:cut]
