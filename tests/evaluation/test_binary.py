"""The area under the ROC curve against all pairs, and what makes none."""

import numpy as np
import pytest

from lmops_jax.evaluation import binary


def test_the_area_is_the_share_of_pairs_in_order():
  draws = np.random.default_rng(0)
  scores, labels = draws.integers(6, size=40).astype(float), draws.integers(2, size=40)
  above = scores[labels == 1][:, None] - scores[labels == 0]
  wanted = ((above > 0) + 0.5 * (above == 0)).mean()
  assert binary.roc_auc(scores, labels) == pytest.approx(wanted)
  assert binary.roc_auc([0.1, 0.9], [0, 1]) == 1


def test_the_share_of_an_option():
  values = np.log([[0.02, 0.06], [0.5, 0.5]]) - 1000  # far below what exp alone can hold
  np.testing.assert_allclose(binary.share_of(values, 0), [0.25, 0.5])
  np.testing.assert_allclose(binary.share_of(values, 1), [0.75, 0.5])


@pytest.mark.parametrize("scores,labels,message", [
  ([0.1, 0.2], [0], r"the shapes \(2,\) and \(1,\)"),
  ([0.1, float("nan")], [0, 1], "the score of row 1 is nan"),
  ([0.1, 0.2], [1, 1], "the labels of a ROC curve are 1; it needs rows of both"),
  ([0.1, 0.2, 0.3], [0, 1, 2], "the labels of a ROC curve are 0, 1, 2"),
])
def test_bad_input(scores, labels, message):
  with pytest.raises(ValueError, match=message):
    binary.roc_auc(scores, labels)


def test_the_error_of_an_area_is_that_of_leaving_rows_out():
  """DeLong's variance is the jackknife's over the rows of each label apart."""
  rng = np.random.default_rng(4)
  labels = np.array([0] * 9 + [1] * 6)
  scores = np.round(rng.normal(size=15) + labels, 1)  # with ties
  assert len(set(scores)) < 15
  variance = 0
  for label in (0, 1):
    rows, num = np.flatnonzero(labels == label), (labels == label).sum()
    left = [binary.roc_auc(np.delete(scores, i), np.delete(labels, i)) for i in rows]
    pseudo = num * binary.roc_auc(scores, labels) - (num - 1) * np.array(left)
    variance += pseudo.var(ddof=1) / num
  assert binary.roc_auc_error(scores, labels) == pytest.approx(variance**0.5)
  assert np.isnan(binary.roc_auc_error([0.1, 0.2, 0.3], [0, 1, 0]))
