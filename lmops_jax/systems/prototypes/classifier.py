"""A classifier to ship: encoder, prototypes and the rows behind them, in one folder.

The folder holds `encoder/`, a model as `pretrained` writes it, `params/`, the trained layers,
prototypes and table, `vectors.npy`, where the rows it has learned from lie, and `classifier.json`
with those rows, the names of the classes and how the encoder reads.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from lmops_jax.host.foreign_files import read_json
from lmops_jax.host.whole_files import new_folder, write_json
from lmops_jax.mesh.checkpoints import load_params, save_params
from lmops_jax.pretrained import model as model_lib
from lmops_jax.systems.prototypes import mixture
from lmops_jax.systems.prototypes.encoding import Encoded, Encoding
from lmops_jax.systems.prototypes.growth import Table
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.systems.prototypes.methods import Material, Prototypical, told
from lmops_jax.systems.prototypes.mixture import Prototypes
from lmops_jax.systems.prototypes.texts import Input, TextReader
from lmops_jax.training.optimizers import adamw

FILE, PARAMS, ENCODER, VECTORS = "classifier.json", "params", "encoder", "vectors.npy"
OF_RUN = "classifier/kept"  # below a run's workdir
_FORMAT = 1


class _Described(pydantic.BaseModel):
  """What `classifier.json` holds."""

  format: Literal[_FORMAT]
  names: list[str]
  encoding: dict[str, Any]
  texts: list[str] | list[tuple[str, str]]
  targets: list[int]


class Behind(NamedTuple):
  """A prototype behind a prediction.

  Attributes:
    prototype: its slot.
    weight: its importance for the input, in (0, 1].
    label: the class that it was born for.
    text: the row nearest to it of those that were learned from, a text or a pair.
  """

  prototype: int
  weight: float
  label: Any
  text: Input


class Prototype(NamedTuple):
  """What is known of a prototype.

  Attributes:
    slot: its number.
    label: the class that it was born for.
    born: steps before it came in.
    weight: mean importance for the rows that were learned from.
    purity: share of the nearest of these rows that are of its class.
    texts: those rows, texts or pairs, nearest first.
  """

  slot: int
  label: Any
  born: int
  weight: float
  purity: float
  texts: list[Input]


class Classifier(ClassifierMixin, BaseEstimator):
  """Prototypical fine-tuning (arXiv:2211.13638) in scikit-learn's manner, on texts or pairs.

      Classifier("MiniLM").fit(texts, labels).predict_proba(texts)

  A pickle has the path of the encoder and not its frozen layers; `save` writes all into a folder.

  Args:
    model: what `pretrained.load` takes, a folder or file of an encoder or language model.
    tuned_layers, pooling, max_tokens: see `Encoding`.
    growth: see `Growth`; None is the usual one.
    num_epochs: over the rows.
    batch_size: rows of a step.
    learning_rate: of Adam.
    random_state: seed of all choices.
  """

  def __init__(
    self, model=None, *, tuned_layers: int = 0, pooling: str = "mean", max_tokens: int = 128,
    growth: Growth | None = None, num_epochs: int = 20, batch_size: int = 32,
    learning_rate: float = 1e-2, random_state: int = 0,
  ):
    self.model = model
    self.tuned_layers = tuned_layers
    self.pooling = pooling
    self.max_tokens = max_tokens
    self.growth = growth
    self.num_epochs = num_epochs
    self.batch_size = batch_size
    self.learning_rate = learning_rate
    self.random_state = random_state

  def fit(self, X, y):
    """Learns from texts `X [N]`, or pairs `X [N,2]`, and their labels `y [N]`, of any that sorts.

    Raises:
      ValueError: for no model, what is no text, unequal numbers, or fewer than two classes.
    """
    texts = _inputs(X)
    if y is None:
      raise ValueError("Classifier requires y to be passed, but the target y is None.")
    labels = column_or_1d(y, warn=True)
    check_classification_targets(labels)
    if len(labels) != len(texts):
      raise ValueError(
        f"y has {len(labels)} labels and there are {len(texts)} texts; give each one label.")
    self.classes_, targets = np.unique(labels, return_inverse=True)
    if len(self.classes_) < 2:
      raise ValueError("y has one class alone, and a classifier tells two or more apart.")
    if self.model is None:
      raise ValueError("Classifier has no model; give the path of an encoder or language model.")
    encoding = Encoding(self.pooling, self.tuned_layers, self.max_tokens)
    self._open(model_lib.load(self.model), encoding)
    rows = self._reader.read(texts)
    method = Prototypical(
      adamw(self.learning_rate, b2=0.999, eps=1e-8, weight_decay=0.0),
      growth=self.growth or Growth(), num_epochs=self.num_epochs, batch_size=self.batch_size)
    with tempfile.TemporaryDirectory() as directory:
      fitted = method.fit(Material(
        self._reader.encoder, self._reader.top, rows, targets.astype(np.int32),
        len(self.classes_), self.random_state, Path(directory)))
    self._keep(fitted.params, texts, targets, rows)
    return self

  def predict_proba(self, X):
    """Probabilities `[N,C]` of the classes in the order of `classes_`."""
    check_is_fitted(self)
    found = told(self._reader.encoder, self.params_, self._read(X), len(self.classes_))
    found = np.exp(found.astype(np.float64))
    return found / found.sum(axis=1, keepdims=True)

  def predict(self, X):
    """The most likely class of each text, `[N]`."""
    said = self.predict_proba(X)
    return self.classes_[np.argmax(said, axis=1)]

  def explain(self, X, num: int = 3) -> list[list[Behind]]:
    """The prototypes that weigh most for each text, the heaviest first."""
    check_is_fitted(self)
    weights = self._weights(self._vectors(self._read(X)))
    near, table = self._nearest(1), self.params_["table"]
    order = np.argsort(-weights, axis=1, kind="stable")[:, :num]
    return [
      [Behind(int(k), float(w[k]), self.classes_[table.label[k]], self.texts_[near[int(k)][0]])
       for k in row if table.active[k]]
      for w, row in zip(weights, order)]

  def inspect(self, num: int = 10) -> list[Prototype]:
    """All prototypes with the `num` rows nearest to each."""
    check_is_fitted(self)
    table, weights = self.params_["table"], self._weights(self.vectors_).mean(axis=0)
    return [
      Prototype(
        k, self.classes_[table.label[k]], int(table.born[k]), float(weights[k]),
        float(np.mean(self.targets_[rows] == int(table.label[k]))), [self.texts_[i] for i in rows])
      for k, rows in self._nearest(num).items()]

  def save(self, folder) -> None:
    """Writes all that predicts into a new folder, for `load_classifier`."""
    check_is_fitted(self)
    names = [str(name) for name in self.classes_]
    write(folder, self._source, self.encoding_, names, self.params_, self.texts_,
          self.targets_, self.vectors_)

  def __getstate__(self):
    state = {**super().__getstate__()}
    for opened in ("_source", "_reader"):
      state.pop(opened, None)
    return state

  def __setstate__(self, state):
    super().__setstate__(state)
    if "params_" in state:  # the encoder is read from where it lies, and not kept in a pickle
      self._open(model_lib.load(self.model), self.encoding_)

  def _open(self, source, encoding):
    self._source, self._reader, self.encoding_ = source, TextReader(source, encoding), encoding

  def _keep(self, params, texts, targets, rows, vectors=None):
    self.params_, self.texts_, self.targets_ = params, list(texts), np.asarray(targets)
    self.vectors_ = self._vectors(rows) if vectors is None else vectors

  def _read(self, X) -> Encoded:
    inputs = _inputs(X)
    if isinstance(inputs[0], str) != isinstance(self.texts_[0], str):
      kinds = ["pairs of texts", "single texts"]
      raise ValueError(
        f"these are {kinds[isinstance(inputs[0], str)]}, and the classifier has learned from "
        f"{kinds[isinstance(self.texts_[0], str)]}; give those."
      )
    return self._reader.read(inputs)

  def _vectors(self, rows: Encoded):
    return self._reader.encoder.all_vectors(self.params_["encoder"], rows)

  def _weights(self, vectors):
    return np.exp(np.asarray(mixture.log_importance(
      self.params_["prototypes"], self.params_["table"].active, vectors)))

  def _nearest(self, num: int) -> dict[int, list[int]]:
    return nearest_rows(self.params_, self.vectors_, num)

  def __sklearn_tags__(self):
    tags = super().__sklearn_tags__()
    tags.input_tags.string, tags.input_tags.two_d_array = True, False
    tags.input_tags.one_d_array = True
    return tags


def load_classifier(folder) -> Classifier:
  """What `Classifier.save`, or a run of the system, has written.

  Raises:
    ValueError: for a folder of something else, or one that is damaged.
  """
  folder = Path(folder)
  if (folder / OF_RUN / FILE).is_file():
    folder = folder / OF_RUN
  if not (folder / FILE).is_file():
    raise ValueError(
      f"{str(folder)!r} holds no {FILE}; give a folder of Classifier.save, or the workdir of a "
      "finished run of lmops prototypes."
    )
  try:
    found = _Described.model_validate(read_json(folder / FILE))
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    raise ValueError(
      f"{folder / FILE} does not describe a classifier: {'.'.join(map(str, first['loc']))}: "
      f"{first['msg']}."
    ) from error
  encoding = Encoding(**found.encoding)
  made = Classifier(
    folder / ENCODER, tuned_layers=encoding.tuned_layers, pooling=encoding.pooling,
    max_tokens=encoding.max_tokens)
  made._open(model_lib.load(folder / ENCODER), encoding)
  made.classes_ = np.asarray(found.names)
  made._keep(
    load(folder / PARAMS), found.texts, found.targets, None, np.load(folder / VECTORS))
  return made


def write(folder, source, encoding: Encoding, names, params, texts, targets, vectors) -> None:
  """Writes a classifier's folder, see the module."""
  partial = new_folder(Path(folder))
  save(partial / PARAMS, params)
  np.save(partial / VECTORS, vectors)
  model_lib.save_model(partial / ENCODER, source, source.params())
  write_json(partial / FILE, {
    "format": _FORMAT, "names": list(names), "encoding": dataclasses.asdict(encoding),
    "texts": list(texts), "targets": [int(t) for t in targets]})
  partial.rename(folder)


