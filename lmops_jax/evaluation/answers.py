"""Open answers against gold ones: exact match and token F1, as SQuAD's evaluation has them."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
  """Lower case, without punctuation, articles and extra blanks."""
  return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
  """1 if the normalised answer is one of the gold ones, else 0."""
  return float(any(normalised(answer) == normalised(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
  """Harmonic mean of the tokens' precision and recall, for the best gold answer.

  Two answers without tokens are equal.
  """
  def one(gold: str) -> float:
    found, wanted = normalised(answer).split(), normalised(gold).split()
    if not found or not wanted:
      return float(found == wanted)
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))

  return max(map(one, golds))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact_match": exact_match, "f1": f1}
