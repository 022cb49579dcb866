"""Methods that learn a classifier from an encoder's vectors, under one protocol.

Prototypical fine-tuning and its ablations are one method with other settings of `Growth`: `proto`
(one prototype a class that stays), `fixed` (five a class by k-means). `Head` is plain fine-tuning,
and `Frozen` what people use on vectors that are not trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.config.setting_types import Count, Name, Positive, PositiveInt, component
from lmops_jax.models.partitioning import unboxed
from lmops_jax.systems.prototypes import learning, mixture, stopping
from lmops_jax.systems.prototypes.encoding import Encoded, Encoder
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Epochs

_TOLD_AT_ONCE = 256


class Material(NamedTuple):
  """What a method is given.

  Attributes:
    encoder: makes vectors.
    top: the trained layers as they are before any training, {} if there are none.
    train: rows to learn from.
    targets: `[N] int32` classes, or `float32` numbers.
    num_classes: None if targets are numbers.
    seed: of all choices.
    directory: where a training run may stand; it is looked into after a kill.
    partitioner: mesh and rules, or None.
    describe: the run's name in progress lines.
  """

  encoder: Encoder
  top: Any
  train: Encoded
  targets: np.ndarray
  num_classes: int | None
  seed: int
  directory: Path
  partitioner: Any = None
  describe: str = "train"


class Fitted(NamedTuple):
  """What a method has learned.

  Attributes:
    predict: rows to log-probabilities `[N,C]`, or to values `[N]` if targets are numbers.
    figures: numbers for the report.
    history: records of a training run, () if there is none.
    params: what predicts, a tree to keep; None if the method keeps nothing.
  """

  predict: Callable[[Encoded], np.ndarray]
  figures: Mapping[str, float] = {}
  history: tuple = ()
  params: Any = None


@runtime_checkable
class Method(Protocol):
  """A setting with a `label`."""

  def fit(self, material: Material) -> Fitted:
    """Learns from the rows; raises ValueError for targets of a kind that it does not tell."""


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Prototypical:
  """Prototypical fine-tuning (arXiv:2211.13638) and what its settings leave of it.

  Attributes:
    optimizer: of the encoder's trained layers and of the prototypes.
    label: name in the report.
    growth: how prototypes begin, come and go.
    num_epochs: over the rows.
    batch_size: rows of a step, fewer if there are fewer.
    patience: epochs without a better loss of held-out rows after which it ends, see `stopping`; 0
      goes through all epochs. While prototypes come in, the loss often rises for an epoch or two.
  """

  optimizer: optax.GradientTransformation
  label: Name = "pfit"
  growth: Growth = Growth()
  num_epochs: PositiveInt = 10
  batch_size: PositiveInt = 32
  patience: Count = 0

  def fit(self, material: Material) -> Fitted:
    """See `Method`."""
    m, held = stopping.parted(material, self.patience)
    source = _source(m, self.batch_size)
    per_epoch = len(m.targets) // source.batch_size
    edges = () if m.num_classes else tuple(
      learning.bin_edges(m.targets, self.growth.bins).tolist())
    learner = learning.prototypical(
      m.encoder.init_top, m.encoder.vectors, self.optimizer, self.growth,
      width=m.encoder.width, num_classes=m.num_classes, steps_per_epoch=per_epoch,
      num_epochs=self.num_epochs, edges=edges)
    first = learning.first_prototypes(
      m.encoder.all_vectors(m.top, m.train), m.targets, m.num_classes, self.growth,
      self.growth.steps_of_window(per_epoch), m.seed)
    tell = functools.partial(told, m.encoder, num_classes=m.num_classes)
    done = stopping.train(
      learner, source, self.num_epochs, per_epoch, m, lambda: {"encoder": m.top, **first},
      self.patience, held and (lambda params: stopping.mean_loss(tell(params, held[0]), held[1])))
    params = done.params
    table = params["table"]
    figures = {
      "prototypes": int(table.active.sum()), "created": int(table.created),
      "pruned": int(table.pruned), "suppressed": int(table.suppressed), "seconds": done.seconds,
      **{name: done.history[-1][name] for name in ("threshold", "variance", "spread")}}
    return Fitted(functools.partial(tell, params), figures, done.history, params)


def told(encoder: Encoder, params: Mapping[str, Any], rows: Encoded, num_classes: int | None):
  """What trained prototypes say of rows: log-probabilities `[N,C]`, or values `[N]`.

  Rows are told in batches of one size, so that what is said of a row depends on no other.
  """
  vectors = encoder.all_vectors(params["encoder"], rows)
  number, found = len(vectors), []
  vectors = np.pad(vectors, ((0, -number % _TOLD_AT_ONCE), (0, 0)))
  for first in range(0, number, _TOLD_AT_ONCE):
    weights = mixture.log_importance(
      params["prototypes"], params["table"].active, vectors[first : first + _TOLD_AT_ONCE])
    tell = mixture.log_probabilities if num_classes else mixture.values
    found.append(np.asarray(tell(weights, params["prototypes"].logits)))
  return np.concatenate(found)[:number]


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Head:
  """Plain fine-tuning: a linear head on the vector, and the same layers trained.

  Attributes:
    optimizer: of the encoder's trained layers and of the head.
    label, num_epochs, batch_size, patience: as `Prototypical` has them.
    rate_of_head: what the optimizer's updates of the head are multiplied with.
  """

  optimizer: optax.GradientTransformation
  label: Name = "raw"
  num_epochs: PositiveInt = 10
  batch_size: PositiveInt = 32
  patience: Count = 0
  rate_of_head: Positive = 1.0

  def fit(self, material: Material) -> Fitted:
    """See `Method`."""
    m, held = stopping.parted(material, self.patience)
    source = _source(m, self.batch_size)
    per_epoch = len(m.targets) // source.batch_size
    init, losses = _head(m.encoder, m.num_classes)
    optimizer = _with_head(self.optimizer, self.rate_of_head)
    learner = supervised(init, losses, optimizer, keyed=True, partitioner=m.partitioner)

    def start():
      fresh = jax.tree.map(np.asarray, unboxed(init(jax.random.key(m.seed))))
      return {**fresh, "encoder": m.top}

    def tell(params, rows):
      said = m.encoder.all_vectors(params["encoder"], rows) @ params["kernel"] + params["bias"]
      return np.asarray(jax.nn.log_softmax(said) if m.num_classes else said[:, 0])

    done = stopping.train(
      learner, source, self.num_epochs, per_epoch, m, start, self.patience,
      held and (lambda params: stopping.mean_loss(tell(params, held[0]), held[1])))
    return Fitted(functools.partial(tell, done.params), {"seconds": done.seconds}, done.history)


@functools.lru_cache(maxsize=8)
def _with_head(optimizer: optax.GradientTransformation, rate: float):
  """The optimizer with updates of all but the encoder multiplied; equal ones give the same."""
  if rate == 1:
    return optimizer

  def of_head(params):
    return {name: jax.tree.map(lambda _, own=name != "encoder": own, tree)
            for name, tree in params.items()}

  return optax.chain(optimizer, optax.masked(optax.scale(rate), of_head))


@functools.lru_cache(maxsize=8)
def _head(encoder: Encoder, num_classes: int | None):
  """`init` and the loss of each example, of a linear head."""
  shape = (encoder.width, num_classes or 1)

  def init(key):
    return {"encoder": encoder.init_top(key),
            "kernel": 0.02 * jax.random.normal(jax.random.fold_in(key, 1), shape),
            "bias": jnp.zeros(shape[1])}

  def losses(params, batch):
    vectors = encoder.vectors(params["encoder"], batch, batch["key"])
    found = vectors @ params["kernel"] + params["bias"]
    if num_classes:
      return optax.softmax_cross_entropy_with_integer_labels(found, batch["label"])
    return jnp.square(found[:, 0] - batch["target"])

  return init, losses


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Frozen:
  """A classical method on vectors that are not trained, its strength chosen by cross-validation.

  Attributes:
    kind: "logistic" regression, "discriminant" analysis with Ledoit and Wolf's shrinkage, or
      nearest "neighbours". For numbers: ridge regression, and neighbours.
  """

  kind: Literal["logistic", "discriminant", "neighbours"]

  @property
  def label(self) -> str:
    """The name in the report."""
    return self.kind

  def fit(self, material: Material) -> Fitted:
    """See `Method`."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    m = material
    vectors, number = m.encoder.all_vectors(m.top, m.train), m.num_classes
    if number is None and self.kind == "discriminant":
      raise ValueError(
        "prototypes.Frozen.kind='discriminant' tells classes, and these targets are numbers; leave "
        "the method out."
      )
    splits = _splits(m.targets, number, m.seed)
    model = make_pipeline(StandardScaler(), _estimator(self.kind, number, splits, len(vectors)))
    model.fit(vectors, m.targets)

    def predict(rows):
      given = m.encoder.all_vectors(m.top, rows)
      if number is None:
        return model.predict(given)
      found = np.full((len(given), number), 1e-12)
      found[:, model.classes_.astype(int)] = np.maximum(model.predict_proba(given), 1e-12)
      return np.log(found / found.sum(axis=1, keepdims=True))

    return Fitted(predict)


