"""Classification by what a language model finds likely: zero- and few-shot accuracy.

Demonstrations stand in front of each row's prompt, and the answer is the option with the highest
(normalised) log-likelihood. The same demonstrations stand in front of every row, so the model reads
them once. If the prompts differ by option (Winogrande), each option follows its own. Where an
encoder knows the model's length, a row too long for it loses demonstrations, the first ones first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.data.tasks import Example, Task
from lmops_jax.data.tasks.task import OF_OPTIONS
from lmops_jax.decoding.scoring import OptionScorer, Request, first, mean, total
from lmops_jax.evaluation import binary
from lmops_jax.evaluation.demonstrations import (
  NO_FRONT,
  SEPARATOR,
  Front,
  drawn,
  fitted,
  pictures_of,
)
from lmops_jax.models.cache import Prefix

NORMALISATIONS = ("sum", "token", "first", "char", "null", "auto", "answer")
_ANSWER = "Answer:"  # GPT-3's prompt without a question


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
    num_dropped: `[N] int`, demonstrations that had no room in front of each row.
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
  num_dropped: np.ndarray


class Scored(NamedTuple):
  """What `score_rows` found.

  Attributes:
    values: `[N,options] float64`, what the options of each row are compared by.
    num_tokens: tokens read.
    num_dropped: `[N] int`, demonstrations that had no room in front of each row.
  """

  values: np.ndarray
  num_tokens: int
  num_dropped: np.ndarray


class Encoder:
  """Contexts and options to token ids, split as the whole text's tokens are.

  Blanks at a context's end go to the option, since most vocabularies join them with the next word.
  An option's tokens are those that the whole text has beyond the context's; if the boundary
  falls inside a token, the option is encoded by itself.

  It has no place for pictures; `seeing.SeeingEncoder` does.

  Args:
    tokenizer: with `encode(text, add_special)`; what it puts behind a text is left out.
    start: ids in front of a prompt; None takes what the tokenizer puts there.
    strict: a boundary inside a token is an error, and so are two options of the same tokens.
    max_length: positions of the model, so that demonstrations without room are left out; None
      leaves them, and scoring refuses a context that is too long.

  Attributes:
    sees: whether contexts may have pictures.
    rows_at_once: rows that are encoded and scored together; None is all.
    most_images: the most pictures of a context; None is no limit.
  """

  sees = False
  rows_at_once: int | None = None
  most_images: int | None = None

  def __init__(
    self, tokenizer, start: Sequence[int] | None = None, strict: bool = False,
    max_length: int | None = None,
  ):
    self._tokenizer, self._strict, self.max_length = tokenizer, strict, max_length
    self.start = front_ids(tokenizer) if start is None else list(start)

  def encode(self, text: str) -> list[int]:
    """A prompt with what the model wants in front of it, once even if the text has it already."""
    return encode_behind(self.start, self._tokenizer, text)

  def read(self, images: Sequence[str]) -> None:
    """Prepares the pictures of the rows that come next, of which there are none."""

  def split(self, context: str, options: Sequence[str], images: Sequence[str] = ()) -> Request:
    """The context's and each option's ids.

    Args:
      context: text in front of every option.
      options: each as it follows the context.
      images: none.

    Raises:
      ValueError: when strict, an option that does not begin with a token of its own, or has no
        token or those of another option.
    """
    bare = context.rstrip(" ")
    blanks = context[len(bare) :]
    ids = self.encode(bare)
    pieces = []
    for option in options:
      whole = self.encode(bare + blanks + option)
      rest = whole[len(ids) :] if whole[: len(ids)] == ids else None
      if self._strict and rest is None:
        raise ValueError(
          f"the option {option!r} does not begin with a token of its own behind {bare[-40:]!r}, "
          "since the tokenizer joins both; begin the option with a blank, or end the context with "
          "one."
        )
      if not rest and not self._strict:
        rest = self._tokenizer.encode(blanks + option, False)
      pieces.append(rest)
    request = Request(ids, pieces)
    if self._strict:
      check_options(request, options, "option")
    return request


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
  encoder: Encoder | None = None,
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
    normalisation: "sum" adds an option's token log-probabilities; "token" takes their mean; "first"
      the first of them; "char" divides the sum by the option's characters, blanks around it not
      counted; "null" subtracts the sum after a prompt whose fields are "N/A" (same demonstrations);
      "auto" does as the papers: the sum if all options are one token, else the mean; "answer"
      subtracts the sum behind "Answer:" alone (GPT-3 on ARC, arXiv:2005.14165, section 2.4).
    separator: text behind each demonstration.
    progress: called with the number of prompts done since the last call: rows, or options if
      prompts differ by option.
    encoder: encodes contexts, with pictures if it sees; None is an `Encoder` of the tokenizer.

  Raises:
    ValueError: an unknown normalisation, open answers, too few rows, two labels with the same
      tokens, no prompt for "null", or a prompt longer than the model's context.
  """
  encoder = Encoder(tokenizer) if encoder is None else encoder
  rows, front = rows_and_front(
    task, shots=shots, seed=seed, train=train, balanced=balanced, normalisation=normalisation,
    separator=separator, sees=encoder.sees)
  try:
    scored = score_rows(
      scorer, encoder, task, rows, front=front, normalisation=normalisation,
      progress=progress)
  except ValueError as error:
    raise ValueError(f"task {task.name} with {shots} demonstrations: {error}") from error
  return outcome(rows, scored.values, shots, scored.num_tokens, scored.num_dropped)


