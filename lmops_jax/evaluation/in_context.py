"""Classification by what a language model finds likely: zero- and few-shot accuracy.

Each row's template is filled up to the label, demonstrations stand in front, and the answer is the
label word with the highest (normalised) log-likelihood. The same demonstrations stand in front of
every row, so the model reads them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.classification_tasks import Row, Task, demonstrations
from lmops_jax.data.supervised import front_ids
from lmops_jax.decoding.scoring import OptionScorer, Request, total

NORMALISATIONS = ("sum", "token", "char", "null")
SEPARATOR = "\n\n"
_NULL_FIELD = "N/A"  # Zhao et al. 2021, arXiv:2102.09690


class Result(NamedTuple):
  """What an evaluation found.

  Attributes:
    accuracy: fraction of rows whose best option is their label.
    standard_error: of the accuracy, over rows.
    row_ids: `[N]` ids of the scored rows, in the task's order.
    labels: `[N] int`.
    predictions: `[N] int`.
    scores: `[N,labels] float64`, what the options are compared by.
    confusion: `[labels,labels] int`, rows of each label (first axis) by prediction.
    num_shots: demonstrations in front of each row.
    num_tokens: of all prompts with their options, shared ones counted each time.
  """

  accuracy: float
  standard_error: float
  row_ids: np.ndarray
  labels: np.ndarray
  predictions: np.ndarray
  scores: np.ndarray
  confusion: np.ndarray
  num_shots: int
  num_tokens: int


class Encoder:
  """Contexts and options to token ids, split as the whole text's tokens are.

  Blanks at a context's end go to the option, since most vocabularies join them with the next word.
  An option's tokens are those that the whole text has beyond the context's; where the boundary
  falls inside a token, the option is encoded by itself.

  Args:
    tokenizer: with `encode(text, add_special)`; what it puts in front of a text stands once in
      front of a prompt, what it puts behind is left out.
  """

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self.start = front_ids(tokenizer)

  def encode(self, text: str) -> list[int]:
    """A prompt with what the model wants in front of it."""
    return self.start + self._tokenizer.encode(text, False)

  def split(self, context: str, options: Sequence[str]) -> Request:
    """The context's and each option's ids."""
    bare = context.rstrip(" ")
    blanks = context[len(bare) :]
    ids = self.encode(bare)
    pieces = []
    for option in options:
      whole = self.encode(bare + blanks + option)
      fits = whole[: len(ids)] == ids and len(whole) > len(ids)
      pieces.append(
        whole[len(ids) :] if fits else self._tokenizer.encode(blanks + option, False)
      )
    return Request(ids, pieces)


def evaluate(
  scorer: OptionScorer,
  tokenizer,
  task: Task,
  *,
  shots: int = 0,
  seed: int = 0,
  train: Sequence[Row] | None = None,
  balanced: bool = False,
  normalisation: str = "sum",
  separator: str = SEPARATOR,
  progress: Callable[[int], None] | None = None,
) -> Result:
  """Accuracy of a model on a task.

  Args:
    scorer: of the model.
    tokenizer: the model's.
    task: rows, words and template.
    shots: demonstrations, drawn by (seed, row id).
    seed: of the draw.
    train: rows to draw from; None draws from the task's own, which are then not scored.
    balanced: as many demonstrations of each label.
    normalisation: "sum" of an option's token log-probabilities; their mean a "token"; the sum a
      "char" of the option; "null", the sum less that after a prompt whose fields are "N/A" (same
      demonstrations).
    separator: between demonstrations.
    progress: called with the number of rows done since the last call.

  Raises:
    ValueError: an unknown normalisation, too few rows, two labels with the same tokens, or a
      prompt longer than the model's context.
  """
  if normalisation not in NORMALISATIONS:
    raise ValueError(
      f"normalisation={normalisation!r} is not one of {', '.join(NORMALISATIONS)}."
    )
  drawn = demonstrations(task.rows if train is None else train, shots, seed, balanced)
  used = {row.id for row in drawn}
  rows = [row for row in task.rows if row.id not in used] if train is None else list(task.rows)
  if not rows:
    raise ValueError(
      f"the task {task.name} has {len(task.rows)} rows, all of them demonstrations; give others "
      "with --train."
    )
  front = "".join(
    task.template.filled(row.fields, task.words[row.label]) + separator for row in drawn
  )
  encoder = Encoder(tokenizer)
  requests = [
    encoder.split(front + task.template.context(row.fields), task.words) for row in rows
  ]
  if normalisation == "null":
    nothing = dict.fromkeys(task.template.fields, _NULL_FIELD)
    requests.append(encoder.split(front + task.template.context(nothing), task.words))
  _check(requests, task)
  try:
    token_scores = scorer.score(requests, progress)
  except ValueError as error:
    raise ValueError(f"task {task.name} with {shots} demonstrations: {error}") from error
  scores = _normalised(normalisation, token_scores, requests, task.words)
  predictions = scores.argmax(axis=1)
  labels = np.array([row.label for row in rows])
  confusion = np.zeros((len(task.words),) * 2, np.int64)
  np.add.at(confusion, (labels, predictions), 1)
  accuracy = float(np.mean(predictions == labels))
  return Result(
    accuracy, math.sqrt(accuracy * (1 - accuracy) / len(rows)),
    np.array([row.id for row in rows]), labels, predictions, scores, confusion, shots,
    sum(len(r.context) + sum(map(len, r.options)) for r in requests),
  )


def _check(requests: Sequence[Request], task: Task) -> None:
  seen: dict[tuple[int, ...], str] = {}
  for word, option in zip(task.words, requests[0].options):
    if not option:
      raise ValueError(f"the label {word!r} has no token in this model's vocabulary.")
    if tuple(option) in seen:
      raise ValueError(
        f"the labels {seen[tuple(option)]!r} and {word!r} have the same tokens; choose other words."
      )
    seen[tuple(option)] = word


def _normalised(kind: str, token_scores, requests, words) -> np.ndarray:
  """`[N,labels] float64`."""
  sums = np.stack([total(scores) for scores in token_scores])
  if kind == "null":
    return sums[:-1] - sums[-1]
  if kind == "token":
    return sums / np.array([[len(option) for option in r.options] for r in requests])
  if kind == "char":
    return sums / np.array([[len(word) for word in words]])
  return sums


def record(task: Task, result: Result, index: int) -> dict[str, Any]:
  """What a file of scores says about one row."""
  return {
    "id": int(result.row_ids[index]), "label": task.words[result.labels[index]],
    "prediction": task.words[result.predictions[index]],
    "scores": {word: float(x) for word, x in zip(task.words, result.scores[index])},
  }
