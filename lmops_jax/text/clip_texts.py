"""Texts as CLIP's text tower takes them: rows of one length, the end token kept."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

CONTEXT = 77


def clip_rows(
  tokenizer, texts: Sequence[str], length: int = CONTEXT
) -> tuple[np.ndarray, np.ndarray]:
  """Ids of texts, cut behind `length - 1` and padded with the end token, which nothing reads.

  HTML entities are resolved twice and white space collapsed, as OpenAI's code does it; letters are
  lowered by the tokenizer. Broken encodings are not repaired.

  Args:
    tokenizer: of `lmops_jax.text`, which puts an end token behind every text.
    texts: any, the empty one too.
    length: S, the tower's positions.

  Returns:
    `[B,S] int32`, and `[B] bool`: whether a text lost its end.

  Raises:
    ValueError: a tokenizer that puts no end token behind a text.
  """
  end = tokenizer.eos_id
  cleaned = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
  rows = np.full((len(texts), length), -1 if end is None else end, np.int32)
  cut = np.zeros(len(texts), bool)
  for i, ids in enumerate(tokenizer.encode_batch(cleaned, True)):
    if end is None or ids[-1:] != [end]:
      raise ValueError(
        f"the tokenizer of {tokenizer.path} puts no end token behind a text; take the tokenizer "
        "that the CLIP model was published with."
      )
    cut[i] = len(ids) > length
    kept = ids[: length - 1]
    rows[i, : len(kept)] = kept
  return rows, cut
