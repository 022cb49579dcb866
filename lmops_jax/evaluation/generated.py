"""What generated answers score, by the name of a task's metric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from lmops_jax.evaluation import answers, captions, explained, meteor, rouge, vqa
from lmops_jax.evaluation.caption_tokens import tokenised
from lmops_jax.evaluation.captions import Scores
from lmops_jax.evaluation.wordnet import WordNet

_OF_ONE: dict[str, Callable[[str, Sequence[str]], float]] = {
  **answers.METRICS, **rouge.METRICS, "vqa": vqa.accuracy, "explained": explained.label_accuracy}
_OF_EXPLANATIONS = {
  "explanation_cider": "CIDEr", "explanation_meteor": "METEOR", "explanation_rouge_l": "ROUGE-L"}
_BLEU = {f"bleu_{n}": n for n in range(1, 5)}
_OF_EXPLANATIONS |= {f"explanation_{name}": f"BLEU-{n}" for name, n in _BLEU.items()}
_OF_CORPUS = (*_BLEU, *(f"explanation_{name}" for name in _BLEU))
METRICS = (*_OF_ONE, "cider", "meteor", *_BLEU, *_OF_EXPLANATIONS)


def score(
  metric: str, found: Sequence[str], golds: Sequence[Sequence[str]],
  wordnet: WordNet | None = None,
) -> Scores:
  """The score of answers against those that are right.

  Args:
    metric: "exact_match" and "f1" (SQuAD's), "rouge_1", "rouge_2" and "rouge_l" (of summaries),
      "vqa" (VQAv2's accuracy over people's answers), "meteor" (without paraphrases), "cider" (the
      whole corpus decides the weights), "bleu_1" to "bleu_4" (of captions), "explained" (accuracy
      of the labels that are explained) or one of their explanations.
    found: what was generated, one for each row.
    golds: of each row, the right answers or captions.
    wordnet: tells METEOR synonyms; None for no such stage.

  Returns:
    The corpus' figure, but for CIDEr the mean over rows, and each row's.

  Raises:
    ValueError: an unknown metric, different numbers of both or none, or what the metric refuses.
  """
  if metric not in METRICS:
    raise ValueError(
      f"there is no metric {metric!r} of generated answers; give one of {', '.join(METRICS)}.")
  if len(found) != len(golds) or not found:
    raise ValueError(
      f"{len(found)} answers and the right ones of {len(golds)} rows are given; give one answer a "
      "row, and at least one."
    )
  if metric == "cider":
    return captions.caption_scores(found, golds)["CIDEr"]
  if metric in _BLEU:
    return captions.caption_scores(found, golds)[f"BLEU-{_BLEU[metric]}"]
  if metric in _OF_EXPLANATIONS:
    return explained.explanation_scores(found, golds, wordnet)[_OF_EXPLANATIONS[metric]]
  of_one = {**_OF_ONE, "meteor": functools.partial(meteor.meteor, wordnet=wordnet)}[metric]
  rows = np.array([of_one(answer, right) for answer, right in zip(found, golds)])
  return Scores(float(rows.mean()), rows)


def of_corpus(
  metric: str, found: Sequence[str], golds: Sequence[Sequence[str]]
) -> Callable[[np.ndarray], float] | None:
  """The figure of some rows together, `(numbers of rows) -> figure`, where it is no mean over rows.

  Arguments as for `score`.

  Returns:
    None for metrics that are means over rows.
  """
  if metric not in _OF_CORPUS:
    return None
  order = int(metric[-1]) - 1
  if metric not in _BLEU:
    found, golds = explained.explanations(found, golds)
  counts = captions.bleu_counts(
    [tokenised(one) for one in found], [[tokenised(one) for one in of_row] for of_row in golds])
  return lambda rows: float(captions.corpus_bleu(counts, rows)[order])
