"""Figures of merit of captions against several references, as the COCO evaluation computes them.

CIDEr-D (arXiv:1411.5726), BLEU-1 to 4 (Papineni et al. 2002, with the closest length of a
reference) and ROUGE-L (Lin 2004), equal to those of the package pycocoevalcap on the same words;
`caption_tokens.tokenised` makes these words. METEOR and SPICE are Java programs with tables of
paraphrases and a parser; they would be further functions of this form, from that package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.evaluation.caption_tokens import tokenised

_MAX_N = 4
_SIGMA = 6.0  # of CIDEr-D's penalty for another length, in words
_BETA = 1.2  # ROUGE-L's weight of recall
_SMALL, _TINY = 1e-9, 1e-15  # BLEU's, so that no quotient is 0 / 0


class Scores(NamedTuple):
  """A figure of merit.

  Attributes:
    corpus: of all captions together.
    rows: of each caption, `[N] float64`.
  """

  corpus: float
  rows: np.ndarray


def caption_scores(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Scores]:
  """CIDEr, BLEU-1 to BLEU-4 and ROUGE-L of captions as they were generated.

  Args:
    candidates: one caption for each picture; an empty one scores 0.
    references: of each picture, one or more captions.

  Returns:
    By name; papers print them times 100.

  Raises:
    ValueError: as `cider`, naming the row.
  """
  words = [tokenised(caption) for caption in candidates]
  right = [[tokenised(caption) for caption in captions] for captions in references]
  by_order = {f"BLEU-{n}": scores for n, scores in enumerate(bleu(words, right), 1)}
  return {"CIDEr": cider(words, right), **by_order, "ROUGE-L": rouge_l(words, right)}


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
  """CIDEr-D: cosine of n-grams weighted by their rarity among the pictures' references.

  The difference of lengths is counted in bigrams, as pycocoevalcap does. With references of a
  single picture every weight, and the score, is 0.

  Args:
    candidates: words with single blanks between them, one caption for each picture.
    references: of each picture, one or more captions, in the same form.

  Raises:
    ValueError: different numbers of both, or a picture without references or with an empty one.
  """
  _check(candidates, references)
  counts = [[_ngrams(caption) for caption in captions] for captions in references]
  frequency = Counter(ngram for of_picture in counts for ngram in set().union(*of_picture))
  log_num = math.log(len(candidates))
  weights = {ngram: log_num - math.log(df) for ngram, df in frequency.items()}

  def vector(of_caption: Counter) -> tuple[dict, np.ndarray, int]:
    """Weighted counts, their norm for each n, the number of bigrams."""
    weighted = {ngram: n * weights.get(ngram, log_num) for ngram, n in of_caption.items()}
    squares = np.zeros(_MAX_N)
    for ngram, weight in weighted.items():
      squares[len(ngram) - 1] += weight**2
    bigrams = sum(n for ngram, n in of_caption.items() if len(ngram) == 2)
    return weighted, np.sqrt(squares), bigrams

  rows = np.zeros(len(candidates))
  for i, (candidate, of_picture) in enumerate(zip(candidates, counts)):
    found, norm, length = vector(_ngrams(candidate))
    for of_reference in of_picture:
      right, right_norm, right_length = vector(of_reference)
      products = np.zeros(_MAX_N)
      for ngram, weight in found.items():
        if ngram in right:
          products[len(ngram) - 1] += min(weight, right[ngram]) * right[ngram]
      norms = norm * right_norm
      cosines = np.divide(products, norms, out=np.zeros(_MAX_N), where=norms != 0)
      rows[i] += cosines.mean() * math.exp(-((length - right_length) ** 2) / (2 * _SIGMA**2))
    rows[i] *= 10 / len(of_picture)
  return Scores(float(rows.mean()), rows)


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scores]:
  """BLEU-1 to BLEU-4: n-grams that a reference has, with a penalty for shorter captions.

  Of the references' lengths the closest counts, of two equally close the shorter.

  Args, Raises: see `cider`.

  Returns:
    The four, each with the whole corpus' counts put together and for each row.
  """
  counts = bleu_counts(candidates, references)
  corpus, rows = corpus_bleu(counts), _bleu(
    counts.right, counts.total, counts.lengths[:, None], counts.closest[:, None])
  return [Scores(float(corpus[n]), rows[:, n]) for n in range(_MAX_N)]


class BleuCounts(NamedTuple):
  """What BLEU counts of each caption.

  Attributes:
    right, total: `[N,4]`, n-grams that a reference has, and all.
    lengths, closest: `[N]`, words of the caption, and of the reference of the closest length.
  """

  right: np.ndarray
  total: np.ndarray
  lengths: np.ndarray
  closest: np.ndarray


def corpus_bleu(counts: BleuCounts, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
  """BLEU-1 to BLEU-4 of some captions together, `[4]`.

  Args:
    counts: of all. rows: the numbers of those that count, perhaps several times.
  """
  return _bleu(*(of[rows].sum(axis=0) for of in counts))


def bleu_counts(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> BleuCounts:
  """What `bleu` counts; arguments and errors as for `cider`."""
  _check(candidates, references)
  num = len(candidates)
  right, total = np.zeros((num, _MAX_N)), np.zeros((num, _MAX_N))
  lengths, closest = np.zeros(num), np.zeros(num)
  for i, (candidate, captions) in enumerate(zip(candidates, references)):
    most = Counter()
    for caption in captions:
      most |= _ngrams(caption)
    for ngram, n in (_ngrams(candidate) & most).items():
      right[i, len(ngram) - 1] += n
    lengths[i] = len(candidate.split())
    total[i] = np.maximum(lengths[i] - np.arange(_MAX_N), 0)
    sizes = [len(caption.split()) for caption in captions]
    closest[i] = min(sizes, key=lambda size: (abs(size - lengths[i]), size))
  return BleuCounts(right, total, lengths, closest)


def _bleu(right, total, length, closest) -> np.ndarray:
  """Geometric means of the precisions of n-grams up to each n, times the penalty, `[...,4]`."""
  precisions = np.cumprod((right + _TINY) / (total + _SMALL), axis=-1)
  ratio = (length + _TINY) / (closest + _SMALL)
  penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
  return precisions ** (1 / np.arange(1, _MAX_N + 1)) * penalty


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
  """ROUGE-L: the longest common subsequence, as F-measure of the best precision and best recall.

  Args, Raises: see `cider`.
  """
  _check(candidates, references)
  rows = np.zeros(len(candidates))
  for i, (candidate, captions) in enumerate(zip(candidates, references)):
    words = candidate.split()
    common = [(longest_common(words, right), len(right)) for right in map(str.split, captions)]
    precision = max(n for n, _ in common) / max(len(words), 1)
    recall = max(n / length for n, length in common)
    if precision and recall:
      rows[i] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
  return Scores(float(rows.mean()), rows)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
  """The length of the longest common subsequence."""
  row = [0] * (len(other) + 1)
  for word in one:
    diagonal = 0
    for j, right in enumerate(other, 1):
      above = row[j]
      row[j] = diagonal + 1 if word == right else max(above, row[j - 1])
      diagonal = above
  return row[-1]


def _ngrams(caption: str) -> Counter:
  """Counts of the 1- to 4-grams."""
  words = caption.split()
  return Counter(
    tuple(words[i : i + n]) for n in range(1, _MAX_N + 1) for i in range(len(words) - n + 1))


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
  if len(candidates) != len(references) or not candidates:
    raise ValueError(
      f"{len(candidates)} captions and references of {len(references)} pictures are given; give "
      "one caption a picture, and at least one."
    )
  for i, captions in enumerate(references):
    if isinstance(captions, str) or not captions or not all(c.split() for c in captions):
      raise ValueError(
        f"the references of row {i} are {captions!r}; expected a list of captions that are not "
        "empty."
      )
