"""Rows to learn from, each with its learned tokens: texts, prompts with completions, chats.

A row is {"text"}, learned whole; {"prompt", "completion"}, of which the completion and the end
token are learned; or {"messages"}, a conversation in the model's chat template, of which the
assistant's turns are learned. Prompt and completion are encoded apart, so that a prompt has the
same tokens in training and in use. Short rows share a sequence: attention stays within a row
(`segment_ids`) and positions start anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.batches import token_weights
from lmops_jax.data.documents import document_id
from lmops_jax.data.first_fit import first_fit
from lmops_jax.data.lines import jsonl_rows
from lmops_jax.host.foreign_files import printable

TOO_LONG = ("drop", "cut", "error")
_FIELDS = ("tokens", "targets", "loss_mask", "positions", "segment_ids")
_IDS, _COUNTS = "ids", "counts.json"


class Example(NamedTuple):
  """One row.

  Attributes:
    id: a number from file and line.
    tokens: all of its tokens, with the model's start tokens in front and an end token.
    learned: for each token whether its prediction counts; the first one's never does.
  """

  id: int
  tokens: list[int]
  learned: list[bool]


class SupervisedSet(NamedTuple):
  """Sequences of one length, as arrays whose rows make up the batches.

  Attributes:
    arrays: `tokens`, `targets`, `positions`, `segment_ids [N,S] int32`, `loss_mask [N,S] float32`.
    ids: ids of the sequences, `[N] int64`; a sequence has the id of its first row.
    counts: `rows`, `sequences`, `tokens`, `learned_tokens`, and rows "dropped" or "cut".
  """

  arrays: Mapping[str, np.ndarray]
  ids: np.ndarray
  counts: Mapping[str, int]

  def __len__(self) -> int:
    return len(self.arrays["tokens"])

  def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Sequences as a batch of the arrays and `example_id [B] int64`.

    `weight [B] float32` makes the mean over sequences one over learned tokens.
    """
    indices = np.asarray(indices)
    batch = {name: np.asarray(array[indices]) for name, array in self.arrays.items()}
    return {
      **batch, "weight": token_weights(batch["loss_mask"]),
      "example_id": np.array(self.ids[indices]),
    }

  def num_learned(self, indices: Sequence[int]) -> np.ndarray:
    """Number of learned tokens of sequences, `[n] int64`."""
    return (self.arrays["loss_mask"][np.asarray(indices)] != 0).sum(axis=1, dtype=np.int64)


def front_ids(tokenizer) -> list[int]:
  """The ids that a tokenizer, with `encode(text, add_special)`, puts in front of every text."""
  plain, full = tokenizer.encode("a", False), tokenizer.encode("a", True)
  starts = range(len(full) - len(plain) + 1)
  return full[: next((i for i in starts if full[i : i + len(plain)] == plain), 0)]


def encode_behind(front: Sequence[int], tokenizer, text: str) -> list[int]:
  """Ids of a text behind the ids in front of every text (`front_ids`).

  A text that itself begins with them, as chat templates do, does not get them twice.
  """
  ids = tokenizer.encode(text, False)
  return ids if front and ids[:1] == list(front[:1]) else [*front, *ids]


def encode_row(tokenizer, row: Mapping[str, Any], identifier: int, where: str) -> Example:
  """The tokens of a row.

  Args:
    tokenizer: one of `lmops_jax.pretrained`.
    row: see the module.
    identifier: the row's id.
    where: file and line, for errors.

  Raises:
    ValueError: for a row of another form, an empty one, or a conversation without a chat template.
  """
  front = front_ids(tokenizer)
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  if "messages" in row:
    return _conversation(tokenizer, row["messages"], identifier, where)
  if {"prompt", "completion"} <= row.keys():
    prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    given = encode_behind(front, tokenizer, prompt)
    answer = tokenizer.encode(completion, False) + end
  elif "text" in row:
    whole = encode_behind(front, tokenizer, _text(row, "text", where)) + end
    given, answer = whole[: len(front)], whole[len(front) :]
  else:
    raise ValueError(
      f'{where} has the fields {", ".join(sorted(row)) or "none"}; a row has "text", "prompt" and '
      '"completion", or "messages".'
    )
  tokens, learned = given + answer, [False] * len(given) + [True] * len(answer)
  learned[0] = False
  if not any(learned):
    raise ValueError(f"{where} has no token to learn; leave empty rows out.")
  return Example(identifier, tokens, learned)


def _text(row, field, where):
  if not isinstance(row[field], str):
    raise ValueError(f"{where}: field {field!r} holds a {type(row[field]).__name__}, not a text.")
  return row[field]


def _conversation(tokenizer, messages, identifier, where) -> Example:
  """A conversation; the template's text up to each turn shows which tokens are the assistant's."""
  roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
  if "assistant" not in roles:
    raise ValueError(f"{where} has messages without a turn of the assistant to learn.")
  tokens, learned = [], []
  for i, role in enumerate(roles):
    whole = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
    done = tokenizer.encode(whole, False)
    if role == "assistant":
      opened = tokenizer.encode(tokenizer.apply_chat_template(messages[:i]), False)
    else:
      opened = done
    if done[: len(opened)] != opened or done[: len(tokens)] != tokens:
      raise ValueError(
        f"{where}: the chat template rewrites earlier turns when it adds one, so it does not show "
        "which tokens are the assistant's; give prompt and completion."
      )
    learned += [False] * (len(opened) - len(tokens)) + [True] * (len(done) - len(opened))
    tokens = done
  learned[0] = False
  return Example(identifier, tokens, learned)


