"""Open answers: generated behind each row's prompt and measured by the task's metric.

Where a task's answers are names of classes, generation may be kept to these (Kosmos-1,
arXiv:2302.14045, section 4.4): a prefix tree of their tokens, each with the end token, so that a
name that begins another one can be an answer.

Behind prompts about boxes answers keep their tags where boxes are measured; texts are measured
without tags and boxes. Boxes may be kept well-formed by the grammar of `decoding.boxes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.boxes import extract
from lmops_jax.data.tasks import Example, Task
from lmops_jax.data.tasks.task import OF_BOXES, OF_OPTIONS
from lmops_jax.decoding import GenerationOptions, Generator, boxes
from lmops_jax.decoding.constraints import PrefixTree, prefix_tree
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.evaluation import generated, grounding, in_context
from lmops_jax.evaluation.demonstrations import SEPARATOR, Front, drawn, fitted, pictures_of
from lmops_jax.evaluation.estimates import (
  Estimate,
  by_category,
  estimate,
  of_corpus,
  picture_of,
)
from lmops_jax.evaluation.in_context import Encoder, Figure
from lmops_jax.evaluation.wordnet import WordNet
from lmops_jax.models.config import TransformerConfig

_COMPANIONS = {  # what papers tell beside a metric
  "cider": ("bleu_4",), "meteor": ("cider",), "rouge_l": ("rouge_1", "rouge_2"),
  "explained": (
    "explanation_cider", "explanation_meteor", "explanation_rouge_l",
    *(f"explanation_bleu_{n}" for n in range(1, 5))),
}
_AT_ONCE = 256  # rows, if the encoder does not say


class Answered(NamedTuple):
  """What an evaluation found.

  Attributes:
    figure: the task's metric.
    row_ids: `[N]` ids of the rows, in the task's order.
    answers: of each row, without blanks around it.
    golds: of each row, the right answers.
    scores: `[N] float64`, each row's.
    num_shots: demonstrations in front of each row.
    num_dropped: `[N] int`, those that had no room.
    estimates: further figures, and the task's by category, with intervals.
    located: what answers of a task about boxes locate.
  """

  figure: Figure
  row_ids: np.ndarray
  answers: list[str]
  golds: list[tuple[str, ...]]
  scores: np.ndarray
  num_shots: int
  num_dropped: np.ndarray
  estimates: list[Estimate]
  located: grounding.Measured | None = None


def told_of(metric: str) -> tuple[str, ...]:
  """The metrics that an evaluation tells of a task with open answers, the task's own first."""
  return (metric, *_COMPANIONS.get(metric, ()))


def rows_and_front(
  task: Task, *, shots: int = 0, seed: int = 0, train: Sequence[Example] | None = None,
  separator: str = SEPARATOR, sees: bool = False, only_names: bool = False,
) -> tuple[list[Example], Front]:
  """The rows to answer and the demonstrations in front of each; needs no model.

  For arguments see `evaluate`, for `sees` `in_context.rows_and_front`.

  Raises:
    ValueError: a task of options, no names to keep to, pictures, or too few rows.
  """
  if not sees:
    task.require_text()
  if task.metric in OF_OPTIONS:
    raise ValueError(
      f"the task {task.name} has options, to be scored and measured by {task.metric}; answers to "
      "it are not generated."
    )
  if only_names and not task.words:
    raise ValueError(
      f"answers to the task {task.name} are free texts, not names of classes to keep to; leave the "
      "restriction out."
    )
  return drawn(task, shots=shots, seed=seed, train=train, separator=separator)