def save(folder: Path, params: Mapping[str, Any]) -> None:
  """Writes what `methods.Prototypical` has trained, for `load`."""
  tree = {"prototypes": params["prototypes"]._asdict(), "table": params["table"]._asdict()}
  save_params(folder, {**tree, **({"encoder": params["encoder"]} if params["encoder"] else {})})


def load(folder: Path) -> dict[str, Any]:
  """What `save` wrote: `encoder`, {} if none of it was trained, `prototypes` and `table`."""
  found = load_params(folder)
  return {"encoder": found.get("encoder", {}), "prototypes": Prototypes(**found["prototypes"]),
          "table": Table(**found["table"])}


def nearest_rows(
  params: Mapping[str, Any], vectors: np.ndarray, num: int
) -> dict[int, list[int]]:
  """By slot in use the indices of the rows `vectors [N,D]` nearest to its prototype, nearest first.
  """
  centers = np.asarray(params["prototypes"].centers)
  return {
    int(k): np.argsort(
      np.square(vectors - centers[k]).sum(axis=1), kind="stable")[:num].tolist()
    for k in np.flatnonzero(params["table"].active)}


def _inputs(given) -> list[Input]:
  """Texts, or pairs of them, as a list of one kind."""
  if isinstance(given, str):
    raise ValueError("the texts are one text; give a list of texts.")
  found = [one if isinstance(one, str) else _pair(i, one) for i, one in enumerate(given)]
  if not found:
    raise ValueError("there are no texts; give one at least.")
  if len({isinstance(one, str) for one in found}) > 1:
    raise ValueError("some are single texts and some pairs; give all of one kind.")
  return found


def _pair(i, given) -> tuple[str, str]:
  pair = tuple(given) if isinstance(given, (tuple, list, np.ndarray)) else ()
  if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
    raise ValueError(
      f"text {i} is a {type(given).__name__}; give a list of texts, which may be empty ones, or of "
      "pairs of them."
    )
  return pair
