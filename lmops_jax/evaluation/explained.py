"""Labels that are explained, `LABEL because EXPLANATION.`: accuracy, and captions' figures.

As MetaLM measures e-SNLI-VE (arXiv:2206.06336, section 4.4): the label by accuracy, the explanation
as a caption. All explanations count, also those of wrong labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmops_jax.evaluation import captions
from lmops_jax.evaluation.answers import normalised
from lmops_jax.evaluation.captions import Scores
from lmops_jax.evaluation.meteor import meteor
from lmops_jax.evaluation.wordnet import WordNet

_BECAUSE = " because "


def parts(answer: str) -> tuple[str, str]:
  """Label and explanation of an answer; the latter is empty if nothing is said to be the cause."""
  label, _, explanation = answer.partition(_BECAUSE)
  return label.strip(), explanation.strip()


def label_accuracy(answer: str, golds: Sequence[str]) -> float:
  """1 if an answer has the label of one of the right ones, otherwise 0."""
  own = normalised(parts(answer)[0])
  return float(any(own == normalised(parts(gold)[0]) for gold in golds))


def explanations(
  found: Sequence[str], golds: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
  """The explanations of answers and of the right ones of each row."""
  return ([parts(answer)[1] for answer in found],
          [[parts(gold)[1] for gold in of_row] for of_row in golds])


def explanation_scores(
  found: Sequence[str], golds: Sequence[Sequence[str]], wordnet: WordNet | None = None
) -> dict[str, Scores]:
  """CIDEr, BLEU-1 to BLEU-4, ROUGE-L and METEOR of explanations, by name.

  Args:
    found: whole answers as they were generated; one without explanation scores 0.
    golds: of each row, the right answers.
    wordnet: tells METEOR synonyms; None for no such stage.

  Raises:
    ValueError: as `captions.cider`, naming the row.
  """
  own, right = explanations(found, golds)
  scores = captions.caption_scores(own, right)
  rows = np.array([meteor(answer, of_row, wordnet) for answer, of_row in zip(own, right)])
  return {**scores, "METEOR": Scores(float(rows.mean()), rows)}
