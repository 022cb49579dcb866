"""Demonstrations and queries as tokens: the prompt of in-context learning and the training rows.

A prompt is `BOS, [demonstration's text, label, separator] x k`, then the query's text; a training
row is `BOS, text, label` (arXiv 2212.10559, appendix A, and its script). BOS is what the tokenizer
puts in front of every text, nothing for some models (GPT-2, SmolLM2). The separator is the
tokenizer's EOS, or an empty line if it has none. All tokens but BOS and separators are the same in
both, in the same order, so that their records can be compared.

A task is an object with `name`, `words`, and the examples `rows` and `train`, which have `id`,
`prompt`, `options` (what follows the prompt, one a label, its blank included) and `label`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.decoding.lengths import fine_bucket
from lmops_jax.evaluation.in_context import Encoder

NEWLINES = ("space", "eos")
_TEXT_SEPARATOR = "\n\n"
NUM_ORDERS = 5
_MAX_SHOWN = 40


class Demonstrations(NamedTuple):
  """The demonstrations, as a prompt and as training rows.

  Attributes:
    context_ids: `[c] int32`, the prompt in front of a query, BOS included.
    context_kept: `[c] bool`, False for BOS and separators.
    groups: `[n] int32`, the demonstration of each kept token.
    ids: `[k,w] int32`, training rows, padded at the end.
    mask: `[k,w] bool`, False for padding.
    kept: `[k,w] bool`, False also for BOS and for separators inside a text.
  """

  context_ids: np.ndarray
  context_kept: np.ndarray
  groups: np.ndarray
  ids: np.ndarray
  mask: np.ndarray
  kept: np.ndarray


class Queries(NamedTuple):
  """Rows to predict, without BOS.

  Attributes:
    ids: `[N,t] int32`, padded at the end.
    mask: `[N,t] bool`, False for padding.
    gold: `[N] int32`, labels.
  """

  ids: np.ndarray
  mask: np.ndarray
  gold: np.ndarray

  def part(self, rows) -> Queries:
    """Some of the rows, in arrays of the same width."""
    return Queries(self.ids[rows], self.mask[rows], self.gold[rows])


def draw(num_rows: int, count: int, seed: int, order: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """The rows to demonstrate, by the script's rule, and the other rows in a random order.

  Args:
    num_rows: rows of the training split.
    count: k, the number of demonstrations.
    seed: seed of the shuffle, whose first k rows are taken.
    order: 0 for the shuffle's own order; 1 to 4 for other orders of the same rows.

  Raises:
    ValueError: for fewer rows than k, or another order.
  """
  if not 0 <= count <= num_rows:
    raise ValueError(
      f"{count} demonstrations are wanted and the training rows are {num_rows}; ask for at most "
      f"{num_rows}."
    )
  if not 0 <= order < NUM_ORDERS:
    raise ValueError(f"order={order} is not one of 0 to {NUM_ORDERS - 1}.")
  shuffled = np.random.default_rng(seed).permutation(num_rows)
  chosen = shuffled[:count]
  if order:
    state = np.random.RandomState(seed)
    chosen = chosen[[state.permutation(count) for _ in range(NUM_ORDERS)][order]]
  return chosen, shuffled[count:]


class Prompts:
  """Turns a task's examples into tokens of one model.

  Attributes:
    front: ids of BOS, [] for none.
    separator: ids between demonstrations.
    label_ids: `[C] int32`, the labels' tokens.
  """

  def __init__(self, tokenizer, task: Any, newline: str = "space"):
    """
    Args:
      tokenizer: one with `encode(text, add_special)` and `eos_id` (an id or None).
      task: see the module.
      newline: "space" turns line breaks in a text into blanks; "eos" encodes each line on its own
        and closes it with EOS, as the script does.

    Raises:
      ValueError: for an unknown `newline`, "eos" without an EOS, a task without label words, or a
        word that is not one token.
    """
    if newline not in NEWLINES:
      raise ValueError(f"newline={newline!r} is not one of {', '.join(NEWLINES)}.")
    self._encoder, self._tokenizer = Encoder(tokenizer), tokenizer
    self._task, self._newline = task, newline
    self.front = list(self._encoder.start)
    eos = tokenizer.eos_id
    if eos is None and newline == "eos":
      raise ValueError("newline='eos' needs a tokenizer with an EOS token; use newline='space'.")
    self._eos = eos
    self.separator = [eos] if eos is not None else tokenizer.encode(_TEXT_SEPARATOR, False)
    self.label_ids = self._labels()

  def demonstrations(
    self, examples: Sequence[Any], max_length: int, longest_query: int
  ) -> Demonstrations:
    """The context and training rows of examples, in their order.

    Args:
      examples: examples of the task; there may be none.
      max_length: positions of the model.
      longest_query: tokens that must fit behind the context.

    Raises:
      ValueError: for an empty text, a label out of range, or a context that does not fit; it says
        how many demonstrations do.
    """
    context, context_kept, groups, rows = list(self.front), [False] * len(self.front), [], []
    for number, example in enumerate(examples):
      text, kept = self._text(example, f"demonstration {number}")
      text, kept = [*text, int(self.label_ids[example.label])], [*kept, True]
      length = len(context) + len(text) + len(self.separator) + longest_query
      if length > max_length:
        raise ValueError(
          f"task {self._task.name}: {number} of {len(examples)} demonstrations fit into the "
          f"model's {max_length} positions, with {longest_query} left for the longest query; ask "
          f"for at most {number}."
        )
      context += text + self.separator
      context_kept += kept + [False] * len(self.separator)
      groups += [number] * sum(kept)
      rows.append(([*self.front, *text], [False] * len(self.front) + kept))
    if len(context) + longest_query > max_length:
      raise ValueError(
        f"task {self._task.name}: the longest query has {longest_query} tokens and the model "
        f"{max_length} positions; leave it out."
      )
    width = max((len(ids) for ids, _ in rows), default=len(self.front) + 1)
    ids, mask = _padded([ids for ids, _ in rows], width)
    kept = _padded([kept for _, kept in rows], width)[0].astype(bool)
    made = Demonstrations(
      np.asarray(context, np.int32), np.asarray(context_kept, bool), np.asarray(groups, np.int32),
      ids, mask, kept)
    check_alignment(made)
    return made

  def queries(self, examples: Sequence[Any]) -> Queries:
    """Tokens and labels of rows to predict.

    Raises:
      ValueError: for no rows, an empty text or a label out of range; it names the row.
    """
    if not examples:
      raise ValueError(f"task {self._task.name} has no rows to predict.")
    texts = [self._text(example, f"row {i}")[0] for i, example in enumerate(examples)]
    ids, mask = _padded(texts, fine_bucket(max(map(len, texts))))
    return Queries(ids, mask, np.asarray([example.label for example in examples], np.int32))

  def _labels(self) -> np.ndarray:
    task = self._task
    if not task.words:
      raise ValueError(
        f"task {task.name} has no label words, and the metrics need a token for each label; take a "
        "task of classes."
      )
    found = []
    examples = [*task.train[:1], *task.rows[:1]]
    if not examples:
      raise ValueError(f"task {task.name} has no rows.")
    example = examples[0]
    for word, ids in zip(task.words, self._options(example)):
      if len(ids) != 1:
        raise ValueError(
          f"task {task.name}: the label word {word!r} is {len(ids)} tokens of this model and must "
          "be one; choose another word or wording."
        )
      found.append(ids[0])
    if len(set(found)) < len(found):
      raise ValueError(f"task {task.name}: two of the words {task.words} are the same token.")
    return np.asarray(found, np.int32)

  def _options(self, example):
    return self._encoder.split(self._one_line(example.prompt), example.options).options

  def _one_line(self, text: str) -> str:
    """The text with blanks for line breaks, also at its end, if that is the rule for them."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text) if self._newline == "space" else text

  def _text(self, example, what: str) -> tuple[list[int], list[bool]]:
    """Ids of a prompt without BOS, and for each whether it is no separator."""
    name = f"task {self._task.name}: {what}"
    if not 0 <= example.label < len(self.label_ids):
      raise ValueError(
        f"{name} has the label {example.label}, not one of 0 to {len(self.label_ids) - 1}; test "
        "splits without labels cannot be used."
      )
    if not example.prompt.strip():
      raise ValueError(f"{name} is empty: {example.prompt[:_MAX_SHOWN]!r}; leave it out.")
    if len(example.options) != len(self.label_ids) or tuple(
        ids[0] if len(ids) == 1 else None for ids in self._options(example)) != tuple(
        self.label_ids):
      raise ValueError(
        f"{name} has the options {example.options}, which are not the tokens of "
        f"{self._task.words}; all rows must share the label words."
      )
    ids, kept = [], []
    # Blanks at the end belong to the option's token, as in `Encoder.split`.
    lines = self._one_line(example.prompt).rstrip(" ")
    lines = lines.splitlines() if self._newline == "eos" else [lines]
    for i, line in enumerate(lines):
      if i:
        ids.append(self._eos)
        kept.append(False)
      part = self._tokenizer.encode(line, False)
      ids += part
      kept += [True] * len(part)
    return ids, kept


def check_alignment(made: Demonstrations) -> None:
  """Raises ValueError if training rows and context differ in more than BOS and separators."""
  rows = made.ids[made.kept]
  context = made.context_ids[made.context_kept]
  if len(rows) != len(context) or not np.array_equal(rows, context):
    differs = np.flatnonzero(rows[: len(context)] != context[: len(rows)])
    place = differs[0] if differs.size else min(len(rows), len(context))
    raise ValueError(
      f"the demonstrations have {len(rows)} tokens as training rows and {len(context)} in the "
      f"context without BOS and separators, and differ from token {place} on; they must be the "
      "same tokens to compare attention to them."
    )


def _padded(rows, width) -> tuple[np.ndarray, np.ndarray]:
  ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return ids, mask