def rows_and_front(
  task: Task, *, shots: int = 0, seed: int = 0, train: Sequence[Example] | None = None,
  balanced: bool = False, normalisation: str = "sum", separator: str = SEPARATOR,
  sees: bool = False,
) -> tuple[list[Example], Front]:
  """The rows to score and the demonstrations in front of each; needs no model.

  Args:
    sees: whether rows may have pictures.
    For the others, and for errors, see `evaluate`.
  """
  if normalisation not in NORMALISATIONS:
    raise ValueError(
      f"normalisation={normalisation!r} is not one of {', '.join(NORMALISATIONS)}."
    )
  if not sees:
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
  rows, front = drawn(
    task, shots=shots, seed=seed, train=train, balanced=balanced, separator=separator)
  if normalisation == "answer" and any(row.prompts or row.option_images for row in rows):
    raise ValueError(
      f"normalisation='answer' compares with a prompt for all options, and rows of the task "
      f"{task.name} have one for each; use 'token' or another one."
    )
  if task.metric == "roc_auc" and len({row.label for row in rows}) < 2:
    raise ValueError(
      f"the {len(rows)} rows of the task {task.name} all have the label {rows[0].label}, and a ROC "
      "curve needs both; take more rows."
    )
  return rows, front


def score_rows(
  scorer: OptionScorer, encoder: Encoder, task: Task, rows: Sequence[Example], *,
  front: Front = NO_FRONT, normalisation: str = "sum", prefix: Prefix | None = None,
  progress: Callable[[int], None] | None = None,
) -> Scored:
  """Scores the options of each row.

  Args:
    rows: rows of the task.
    front: demonstrations in front of every prompt.
    prefix: what stands in front of every row already, see `OptionScorer.score`; the encoder then
      has no start.
    For the others see `evaluate`.
  """
  scored, fronts = list(rows), [front] * len(rows)
  if normalisation == "null":
    scored.append(rows[0]._replace(prompt=task.null_prompt))
    fronts.append(front)
  if normalisation == "answer":
    scored += [row._replace(prompt=_ANSWER, images=()) for row in rows]
    fronts += [NO_FRONT] * len(rows)
  at_once = encoder.rows_at_once or len(scored)
  token_scores, num_tokens, num_dropped = [], 0, []
  for start in range(0, len(scored), at_once):
    block = scored[start : start + at_once]
    encoder.read(pictures_of(block, front))
    of_rows, dropped = zip(*(
      _that_fit(encoder, row, shown) for row, shown in zip(block, fronts[start:])))
    num_dropped += dropped
    requests = [request for of_row in of_rows for request in of_row]
    if task.words and not start:
      check_options(requests[0], task.words, "label")
    found = iter(scorer.score(requests, progress, prefix))
    for of_row in of_rows:  # one request with all options, or one a prompt
      token_scores.append([scores for _ in of_row for scores in next(found)])
    num_tokens += sum(len(r.context) + sum(map(len, r.options)) for r in requests)
  return Scored(
    _normalised(normalisation, token_scores, scored), num_tokens,
    np.array(num_dropped[: len(rows)]))


