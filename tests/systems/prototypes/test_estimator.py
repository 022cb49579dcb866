"""scikit-learn's own checks of estimators, as far as they apply to one that takes texts.

It runs one check alone on what says that it takes texts, and the others make rows of numbers. Here
rows become texts on their way in, a letter for each number, so that ours is asked them all.
"""

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

from lmops_jax.systems.prototypes import Classifier, Growth
from tests import model_folders

NOT_FOR_TEXTS = {
  "check_classifiers_train": "letters of a random encoder do not tell blobs of numbers apart",
}


class OfNumbers(Classifier):
  """A classifier of rows of numbers, which it writes as words."""

  def fit(self, X, y):
    return super().fit(_words(validate_data(self, X)), y)

  def predict_proba(self, X):
    return super().predict_proba(_words(validate_data(self, X, reset=False)))

  def __sklearn_tags__(self):
    tags = super().__sklearn_tags__()
    inputs = tags.input_tags
    inputs.two_d_array, inputs.one_d_array, inputs.string = True, False, False
    return tags


def _words(rows):
  """A letter for each number, another one every quarter."""
  places = np.round(4 * np.asarray(rows, np.float64)).astype(int) % 26
  return ["".join(chr(ord("a") + i) for i in row) for row in places]


def test_scikit_learn_finds_that_it_takes_texts():
  with pytest.warns(match="requires input.*string=True"):
    check_estimator(Classifier("model"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_s_checks(tmp_path):
  made = OfNumbers(
    model_folders.write(tmp_path / "model", num_layers=1), num_epochs=2, max_tokens=16,
    growth=Growth(create=False, prunings_per_epoch=0))
  found = check_estimator(made, expected_failed_checks=NOT_FOR_TEXTS)
  passed = {one["check_name"] for one in found if one["status"] == "passed"}
  assert len(passed) > 35
  failed = {one["check_name"] for one in found if one["status"] == "xfail"}
  assert failed == set(NOT_FOR_TEXTS), "a check that passes need not be left out"
