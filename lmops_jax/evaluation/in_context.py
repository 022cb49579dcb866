"""Classification by what a language model finds likely: zero- and few-shot accuracy.

Demonstrations stand in front of each row's prompt, and the answer is the option with the highest
(normalised) log-likelihood. The same demonstrations stand in front of every row, so the model reads
them once. If the prompts differ by option (Winogrande), each option follows its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.data.tasks import Example, Task, demonstrations
from lmops_jax.data.tasks.task import OF_OPTIONS
from lmops_jax.decoding.scoring import OptionScorer, Request, total
from lmops_jax.models.cache import Prefix

NORMALISATIONS = ("sum", "token", "char", "null", "auto")
SEPARATOR = "\n\n"


class Result(NamedTuple):
  """What an evaluation found.

  Attributes:
    accuracy: fraction of rows whose best option is their label.
    standard_error: that of the accuracy, over rows.
    row_ids: `[N]` ids of the scored rows, in the task's order.
    labels: `[N] int`.
    predictions: `[N] int`.
    scores: `[N,labels] float64`, what the options are compared by; -inf for options that a row
      does not have.
    confusion: `[labels,labels] int`, rows of each label (first axis) by prediction.
    num_shots: demonstrations in front of each row.
    num_tokens: tokens of all prompts with their options, shared ones counted each time.
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
  An option's tokens are those that the whole text has beyond the context's; if the boundary
  falls inside a token, the option is encoded by itself.

  Args:
    tokenizer: with `encode(text, add_special)`; what it puts behind a text is left out.
    start: ids in front of a prompt; None takes what the tokenizer puts there.
  """

  def __init__(self, tokenizer, start: Sequence[int] | None = None):
    self._tokenizer = tokenizer
    self.start = front_ids(tokenizer) if start is None else list(start)

  def encode(self, text: str) -> list[int]:
    """A prompt with what the model wants in front of it, once even if the text has it already."""
    return encode_behind(self.start, self._tokenizer, text)

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
  train: Sequence[Example] | None = None,
  balanced: bool = False,
  normalisation: str = "sum",
  separator: str = SEPARATOR,
  progress: Callable[[int], None] | None = None,
) -> Result:
  """Accuracy of a model on a task.

  Args:
    scorer: scores options with the model.
    tokenizer: the model's.
    task: rows with options.
    shots: demonstrations, drawn by (seed, row id).
    seed: the seed of the draw.
    train: rows to draw from; None draws from the task's `train` or, if it has none, from its
      rows, which are then not scored.
    balanced: draw as many demonstrations of each label.
    normalisation: "sum" adds an option's token log-probabilities; "token" takes their mean; "char"
      divides the sum by the option's characters, blanks around it not counted; "null" subtracts the
      sum after a prompt whose fields are "N/A" (same demonstrations); "auto" does as the papers:
      the sum if all options are one token, else the mean.
    separator: text behind each demonstration.
    progress: called with the number of prompts done since the last call: rows, or options if
      prompts differ by option.

  Raises:
    ValueError: an unknown normalisation, open answers, too few rows, two labels with the same
      tokens, no prompt for "null", or a prompt longer than the model's context.
  """
  rows, front = rows_and_front(
    task, shots=shots, seed=seed, train=train, balanced=balanced, normalisation=normalisation,
    separator=separator)
  try:
    scores, num_tokens = score_rows(
      scorer, Encoder(tokenizer), task, rows, front=front, normalisation=normalisation,
      progress=progress)
  except ValueError as error:
    raise ValueError(f"task {task.name} with {shots} demonstrations: {error}") from error
  return outcome(rows, scores, shots, num_tokens)


def rows_and_front(
  task: Task, *, shots: int = 0, seed: int = 0, train: Sequence[Example] | None = None,
  balanced: bool = False, normalisation: str = "sum", separator: str = SEPARATOR,
) -> tuple[list[Example], str]:
  """The rows to score and the demonstrations in front of each; needs no model.

  Arguments and errors are those of `evaluate`.
  """
  if normalisation not in NORMALISATIONS:
    raise ValueError(
      f"normalisation={normalisation!r} is not one of {', '.join(NORMALISATIONS)}."
    )
  task.require_text()
  if task.metric not in OF_OPTIONS:
    raise ValueError(
      f"the task {task.name} has open answers, to be generated and measured by {task.metric}; "
      "options cannot be scored."
    )
  if normalisation == "null" and task.null_prompt is None:
    raise ValueError(
      f"normalisation='null' needs a prompt without content, and the rows of the task {task.name} "
      "have options of their own; use 'auto' or another one."
    )
  train = task.train or None if train is None else train
  drawn = demonstrations(task.rows if train is None else train, shots, seed, balanced)
  used = {row.id for row in drawn}
  rows = [row for row in task.rows if row.id not in used] if train is None else list(task.rows)
  if not rows:
    raise ValueError(
      f"the task {task.name} has {len(task.rows)} rows, all of them demonstrations; give others "
      "with --train."
    )
  return rows, "".join(row.demonstration + separator for row in drawn)


def score_rows(
  scorer: OptionScorer, encoder: Encoder, task: Task, rows: Sequence[Example], *, front: str = "",
  normalisation: str = "sum", prefix: Prefix | None = None,
  progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, int]:
  """What the options of each row are compared by, `[N,options] float64`, and the tokens read.

  Args:
    rows: rows of the task.
    front: text in front of every prompt.
    prefix: what stands in front of every row already, see `OptionScorer.score`; the encoder then
      has no start.
    For the others see `evaluate`.
  """
  scored = list(rows)
  if normalisation == "null":
    scored.append(rows[0]._replace(prompt=task.null_prompt))
  requests, counts = [], []
  for row in scored:
    of_row = requests_of(encoder, row, front)
    requests += of_row
    counts.append(len(of_row))
  if task.words:
    _check(requests[0], task)
  found = scorer.score(requests, progress, prefix)
  token_scores, done = [], 0
  for count in counts:  # one request with all options, or one a prompt
    token_scores.append([scores for part in found[done : done + count] for scores in part])
    done += count
  num_tokens = sum(len(r.context) + sum(map(len, r.options)) for r in requests)
  return _normalised(normalisation, token_scores, scored), num_tokens


def outcome(
  rows: Sequence[Example], scores: np.ndarray, num_shots: int, num_tokens: int
) -> Result:
  """The best option of each row, the first of equals, against its label."""
  predictions = scores.argmax(axis=1)
  labels = np.array([row.label for row in rows])
  confusion = np.zeros((scores.shape[1],) * 2, np.int64)
  np.add.at(confusion, (labels, predictions), 1)
  accuracy = float(np.mean(predictions == labels))
  return Result(
    accuracy, math.sqrt(accuracy * (1 - accuracy) / len(rows)),
    np.array([row.id for row in rows]), labels, predictions, scores, confusion, num_shots,
    num_tokens,
  )


def requests_of(encoder: Encoder, row: Example, front: str = "") -> list[Request]:
  """One request with all options of a row, or one for each option if their prompts differ.

  Args:
    front: text in front of every prompt.
  """
  if not row.prompts:
    return [encoder.split(front + row.prompt, row.options)]
  return [
    encoder.split(front + prompt, [option]) for prompt, option in zip(row.prompts, row.options)
  ]


def _check(request: Request, task: Task) -> None:
  seen: dict[tuple[int, ...], str] = {}
  for word, option in zip(task.words, request.options):
    if not option:
      raise ValueError(f"the label {word!r} has no token in this model's vocabulary.")
    if tuple(option) in seen:
      raise ValueError(
        f"the labels {seen[tuple(option)]!r} and {word!r} have the same tokens; choose other words."
      )
    seen[tuple(option)] = word


def _normalised(kind: str, token_scores, rows: Sequence[Example]) -> np.ndarray:
  """What options are compared by, `[N,labels] float64`."""
  if kind == "auto":
    single = all(len(option) == 1 for of_row in token_scores for option in of_row)
    kind = "sum" if single else "token"
  scores = np.full((len(rows), max(map(len, token_scores))), -np.inf)
  for i, (of_row, row) in enumerate(zip(token_scores, rows, strict=True)):
    sums = total(of_row)
    if kind == "token":
      sums = sums / np.array([len(option) for option in of_row])
    elif kind == "char":
      sums = sums / np.array([len(option.strip()) for option in row.options])
    scores[i, : len(sums)] = sums
  return scores[:-1] - scores[-1] if kind == "null" else scores


def record(task: Task, result: Result, index: int) -> dict[str, Any]:
  """What a file of scores says about one row: by label words, or by options' numbers."""
  label, prediction = int(result.labels[index]), int(result.predictions[index])
  scores = [float(x) for x in result.scores[index] if x != -np.inf]
  found = {"id": int(result.row_ids[index]), "label": label, "prediction": prediction,
           "scores": scores}
  if task.words:
    found.update(label=task.words[label], prediction=task.words[prediction],
                 scores=dict(zip(task.words, scores, strict=True)))
  return found