def outcome(
  rows: Sequence[Example], scores: np.ndarray, num_shots: int, num_tokens: int,
  num_dropped: np.ndarray | None = None,
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
    num_tokens, np.zeros(len(rows), int) if num_dropped is None else num_dropped,
  )


class Figure(NamedTuple):
  """A figure of merit over rows.

  Attributes:
    name: of `data.tasks` metrics.
    value: the figure.
    standard_error: that of the figure, over rows; NaN if they are too few.
  """

  name: str
  value: float
  standard_error: float


def figures(task: Task, result: Result) -> list[Figure]:
  """What a task is measured by, and its accuracy if that is something else."""
  found = [Figure("accuracy", result.accuracy, result.standard_error)]
  if task.metric == "roc_auc":  # the second option is the positive one
    shares = binary.share_of(result.scores, 1)
    found.insert(0, Figure(
      "roc_auc", binary.roc_auc(shares, result.labels),
      binary.roc_auc_error(shares, result.labels)))
  return found


def _that_fit(encoder: Encoder, row: Example, front: Front) -> tuple[list[Request], int]:
  """The requests of a row behind as many demonstrations as fit, and how many do not."""
  def read(requests):  # an option's last token is predicted and never read
    return max(len(r.context) + max(map(len, r.options)) - 1 for r in requests)

  num_own = len(row.images) + bool(row.option_images)
  return fitted(
    front, num_own, lambda shown: requests_of(encoder, row, shown), read,
    max_length=encoder.max_length, most_images=encoder.most_images)


def requests_of(encoder: Encoder, row: Example, front: Front = NO_FRONT) -> list[Request]:
  """One request with all options of a row, or one for each option if their prompts differ.

  Prompts differ by their text, or by the picture that stands for the last `<image>`.

  Args:
    front: demonstrations in front of every prompt.
  """
  images = (*front.images, *row.images)
  if not row.prompts and not row.option_images:
    return [encoder.split(front.text + row.prompt, row.options, images)]
  num = len(row.options)
  own = [(path,) for path in row.option_images] or [()] * num
  return [
    encoder.split(front.text + prompt, [option], (*images, *more))
    for prompt, option, more in zip(row.prompts or [row.prompt] * num, row.options, own)
  ]


def check_options(request: Request, words: Sequence[str], what: str) -> None:
  """Refuses a word without tokens, or two words of the same ones.

  Args:
    request: with an option for each word.
    words: the words. what: what they are, for errors.
  """
  seen: dict[tuple[int, ...], str] = {}
  for word, option in zip(words, request.options):
    if not option:
      raise ValueError(f"the {what} {word!r} has no token in this model's vocabulary.")
    if tuple(option) in seen:
      raise ValueError(
        f"the {what}s {seen[tuple(option)]!r} and {word!r} have the same tokens; choose other "
        "words."
      )
    seen[tuple(option)] = word


def _normalised(kind: str, token_scores, rows: Sequence[Example]) -> np.ndarray:
  """What options are compared by, `[N,labels] float64`."""
  if kind == "auto":
    single = all(len(option) == 1 for of_row in token_scores for option in of_row)
    kind = "sum" if single else "token"
  scores = np.full((len(rows), max(map(len, token_scores))), -np.inf)
  for i, (of_row, row) in enumerate(zip(token_scores, rows, strict=True)):
    sums = {"token": mean, "first": first}.get(kind, total)(of_row)
    if kind == "char":
      sums = sums / np.array([len(option.strip()) for option in row.options])
    scores[i, : len(sums)] = sums
  if kind == "answer":  # an option that a row does not have stays at -inf
    scores, unasked = np.split(scores, 2)
    return scores - np.where(np.isneginf(unasked), 0, unasked)
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
