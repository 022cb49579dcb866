"""Prototypes that come and go while a model is trained (arXiv:2211.13638, principles 2, 3).

A row that is farther from all prototypes of its class than a threshold becomes a prototype. One
that has weighed next to nothing for a window of steps is taken away. Both are functions of arrays
of fixed shape.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.systems.prototypes import mixture
from lmops_jax.systems.prototypes.mixture import Prototypes


class Table(NamedTuple):
  """What is known of the K slots, and is not trained.

  Attributes:
    label: `[K] int32`, the class that a prototype was born for (the bin, if targets are numbers).
    active: `[K] bool`, the slots in use.
    born: `[K] int32`, the step after which a prototype came in; 0 for the first ones.
    window: `[W,K] float32`, mean importance in each of the last W steps, a ring.
    created, pruned, suppressed: `[] int32`, counts since the start; suppressed are the rows that
      found no room.
  """

  label: jax.Array
  active: jax.Array
  born: jax.Array
  window: jax.Array
  created: jax.Array
  pruned: jax.Array
  suppressed: jax.Array


def new_table(label: jax.Array, capacity: int, window: int) -> Table:
  """The table of the first prototypes, with the classes `label [n] int32`, `n <= capacity`."""
  number = len(label)
  zero = jnp.zeros((), jnp.int32)
  return Table(
    label=jnp.zeros(capacity, jnp.int32).at[:number].set(label),
    active=jnp.arange(capacity) < number, born=jnp.zeros(capacity, jnp.int32),
    window=jnp.zeros((window, capacity), jnp.float32), created=zero, pruned=zero, suppressed=zero)


def create(
  prototypes: Prototypes, table: Table, features: jax.Array, labels: jax.Array,
  logits: jax.Array, threshold: jax.Array, step: jax.Array,
) -> tuple[Prototypes, Table, jax.Array]:
  """Visits the rows in their order; those beyond the threshold become prototypes.

  A row sees the prototypes that earlier rows of the batch have become.

  Args:
    features: `[B,D]`, no gradient goes through them.
    labels: `[B] int32`, classes (or bins).
    logits: `[B,C]`, what a prototype made of the row says.
    threshold: squared distance; infinite creates nothing.
    step: steps done, this one included.

  Returns:
    Both with the new prototypes, and `[K] bool`, the slots that are new.
  """
  features = features.astype(jnp.float32)
  to_old = mixture.squared_distances(features, prototypes.centers)
  own = table.active & (labels[:, None] == table.label)
  beyond = jnp.min(jnp.where(own, to_old, jnp.inf), axis=1) > threshold

  def grown():
    return _grown(prototypes, table, features, labels, logits, threshold, step, to_old, beyond)

  def as_it_was():
    suppressed = table.suppressed + jnp.sum(beyond, dtype=jnp.int32)
    return prototypes, table._replace(suppressed=suppressed), jnp.zeros_like(table.active)

  # Most steps create nothing, and the visit of the rows one by one would be most of their cost.
  return jax.lax.cond(jnp.any(beyond) & ~jnp.all(table.active), grown, as_it_was)


def _grown(prototypes, table, features, labels, logits, threshold, step, to_old, beyond):
  """As `create`, visiting the rows `beyond [B]` alone: to the others no prototype gets farther."""
  to_rows = mixture.squared_distances(features, features)
  none = jnp.full(len(table.label), -1, jnp.int32)
  order = jnp.flatnonzero(beyond, size=len(beyond))

  def visit(number, carry):
    label, active, source, created, suppressed = carry
    i = order[number].astype(jnp.int32)
    own = labels[i].astype(jnp.int32)
    # A slot that this batch has filled is as far as the row it was made of.
    distances = jnp.where(source >= 0, to_rows[i][source], to_old[i])
    closest = jnp.min(jnp.where(active & (label == own), distances, jnp.inf))
    wanted = closest > threshold
    has_room = ~jnp.all(active)
    made = wanted & has_room
    slot = jnp.argmin(active)  # the first that is free
    here = made & (jnp.arange(len(active)) == slot)
    return (jnp.where(here, own, label), active | here, jnp.where(here, i, source),
            created + made, suppressed + (wanted & ~has_room))

  label, active, source, created, suppressed = jax.lax.fori_loop(
    0, jnp.sum(beyond), visit,
    (table.label, table.active, none, table.created, table.suppressed))
  new = source >= 0
  log_variance = prototypes.log_variance
  if log_variance.ndim:
    usual = jnp.log(mixture.variance_of(log_variance, table.active))
    log_variance = jnp.where(new, usual, log_variance)
  prototypes = Prototypes(
    jnp.where(new[:, None], features[source], prototypes.centers),
    jnp.where(new[:, None], logits.astype(jnp.float32)[source], prototypes.logits), log_variance)
  table = table._replace(
    label=label, active=active, born=jnp.where(new, step, table.born).astype(jnp.int32),
    window=jnp.where(new, 0, table.window), created=created, suppressed=suppressed)
  return prototypes, table, new


def remembered(table: Table, importance: jax.Array, step: jax.Array) -> Table:
  """The table with the mean importance `[K]` of step number `step`, counted from 0."""
  row = jnp.where(table.active, importance, 0)
  return table._replace(window=table.window.at[step % len(table.window)].set(row))


def recent_importance(table: Table, step: jax.Array) -> jax.Array:
  """`[K] float32`: the window's mean, weights 1 (latest step) to 1/W (oldest) (eq. 9)."""
  size = len(table.window)
  age = (step - jnp.arange(size)) % size  # of each row, 0 for that of `step`
  return ((size - age) / size) @ table.window / size


def prune(table: Table, step: jax.Array, least: float, most: int) -> Table:
  """Takes away at most `most` prototypes whose recent importance is below `least`, lowest first.

  Those that are younger than the window stay, and so does the last one of a class.

  Args:
    step: number of the step that was remembered last, counted from 0.
  """
  size = len(table.window)
  for _ in range(most):
    recent = recent_importance(table, step)
    same = (table.label[:, None] == table.label) & table.active
    is_last = jnp.sum(same, axis=1) <= 1
    old = step + 1 - table.born >= size
    may_go = table.active & old & ~is_last & (recent < least)
    slot = jnp.argmin(jnp.where(may_go, recent, jnp.inf))
    gone = may_go & (jnp.arange(len(may_go)) == slot)
    table = table._replace(
      active=table.active & ~gone, window=jnp.where(gone, 0, table.window),
      pruned=table.pruned + jnp.any(gone))
  return table