def evaluate(
  generator: Generator,
  tokenizer,
  task: Task,
  *,
  options: GenerationOptions,
  config: TransformerConfig,
  shots: int = 0,
  seed: int = 0,
  train: Sequence[Example] | None = None,
  stop: Sequence[str] = (),
  only_names: bool = False,
  grammar: bool = False,
  separator: str = SEPARATOR,
  progress: Callable[[int], None] | None = None,
  encoder: Encoder | None = None,
  wordnet: WordNet | None = None,
) -> Answered:
  """Generates an answer to each row and measures them.

  Args:
    generator: continues texts with the model.
    tokenizer: the model's.
    task: rows with open answers.
    options: how tokens are chosen. If answers are names, these decide `max_new_tokens`.
    config: of the model.
    shots, seed, train: demonstrations, see `in_context.evaluate`.
    stop: texts that end an answer, which is cut before them.
    only_names: generate nothing but the task's names of classes.
    grammar: generate well-formed boxes only.
    separator: text behind each demonstration.
    progress: called with the number of rows done since the last call.
    encoder: encodes prompts, with pictures if it sees; None is an `Encoder` of the tokenizer.
    wordnet: tells METEOR synonyms; None for no such stage.

  Raises:
    ValueError: as `rows_and_front`; both restrictions; names with the same tokens; a tokenizer
      without end token; a prompt that is too long without any demonstration; or prompts about boxes
      and a tokenizer without words for them.
  """
  if grammar and only_names:
    raise ValueError(
      "answers that are names of classes have no boxes, which the grammar is about; leave one of "
      "the two restrictions out.")
  encoder = Encoder(tokenizer, max_length=config.max_length) if encoder is None else encoder
  rows, front = rows_and_front(
    task, shots=shots, seed=seed, train=train, separator=separator, sees=encoder.sees,
    only_names=only_names)
  grid = grounding.check_words(
    [row.prompt for row in rows] + [front.text], tokenizer, task.grid, grammar)
  trees: dict[str, tuple[PrefixTree, GenerationOptions]] = {}
  answers: list[str] = [""] * len(rows)
  num_dropped = np.zeros(len(rows), int)
  at_once = encoder.rows_at_once or _AT_ONCE
  for start in range(0, len(rows), at_once):
    block = range(start, min(start + at_once, len(rows)))
    encoder.read(pictures_of([rows[i] for i in block], front))
    groups: dict[str, list[int]] = {}
    for i in block:
      groups.setdefault(rows[i].prompt if only_names else "", []).append(i)
    for prompt, members in groups.items():
      tree, how = None, options
      if only_names:
        if prompt not in trees:
          trees[prompt] = _of_names(encoder, tokenizer, task, rows[members[0]], config, options)
        tree, how = trees[prompt]
      contexts = []
      for i in members:
        context, num_dropped[i] = _context(encoder, task, rows[i], front, how, config)
        contexts.append(context)
      how = dataclasses.replace(how, num_return_sequences=1)
      if grammar:
        found = boxes.generate(
          generator, tokenizer, contexts, [context.ids for context in contexts], how, stop)
      else:
        found = generator.generate(contexts, how, stop, constraint=tree)
      for i, context, answer in zip(members, contexts, found, strict=True):
        answers[i] = answer.text.strip()
        if grid is not None:
          _, tagged = grounding.with_tags(tokenizer, context.ids, answer.ids, stop)
          of_boxes = task.metric in OF_BOXES
          answers[i] = tagged.strip() if of_boxes else extract(tagged, grid).text
      if progress:
        progress(len(members))
  golds = [row.answers for row in rows]
  name, located = task.metric, None
  if name in OF_BOXES:
    located = grounding.measure(name, rows, answers, grid)
    name, score, more = located.estimates[0].name, located.score, located.estimates
  else:
    score = generated.score(name, answers, golds, wordnet)
    more = companions(name, rows, answers, wordnet)
  error = score.rows.std(ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else np.nan
  return Answered(
    Figure(name, score.corpus, float(error)), np.array([row.id for row in rows]), answers, golds,
    score.rows, shots, num_dropped, [*more, *by_category(rows, score.rows)], located)


def companions(
  metric: str, rows: Sequence[Example], answers: Sequence[str], wordnet: WordNet | None = None
) -> list[Estimate]:
  """What papers tell beside a metric of generated answers; `wordnet` as in `generated.score`."""
  golds, groups, found = [row.answers for row in rows], list(map(picture_of, rows)), []
  for name in _COMPANIONS.get(metric, ()):
    figure = generated.of_corpus(name, answers, golds)
    found.append(
      estimate(name, generated.score(name, answers, golds, wordnet).rows, groups) if figure is None
      else of_corpus(name, figure, groups))
  return found


def _context(
  encoder: Encoder, task: Task, row: Example, front: Front, how: GenerationOptions,
  config: TransformerConfig,
) -> tuple[Prompt, int]:
  """The prompt of a row behind the demonstrations that fit, and how many do not."""
  def make(shown: Front) -> Prompt:
    context = encoder.split(
      shown.text + row.prompt, (), (*shown.images, *row.images)).context
    return context if isinstance(context, Prompt) else Prompt(context)

  def num_read(made: Prompt) -> int:  # the last new token is not read
    return len(made) + how.max_new_tokens - 1

  made, dropped = fitted(
    front, len(row.images), make, num_read, max_length=config.max_length,
    most_images=encoder.most_images)
  if num_read(made) > config.max_length:
    raise ValueError(
      f"row {row.id} of the task {task.name} has {len(made)} tokens without any demonstration, and "
      f"with {how.max_new_tokens} new ones they exceed the model's {config.max_length}; leave the "
      "row out, or ask for fewer new tokens."
    )
  return made, dropped


def _of_names(
  encoder: Encoder, tokenizer, task: Task, row: Example, config: TransformerConfig,
  options: GenerationOptions,
) -> tuple[PrefixTree, GenerationOptions]:
  """The tree of a task's names behind the prompt of a row, and options that let each one end."""
  request = encoder.split(row.prompt, [f" {word}" for word in task.words], row.images)
  in_context.check_options(request, task.words, "name")
  if tokenizer.eos_id is None:
    raise ValueError(
      f"the tokenizer of {tokenizer.path} has no end token, which tells a name from one that it "
      "begins; leave the restriction to names out."
    )
  tree = prefix_tree(request.options, tokenizer.eos_id, config.vocab_size)
  longest = max(map(len, request.options)) + 1
  return tree, dataclasses.replace(options, max_new_tokens=longest)


def record(result: Answered, index: int) -> dict[str, Any]:
  """What a file of answers says about one row."""
  found = {
    "id": int(result.row_ids[index]), "answer": result.answers[index],
    "answers": list(result.golds[index]), "score": float(result.scores[index]),
  }
  return found if result.located is None else found | result.located.record(index)
