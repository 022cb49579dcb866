"""Texts, or pairs of them, to the ids that an encoder wants around them."""

from __future__ import annotations

from collections.abc import Sequence


def ids_of(tokenizer, texts: Sequence[str], others: Sequence[str] | None) -> list[list[int]]:
  """Ids of each text; of a pair those of both, the second without the token that opens a text.

  Models that read pairs by token types (BERT's) get all of type 0, as sentence encoders do.

  Args:
    tokenizer: the encoder's own.
    texts: any texts; an empty one has special tokens alone.
    others: the second of each pair, or None.
  """
  first = tokenizer.encode_batch(list(texts))
  if others is None:
    return first
  opening = tokenizer.encode("")[:1]
  second = tokenizer.encode_batch(list(others))
  return [a + (b[1:] if b[:1] == opening else b) for a, b in zip(first, second)]
