"""Methods whose prototypes are means of rows, found anew in every batch.

Prototypical networks (Snell et al. 2017, arXiv:1703.05175) have the mean of each class. Infinite
mixture prototypes (Allen et al. 2019, arXiv:1902.04552) let a class have several: one pass over the
rows opens a cluster at a row beyond the threshold, then each row is shared among the clusters of
its class and these become means again. Nothing but the encoder, and the mixture's variance, is
trained; the rows of a batch are told from a support beside them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.config.setting_types import Name, PositiveInt, component
from lmops_jax.control import dynamics
from lmops_jax.systems.prototypes import growth, learning, mixture
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.systems.prototypes.methods import Fitted, Material
from lmops_jax.systems.prototypes.mixture import Prototypes
from lmops_jax.systems.prototypes.stopping import train
from lmops_jax.training.learner import Learner
from lmops_jax.training.sources import Epochs

_ABSENT = -1e9  # the score of a class without a row
_NETWORK_VARIANCE = 0.5  # softmax of the negative squared distance


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Means:
  """Prototypical networks, or with `clusters` infinite mixture prototypes.

  Attributes:
    optimizer: of the encoder's trained layers, and of the variance of clusters.
    label: name in the report.
    clusters: whether a class may have several means.
    growth: `alpha`, `quantile` and `variance` of the clusters' threshold.
    num_support: rows beside those of a batch that means are made of.
    num_epochs, batch_size: as `Prototypical` has them.
  """

  optimizer: optax.GradientTransformation
  label: Name = "protonet"
  clusters: bool = False
  growth: Growth = Growth()
  num_support: PositiveInt = 64
  num_epochs: PositiveInt = 10
  batch_size: PositiveInt = 32

  def fit(self, material: Material) -> Fitted:
    """See `Method`.

    Raises:
      ValueError: for targets that are numbers.
    """
    m = material
    if m.num_classes is None:
      raise ValueError(
        f"prototypes.Means {self.label!r} tells classes, and these targets are numbers; leave the "
        "method out."
      )
    variance = self._first_variance(m)
    params = {"encoder": m.top, "log_variance": np.float32(np.log(variance))}
    seconds, history = 0.0, ()
    if m.top or self.clusters:
      source, per_epoch = self._episodes(m)
      learner = _learner(m.encoder, self, m.num_classes, source.batch_size)
      done = train(learner, source, self.num_epochs, per_epoch, m, lambda: params)
      params, history, seconds = done
    kept = jax.jit(functools.partial(_found, self, m.num_classes))(
      m.encoder.all_vectors(params["encoder"], m.train), m.targets, params["log_variance"])

    def predict(rows):
      vectors = m.encoder.all_vectors(params["encoder"], rows)
      said = [_said(vectors[i : i + 256], *kept, params["log_variance"], m.num_classes)
              for i in range(0, len(vectors), 256)]
      return np.concatenate([np.asarray(jax.nn.log_softmax(of)) for of in said])

    figures = {"seconds": seconds} if history else {}
    return Fitted(predict, {**figures, "means": int(kept[2].sum())}, history)

  def _first_variance(self, m: Material) -> float:
    if not self.clusters:
      return _NETWORK_VARIANCE
    first = learning.first_prototypes(
      m.encoder.all_vectors(m.top, m.train), m.targets, m.num_classes, self.growth, 1, m.seed)
    return float(np.exp(first["prototypes"].log_variance))

  def _episodes(self, m: Material) -> tuple[Epochs, int]:
    """Batches with their support behind them, and steps of an epoch."""
    number = len(m.targets)
    size, support = min(self.batch_size, number), min(self.num_support, number)
    shards = 1 if m.partitioner is None else m.partitioner.num_batch_shards
    if (size + support) % shards:
      support -= (size + support) % shards

    def rows(index, epoch):
      rng = np.random.default_rng([m.seed, epoch, *index[:1]])
      index = np.concatenate([index, rng.choice(number, support, replace=False)])
      return {"hidden": m.train.hidden[index], "lengths": m.train.lengths[index],
              "label": m.targets[index], "example_id": index}

    return Epochs(rows, number, size, m.seed, by_epoch=True), number // size


def _found(method: Means, num_classes, vectors, labels, log_variance):
  """Centres `[K,D]`, their classes `[K]`, and which are in use, of rows `[n,D]`."""
  vectors = jnp.asarray(vectors, jnp.float32)
  own = labels[:, None] == jnp.arange(num_classes)
  counts = own.sum(axis=0)
  means = (own.T.astype(jnp.float32) @ vectors) / jnp.maximum(counts, 1)[:, None]
  classes, there = jnp.arange(num_classes, dtype=jnp.int32), counts > 0
  if not method.clusters:
    return means, classes, there
  room = method.growth.room(num_classes)
  blank = jnp.zeros((room, num_classes))
  centers = jnp.zeros((room, vectors.shape[1])).at[:num_classes].set(means)
  table = growth.new_table(classes, room, 1)
  table = table._replace(active=table.active & jnp.pad(there, (0, room - num_classes)))
  limit = jax.lax.stop_gradient(mixture.threshold(
    jnp.exp(log_variance), mixture.spread_of(means, there), method.growth.alpha,
    vectors.shape[1]))
  grown, table, _ = growth.create(
    Prototypes(jax.lax.stop_gradient(centers), blank, log_variance), table,
    jax.lax.stop_gradient(vectors), labels, jnp.zeros((len(vectors), num_classes)), limit, 1)
  same = table.active & (labels[:, None] == table.label)
  shares = jax.nn.softmax(jnp.where(
    same, -mixture.squared_distances(vectors, grown.centers) / (2 * jnp.exp(log_variance)),
    -jnp.inf), axis=1)
  mass = shares.sum(axis=0)
  centers = shares.T @ vectors / jnp.maximum(mass, 1e-6)[:, None]
  return centers, table.label, table.active & (mass > 1e-3)


def _said(vectors, centers, classes, used, log_variance, num_classes):
  """`[B,C]` scores: minus the squared distance to the class's nearest mean over twice the variance.
  """
  scores = -mixture.squared_distances(vectors, centers) / (2 * jnp.exp(log_variance))
  of_class = used & (classes == jnp.arange(num_classes)[:, None])  # [C,K]
  return jnp.max(jnp.where(of_class, scores[:, None], _ABSENT), axis=2)


@functools.lru_cache(maxsize=8)
def _learner(encoder, method: Means, num_classes: int, batch_size: int) -> Learner:
  """Descends the loss of a batch's first rows, told from the means of all of its rows."""
  optimizer = method.optimizer

  def init(key, params=None):
    if params is None:
      params = {"encoder": encoder.init_top(key), "log_variance": jnp.zeros(())}
    return dynamics.init_state(optimizer.init, optimizer.update, params)

  def objective(params, batch, key):
    keys = jax.random.split(key, len(batch["label"]))
    vectors = encoder.vectors(params["encoder"], batch, keys).astype(jnp.float32)
    variance = params["log_variance"]
    if not method.clusters:
      variance = jax.lax.stop_gradient(variance)
    kept = _found(method, num_classes, vectors, batch["label"], variance)
    said = _said(vectors[:batch_size], *kept, variance, num_classes)
    label = batch["label"][:batch_size]
    losses = optax.softmax_cross_entropy_with_integer_labels(said, label)
    return losses.mean(), (losses, jnp.argmax(said, axis=1) == label)

  def step(state: Any, batch, key):
    (value, (losses, right)), grads = jax.value_and_grad(objective, has_aux=True)(
      state.params, batch, key)
    norm = optax.tree.norm(grads)
    return dynamics.apply_update(optimizer.update, state, grads), {
      "loss_sum": losses.sum(), "objective": value, "grad_norm": norm,
      "num_examples": jnp.asarray(len(losses), jnp.int32),
      "nonfinite": 1 - (jnp.isfinite(value) & jnp.isfinite(norm)).astype(jnp.int32),
      "accuracy_sum": right.sum().astype(jnp.float32)}

  return Learner(init, step, lambda state: state.params, settings={"batch_size": batch_size})