def _splits(targets, number, seed):
  """Folds of cross-validation, as many as the rarest class has rows, at most 5; None for 1."""
  from sklearn.model_selection import KFold, StratifiedKFold

  least = len(targets) if number is None else np.bincount(targets)[np.unique(targets)].min()
  if least < 2:
    return None
  kind = KFold if number is None else StratifiedKFold
  return kind(min(5, int(least)), shuffle=True, random_state=seed)


def _estimator(kind, number, splits, num_rows):
  from sklearn import discriminant_analysis, linear_model, neighbors
  from sklearn.model_selection import GridSearchCV

  strengths = 10.0 ** np.arange(-4, 3)
  if kind == "discriminant":
    return discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
  if kind == "neighbours":
    model = (neighbors.KNeighborsClassifier if number else neighbors.KNeighborsRegressor)
    base, grid = model(1), {"n_neighbors": [1, 3, 5, 9, 15]}
  elif number is None:
    return linear_model.RidgeCV(alphas=strengths * 1e4)
  else:
    base, grid = linear_model.LogisticRegression(max_iter=500), {"C": strengths}
  if splits is None:
    return base
  if kind == "neighbours":  # what is left of a fold must have as many rows
    most = num_rows - -(-num_rows // splits.n_splits)
    grid = {"n_neighbors": [k for k in grid["n_neighbors"] if k <= most]}
  return GridSearchCV(base, grid, cv=splits, scoring="neg_log_loss" if number else None)


def _source(m: Material, batch_size: int) -> Epochs:
  """Batches of the rows, the order a function of the seed; at most as large as there are rows."""
  number = len(m.targets)
  field = "label" if m.num_classes else "target"

  def rows(index):
    return {"hidden": m.train.hidden[index], "lengths": m.train.lengths[index],
            field: m.targets[index], "example_id": index}

  shards = 1 if m.partitioner is None else m.partitioner.num_batch_shards
  size = min(batch_size, number) // shards * shards
  if not size:
    raise ValueError(
      f"{number} rows do not fill a batch on {shards} devices; give more rows, or fewer devices."
    )
  return Epochs(rows, number, size, m.seed)
