"""Rows as texts in which one sees what is learned: the loss mask, for people."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.text.vocabularies import Vocabulary

PICTURE = "[picture]"
LEARNED = ("⟦", "⟧")  # around what is learned


def marked(
  row: Mapping[str, np.ndarray], vocabulary: Vocabulary, ids: ImageTokens, words: Sequence[str]
) -> str:
  """The tokens of a row up to the last that is learned, with marks around those that are.

  Args:
    row: `tokens`, `targets` and `loss_mask [S]`, and `vector_index [S]` if it has pictures.
    vocabulary: of its texts.
    ids: the special ids.
    words: the special words, whose ids follow those of the vocabulary.
  """
  length = int(np.flatnonzero(row["loss_mask"]).max(initial=-1)) + 1
  tokens = [*row["tokens"][:1].tolist(), *row["targets"][:length].tolist()]
  learned = [False, *(row["loss_mask"][:length] > 0).tolist()]
  index = row.get("vector_index", np.full(length, -1))
  is_slot = [*(index[:length] >= 0).tolist(), False]
  names = {ids.bos_id: "<s>", ids.eos_id: "</s>", ids.pad_id: "<pad>"}

  def spelled(some: Sequence[tuple[int, bool]]) -> str:
    """Tokens beside each other, each with whether it is a slot."""
    pieces = []
    for kind, of in itertools.groupby(some, lambda one: _kind(*one, vocabulary, names)):
      run = [token for token, _ in of]
      if kind == "slot":
        pieces.append(PICTURE * (len(run) // ids.num_slots))
      elif kind == "text":
        pieces.append(vocabulary.decode(run))
      else:
        pieces += [names.get(token) or words[token - vocabulary.vocab_size] for token in run]
    return " ".join(piece.strip() for piece in pieces)

  parts = []
  for is_learned, of in itertools.groupby(zip(learned, tokens, is_slot), lambda one: one[0]):
    text = spelled([(token, slot) for _, token, slot in of])
    parts.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if is_learned else text)
  return " ".join(parts)


def _kind(token: int, slot: bool, vocabulary: Vocabulary, names: Mapping[int, str]) -> str:
  if slot:
    return "slot"
  return "word" if token in names or token >= vocabulary.vocab_size else "text"
