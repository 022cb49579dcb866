"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries (Lin 2004): F-measures of shared words.

They equal those of the package rouge-score without stemming. Words are runs of letters a to z and
digits in lower case. COCO's ROUGE-L of captions is another one, see `captions.rouge_l`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from lmops_jax.evaluation.captions import longest_common

_WORD = re.compile(r"[a-z0-9]+")


def rouge_n(answer: str, golds: Sequence[str], n: int) -> float:
  """The F-measure of shared n-grams, 0 to 1, with the reference that fits best."""
  def ngrams(text):
    words = _words(text)
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

  own = ngrams(answer)

  def of(gold):
    right = ngrams(gold)
    return _f_measure((own & right).total(), own.total(), right.total())

  return max(map(of, golds))


def rouge_l(answer: str, golds: Sequence[str]) -> float:
  """The F-measure of the longest common subsequence, 0 to 1, with the reference that fits best."""
  own = _words(answer)

  def of(gold):
    right = _words(gold)
    return _f_measure(longest_common(own, right), len(own), len(right))

  return max(map(of, golds))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
  "rouge_1": functools.partial(rouge_n, n=1), "rouge_2": functools.partial(rouge_n, n=2),
  "rouge_l": rouge_l,
}


def _words(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def _f_measure(common: int, num_own: int, num_right: int) -> float:
  return 2 * common / (num_own + num_right) if common else 0.0
