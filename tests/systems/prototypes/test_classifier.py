"""The classifier to ship: as scikit-learn has it, kept in a folder, and why it decides."""

import json

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

from lmops_jax.systems.prototypes import Classifier, Growth, load_classifier
from tests import model_folders

RNG = np.random.default_rng(0)
LABELS = np.array(["cat", "dog"])[RNG.integers(2, size=48)]
TEXTS = ["".join(RNG.choice(list("abcd" if label == "cat" else "wxyz"), size=12))
         for label in LABELS]
HELD = ["abab", "zyxz", "", "dcba dcba"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return model_folders.write(tmp_path_factory.mktemp("model") / "made")


@pytest.fixture(scope="module")
def fitted(model):
  return Classifier(model, num_epochs=4, max_tokens=32, tuned_layers=1).fit(TEXTS, LABELS)


def test_it_tells_texts_apart(fitted):
  assert np.mean(fitted.predict(TEXTS) == LABELS) > 0.9
  said = fitted.predict_proba(HELD)
  assert said.shape == (4, 2) and np.allclose(said.sum(axis=1), 1)
  assert fitted.classes_.tolist() == ["cat", "dog"]
  np.testing.assert_array_equal(fitted.predict(HELD), fitted.classes_[said.argmax(axis=1)])
  assert fitted.score(TEXTS, LABELS) > 0.9


def test_it_is_an_estimator(model):
  made = Classifier(model, num_epochs=1, max_tokens=32, growth=Growth(create=False))
  copy = clone(made)
  assert copy is not made and copy.get_params() == made.get_params()
  assert copy.set_params(num_epochs=2).num_epochs == 2
  scores = cross_val_score(copy, np.array(TEXTS), LABELS, cv=2)
  assert scores.shape == (2,) and np.isfinite(scores).all()
  with pytest.raises(NotFittedError):
    made.predict(HELD)


def test_equal_seeds_give_equal_classifiers(model, fitted):
  again = clone(fitted).fit(TEXTS, LABELS)
  np.testing.assert_array_equal(again.predict_proba(HELD), fitted.predict_proba(HELD))


def test_a_folder_predicts_the_same(fitted, tmp_path):
  fitted.save(tmp_path / "kept")
  kept = load_classifier(tmp_path / "kept")
  np.testing.assert_array_equal(kept.predict_proba(HELD), fitted.predict_proba(HELD))
  assert kept.explain(HELD) == fitted.explain(HELD)
  assert kept.inspect(3) == fitted.inspect(3)
  with pytest.raises(ValueError, match="exists already"):
    fitted.save(tmp_path / "kept")


def test_why_it_decides(fitted):
  known = {one.slot: one for one in fitted.inspect(4)}
  assert np.mean([one.purity for one in known.values()]) > 0.9
  assert sum(one.weight for one in known.values()) == pytest.approx(1, abs=1e-4)
  for text, found, label in zip(HELD, fitted.explain(HELD), fitted.predict(HELD)):
    assert found[0].weight >= found[-1].weight
    assert found[0].text == known[found[0].prototype].texts[0]
    if text:
      assert found[0].label == label


def test_pairs_are_told_by_their_second_texts(fitted, tmp_path):
  pairs = [("same", text) for text in TEXTS]
  of_pairs = clone(fitted).fit(pairs, LABELS)
  assert of_pairs.score(np.array(pairs), LABELS) > 0.9
  assert of_pairs.explain(pairs[:1])[0][0].text in pairs
  of_pairs.save(tmp_path / "kept")
  kept = load_classifier(tmp_path / "kept")
  assert kept.inspect(2) == of_pairs.inspect(2)
  np.testing.assert_array_equal(kept.predict(pairs), of_pairs.predict(pairs))
  with pytest.raises(ValueError, match="these are single texts, and the classifier has learned f"):
    kept.predict(TEXTS)


@pytest.mark.parametrize("texts, labels, says", [
  ("one text", ["a"], "the texts are one text"),
  (["a", 3], ["a", "b"], "text 1 is a int"),
  (["a", ("b", "c")], ["a", "b"], "some are single texts and some pairs"),
  ([], [], "there are no texts"),
  (["a", "b"], ["x"], "y has 1 labels and there are 2 texts"),
  (["a", "b"], ["x", "x"], "y has one class alone"),
])
def test_bad_input_is_refused(model, texts, labels, says):
  with pytest.raises(ValueError, match=says):
    Classifier(model).fit(texts, labels)


def test_other_folders_are_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no classifier.json"):
    load_classifier(tmp_path)
  (tmp_path / "classifier.json").write_text(json.dumps({"format": 2}))
  with pytest.raises(ValueError, match="does not describe a classifier: format"):
    load_classifier(tmp_path)
  with pytest.raises(ValueError, match="Classifier has no model"):
    Classifier().fit(["a", "b"], [0, 1])