def read_examples(path: Path | str, tokenizer) -> list[Example]:
  """Encodes a file of JSON lines (`.gz`, `.zst` or plain).

  Raises:
    ValueError: for a line that holds no such row; it names the line.
  """
  name = Path(path).name
  return [
    encode_row(tokenizer, row, document_id(f"{name}:{number}"), f"{printable(path)}:{number}")
    for number, row in jsonl_rows(path)
  ]


def build(
  examples: Iterable[Example], length: int, *, pad_id: int, pack: bool = True,
  too_long: str = "drop", name: str = "train",
) -> SupervisedSet:
  """Sequences of `length` predicted positions.

  Args:
    examples: the rows in the order of the file.
    length: S; a row of more than S + 1 tokens is too long.
    pad_id: fills the rest of a sequence.
    pack: put several rows into a sequence, first fit in order; False gives each its own.
    too_long: "drop" such rows or "cut" them, counted, or make them an "error".
    name: the part's name, for errors.

  Raises:
    ValueError: if a row is too long (with "error"), or none is left.
  """
  if too_long not in TOO_LONG:
    raise ValueError(f"too_long={too_long!r} is not one of {', '.join(TOO_LONG)}.")
  counts: Counter[str] = Counter(dropped=0, cut=0)
  fitting = _fitting(examples, length, too_long, counts)
  sequences = list(first_fit(
    ((example, [len(example.tokens) - 1]) for example in fitting), [length], share=pack))
  if not sequences:
    raise ValueError(
      f"no row of the {name} part is left: {counts['dropped']} have more than {length} "
      "tokens; raise the length, or set too_long to \"cut\"."
    )
  return placed(sequences, length, pad_id, counts)


def placed(
  sequences: Sequence[Sequence[Example]], length: int, pad_id: int, counts: Mapping[str, int]
) -> SupervisedSet:
  """The set of sequences of examples that fit into them; `counts` are those made so far."""
  arrays = {name: np.empty((len(sequences), length), np.int32) for name in _FIELDS}
  arrays["loss_mask"] = arrays["loss_mask"].astype(np.float32)
  for row, sequence in enumerate(sequences):
    for field, values in place(sequence, length, pad_id).items():
      arrays[field][row] = values
  ids = np.array([sequence[0].id for sequence in sequences], np.int64)
  return SupervisedSet(arrays, ids, {
    **counts, "rows": sum(map(len, sequences)),
    "tokens": sum(len(e.tokens) - 1 for sequence in sequences for e in sequence),
    "sequences": len(sequences), "learned_tokens": int(arrays["loss_mask"].sum())})


def _fitting(examples, length: int, too_long: str, counts: Counter[str]) -> Iterator[Example]:
  """The examples of at most `length` predicted positions; others are treated as `build` says."""
  for example in examples:
    size = len(example.tokens) - 1
    if size > length:
      if too_long == "error":
        raise ValueError(
          f"a row of {size + 1} tokens exceeds the length {length}; raise the length, or set "
          'too_long to "drop" or "cut".'
        )
      example = Example(
        example.id, example.tokens[: length + 1], example.learned[: length + 1]
      )
      is_dropped = too_long == "drop" or not any(example.learned)
      counts["dropped" if is_dropped else "cut"] += 1
      if is_dropped:
        continue
    elif size < 1:
      counts["dropped"] += 1
      continue
    yield example


def place(sequence: Sequence[Example], length: int, pad_id: int) -> dict[str, np.ndarray]:
  """The arrays of one sequence of examples that fit into it; see `SupervisedSet`.

  Returns:
    `tokens`, `targets`, `positions`, `segment_ids [S] int32` and `loss_mask [S] float32`; each
    example is a segment, counted from 1, and positions behind the last one are segment 0.
  """
  row = {name: np.zeros(length, np.int32) for name in _FIELDS}
  row["loss_mask"] = row["loss_mask"].astype(np.float32)
  row["tokens"][:], row["targets"][:] = pad_id, pad_id
  start = 0
  for segment, example in enumerate(sequence, 1):
    n = len(example.tokens) - 1
    part = slice(start, start + n)
    row["tokens"][part] = example.tokens[:-1]
    row["targets"][part] = example.tokens[1:]
    row["loss_mask"][part] = example.learned[1:]
    row["positions"][part] = np.arange(n)
    row["segment_ids"][part] = segment
    start += n
  return row


def save(directory: Path, data: SupervisedSet) -> None:
  """Writes the arrays into a folder, made if needed."""
  directory.mkdir(parents=True, exist_ok=True)
  for name, array in {**data.arrays, _IDS: data.ids}.items():
    np.save(directory / f"{name}.npy", array)
  (directory / _COUNTS).write_text(json.dumps(data.counts))


def load(directory: Path) -> SupervisedSet:
  """Opens what `save` wrote; the arrays are mapped, not read.

  Raises:
    ValueError: if an array is missing, as in folders that were written before sequences had ids.
  """
  try:
    arrays = {
      name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in (*_FIELDS, _IDS)
    }
  except FileNotFoundError as error:
    raise ValueError(
      f"{error.filename} is missing; delete the folder of the stage that wrote it and run it again."
    ) from error
  return SupervisedSet(arrays, arrays.pop(_IDS), json.loads((directory / _COUNTS).read_text()))
