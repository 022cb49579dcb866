"""Instances of one vocabulary as inputs of a scorer with another.

Tokens are cut at each EOS; the pieces are decoded, encoded again and joined by the scorer's EOS,
and a BOS is put in front. Works on any vocabularies of `lmops_jax.text.vocabularies`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import numpy as np


def convert_tokens(tokens: Sequence[int], source, target, length: int) -> np.ndarray:
  """Re-encodes one instance, `[<= length] int32`; what exceeds `length` is cut.

  Args:
    tokens: an instance without padding: BOS, separators and content in `source`'s ids.
    source: vocabulary of `tokens`.
    target: vocabulary of the result.
    length: the most tokens of the result, BOS included.
  """
  pieces: list[list[int]] = [[]]
  for token in tokens:
    if token == source.eos_id:
      pieces.append([])
    elif token not in (source.bos_id, source.pad_id):
      pieces[-1].append(int(token))
  if not pieces[-1] and len(pieces) > 1:
    pieces.pop()  # the text ended with a separator, which the reference drops
  converted = [target.bos_id]
  for i, piece in enumerate(pieces):
    if i:
      converted.append(target.eos_id)
    converted += target.encode(source.decode(piece))
  return np.asarray(converted[:length], np.int32)


def check_same_text(ours: Iterable[str], theirs: Iterable[str], *, threshold: float = 0.9) -> float:
  """Compares the first 100 characters of decoded pairs; guards against a mixed-up vocabulary.

  Returns:
    The lowest similarity ratio seen (1 if every pair is the same text).

  Raises:
    ValueError: if a pair is not alike (ratio <= `threshold`).
  """
  lowest = 1.0
  for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
    a, b = a[:100], b[:100]
    ratio = SequenceMatcher(None, a, b, autojunk=False).ratio()
    if ratio <= threshold:
      raise ValueError(
        f"instance {i} reads {a[:40]!r} here and {b[:40]!r} there (similarity {ratio:.2f}, needed "
        f"more than {threshold}); the scores were made with another vocabulary or corpus."
      )
    lowest = min(lowest, ratio)
  return lowest
