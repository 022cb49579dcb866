"""Contrastive tuning of the encoder before a logistic regression (SetFit, arXiv:2209.11055).

The trained layers learn from pairs of rows: the cosine of two rows of a class shall be 1, that of
rows of two classes 0. A logistic regression is then fit to the vectors of all rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.config.setting_types import Name, PositiveInt, component
from lmops_jax.models.layers import unit_length
from lmops_jax.systems.prototypes.encoding import Encoder
from lmops_jax.systems.prototypes.methods import Fitted, Frozen, Material
from lmops_jax.systems.prototypes.stopping import train
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Epochs


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Contrast:
  """SetFit: layers tuned by pairs of rows, then a logistic regression.

  Without trained layers it is the logistic regression alone.

  Attributes:
    optimizer: of the encoder's trained layers.
    label: name in the report.
    num_epochs: as many rows are read as by methods that go over the rows that often.
    batch_size: rows of a step, in pairs; fewer if there are fewer.
  """

  optimizer: optax.GradientTransformation
  label: Name = "setfit"
  num_epochs: PositiveInt = 10
  batch_size: PositiveInt = 32

  def fit(self, material: Material) -> Fitted:
    """See `Method`.

    Raises:
      ValueError: for targets that are numbers, or one class alone to learn from.
    """
    m, regression = material, Frozen("logistic")
    if m.num_classes is None:
      raise ValueError(
        f"prototypes.Contrast {self.label!r} tells classes, and these targets are numbers; leave "
        "the method out."
      )
    if len(np.unique(m.targets)) < 2:
      raise ValueError("all rows are of one class, and pairs of two are to be told apart.")
    if not m.top:
      return regression.fit(m)
    number = len(m.targets)
    rows_of_step = min(self.batch_size, number)
    per_epoch = number // rows_of_step
    source = _pairs(m, max(rows_of_step // 2, 1))
    init, losses = _objective(m.encoder)
    learner = supervised(init, losses, self.optimizer, keyed=True, partitioner=m.partitioner)
    done = train(learner, source, self.num_epochs, per_epoch, m, lambda: {"encoder": m.top})
    fitted = regression.fit(m._replace(top=done.params["encoder"]))
    return fitted._replace(figures={"seconds": done.seconds}, history=done.history)


def _pairs(m: Material, size: int) -> Epochs:
  """Batches of rows, each with another one, every second time of the same class.

  A row that is alone in its class is its own partner.
  """
  shards = 1 if m.partitioner is None else m.partitioner.num_batch_shards
  size = max(size // shards, 1) * shards
  of_class = [np.flatnonzero(m.targets == c) for c in range(m.num_classes)]
  of_others = [np.flatnonzero(m.targets != c) for c in range(m.num_classes)]

  def rows(index, epoch):
    rng = np.random.default_rng([m.seed, epoch, *index[:1]])
    same = np.arange(len(index)) % 2 == 0
    partners = np.array([
      _one(rng, of_class[m.targets[i]], i) if alike else rng.choice(of_others[m.targets[i]])
      for i, alike in zip(index, same)])
    return {
      "hidden": m.train.hidden[index], "lengths": m.train.lengths[index],
      "other_hidden": m.train.hidden[partners], "other_lengths": m.train.lengths[partners],
      "same": same.astype(np.float32), "example_id": index}

  return Epochs(rows, len(m.targets), size, m.seed, by_epoch=True)


def _one(rng, rows, but):
  """Any of the rows but one, unless it is the only one."""
  others = rows[rows != but]
  return rng.choice(others) if len(others) else but


@functools.lru_cache(maxsize=8)
def _objective(encoder: Encoder):
  """`init` and the loss of each pair: the squared error of its cosine."""

  def init(key):
    return {"encoder": encoder.init_top(key)}

  def losses(params, batch):
    both = {name: jnp.concatenate([batch[name], batch[f"other_{name}"]])
            for name in ("hidden", "lengths")}
    keys = jnp.concatenate([batch["key"], jax.vmap(jax.random.fold_in, (0, None))(batch["key"], 1)])
    vectors = unit_length(encoder.vectors(params["encoder"], both, keys), 1e-12)
    first, second = jnp.split(vectors, 2)
    return jnp.square(jnp.sum(first * second, axis=1) - batch["same"])

  return init, losses
