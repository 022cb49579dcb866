"""How much generated texts differ from each other."""

from __future__ import annotations

from collections.abc import Sequence

from lmops_jax.evaluation.captions import bleu

_ORDER = 4


def distinct(texts: Sequence[str], n: int) -> float:
  """Different n-grams of words over all n-grams of all texts (Li et al. 2016, arXiv:1510.03055).

  Args:
    texts: words between blanks count as they are, lowered.
    n: words of an n-gram, at least 1.

  Returns:
    0 .. 1, higher for more diverse texts; 0 if no text has n words.

  Raises:
    ValueError: n below 1.
  """
  if n < 1:
    raise ValueError(f"n={n} must be at least 1.")
  grams = [
    tuple(words[i : i + n]) for words in (text.lower().split() for text in texts)
    for i in range(len(words) - n + 1)]
  return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
  """Mean BLEU-4 of each text against all others (Zhu et al. 2018, arXiv:1802.01886).

  Returns:
    0 .. 1, lower for more diverse texts.

  Raises:
    ValueError: fewer than two texts.
  """
  if len(texts) < 2:
    raise ValueError(f"{len(texts)} texts have no others to be compared with; give at least 2.")
  lowered = [" ".join(text.lower().split()) for text in texts]
  others = [[*lowered[:i], *lowered[i + 1 :]] for i in range(len(lowered))]
  return float(bleu(lowered, others)[_ORDER - 1].rows.mean())
