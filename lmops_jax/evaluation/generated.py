"""What generated answers score, by the name of a task's metric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from lmops_jax.evaluation import answers, captions, explained, meteor, rouge, vqa
from lmops_jax.evaluation.captions import Scores
from lmops_jax.evaluation.wordnet import WordNet

_OF_ONE: dict[str, Callable[[str, Sequence[str]], float]] = {
  **answers.METRICS, **rouge.METRICS, "vqa": vqa.accuracy, "explained": explained.label_accuracy}
_OF_EXPLANATIONS = {
  "explanation_cider": "CIDEr", "explanation_meteor": "METEOR", "explanation_rouge_l": "ROUGE-L"}
METRICS = (*_OF_ONE, "cider", "meteor", *_OF_EXPLANATIONS)


def score(
  metric: str, found: Sequence[str], golds: Sequence[Sequence[str]],
  wordnet: WordNet | None = None,
) -> Scores:
  """The score of answers against those that are right.

  Args:
    metric: "exact_match" and "f1" (SQuAD's), "rouge_1", "rouge_2" and "rouge_l" (of summaries),
      "vqa" (VQAv2's accuracy over people's answers), "meteor" (without paraphrases), "cider" (the
      whole corpus decides the weights), "explained" (accuracy of the labels that are explained) or
      one of their explanations.
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
  if metric in _OF_EXPLANATIONS:
    return explained.explanation_scores(found, golds, wordnet)[_OF_EXPLANATIONS[metric]]
  of_one = {**_OF_ONE, "meteor": functools.partial(meteor.meteor, wordnet=wordnet)}[metric]
  rows = np.array([of_one(answer, right) for answer, right in zip(found, golds)])
  return Scores(float(rows.mean()), rows)
