"""Texts as CLIP reads them: rows of one length, and what is cut off."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
  from lmops_jax.text.tokenizer import Tokenizer


class ClipTexts(NamedTuple):
  """Texts as rows.

  Attributes:
    tokens: `[n,length] int32`: BOS (unless it is EOS), the text, EOS, padding.
    cut: of each text what did not fit, as it was written; empty if all of it did.
  """

  tokens: np.ndarray
  cut: list[str]


def cleaned(text: str) -> str:
  """A text as OpenAI's code cleans it for CLIP: entities of HTML resolved twice, blanks collapsed.

  Letters are lowered by the tokenizer. Broken encodings are not repaired.
  """
  return " ".join(html.unescape(html.unescape(text)).split())


def clip_texts(tokenizer: Tokenizer, texts: Sequence[str], length: int = 77) -> ClipTexts:
  """Texts as rows of one length; of one that is longer the end is cut off, EOS not.

  Padding is the tokenizer's own, such as EOS for Stable Diffusion 1 and "!" for Stable Diffusion 2,
  whose networks read it too; EOS if it has none. Texts are read as they are; see `cleaned`.

  Args:
    tokenizer: of the folder of the model. One token that is BOS and EOS stands behind a text only.
    texts: any.
    length: of a row.

  Raises:
    ValueError: for a tokenizer that does not put BOS and EOS around a text.
  """
  eos = tokenizer.eos_id
  around = list(dict.fromkeys([tokenizer.bos_id, eos]))
  if tokenizer.encode("") != around:
    raise ValueError(
      f"the tokenizer of {tokenizer.path} does not put a BOS and an EOS token around a text, as "
      "CLIP's does; take the tokenizer that the model was published with."
    )
  pad = eos if tokenizer.pad_id is None else tokenizer.pad_id
  tokens = np.full((len(texts), length), pad, np.int32)
  cut = []
  for row, text, ids in zip(tokens, texts, tokenizer.encode_batch(texts), strict=True):
    kept = ids if len(ids) <= length else [*ids[: length - 1], eos]
    row[: len(kept)] = kept
    cut.append(tokenizer.behind(text, length - len(around)) if len(ids) > length else "")
  return ClipTexts(tokens, cut)
