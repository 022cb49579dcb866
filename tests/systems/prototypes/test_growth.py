"""Prototypes created in the rows' order and pruned: against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.systems.prototypes import growth, mixture
from lmops_jax.systems.prototypes.mixture import Prototypes

CAPACITY, D, C, B = 12, 3, 2, 16
CREATE = jax.jit(growth.create)


def in_plain_python(prototypes, table, features, labels, limit, step):
  """The rule of principle 2, a row at a time."""
  centers = [np.asarray(c, np.float64) for c in prototypes.centers]
  label, active, born = (np.array(x) for x in (table.label, table.active, table.born))
  created = suppressed = 0
  for x, own in zip(features.astype(np.float64), labels):
    mine = [k for k in range(CAPACITY) if active[k] and label[k] == own]
    if min(np.sum((x - centers[k]) ** 2) for k in mine) <= limit:
      continue
    if active.all():
      suppressed += 1
      continue
    k = int(np.flatnonzero(~active)[0])
    centers[k], label[k], active[k], born[k] = x, own, True, step
    created += 1
  return np.array(centers), label, active, born, created, suppressed


def test_creation_follows_the_order_of_the_rows():
  rng = np.random.default_rng(0)
  several = full = 0
  for _ in range(50):
    used = rng.integers(C, CAPACITY)
    label = np.concatenate([np.arange(C), rng.integers(C, size=used - C)])
    prototypes = Prototypes(
      jnp.asarray(rng.normal(size=(CAPACITY, D)), jnp.float32),
      jnp.zeros((CAPACITY, C)), jnp.zeros(()))
    table = growth.new_table(jnp.asarray(label, jnp.int32), CAPACITY, 4)
    features = rng.normal(size=(B, D)).astype(np.float32)
    labels = rng.integers(C, size=B).astype(np.int32)
    limit = rng.uniform(1, 8)
    found, after, new = CREATE(
      prototypes, table, features, labels, mixture.first_logits(labels, C), limit, 7)
    centers, label, active, born, created, suppressed = in_plain_python(
      prototypes, table, features, labels, limit, 7)
    np.testing.assert_allclose(found.centers, centers, rtol=1e-6)
    np.testing.assert_array_equal(after.label, label)
    np.testing.assert_array_equal(after.active, active)
    np.testing.assert_array_equal(after.born, born)
    assert (int(after.created), int(after.suppressed)) == (created, suppressed)
    np.testing.assert_array_equal(new, np.asarray(after.active) & ~np.asarray(table.active))
    said = np.argmax(found.logits, axis=1)
    np.testing.assert_array_equal(said[np.asarray(new)], label[np.asarray(new)])
    several += created > 1
    full += suppressed > 0
  assert several > 10 and full > 3


def test_a_full_table_and_an_infinite_threshold_create_nothing():
  rng = np.random.default_rng(1)
  prototypes = Prototypes(
    jnp.asarray(rng.normal(size=(CAPACITY, D)), jnp.float32), jnp.zeros((CAPACITY, C)),
    jnp.zeros(()))
  features = rng.normal(size=(B, D)).astype(np.float32)
  labels = rng.integers(C, size=B).astype(np.int32)
  logits = mixture.first_logits(labels, C)
  full = growth.new_table(jnp.arange(CAPACITY, dtype=jnp.int32) % C, CAPACITY, 4)
  want = in_plain_python(prototypes, full, features, labels, 0.5, 7)[-1]
  found, after, new = CREATE(prototypes, full, features, labels, logits, 0.5, 7)
  assert int(after.suppressed) == want > 3 and int(after.created) == 0 and not new.any()
  np.testing.assert_array_equal(found.centers, prototypes.centers)
  few = growth.new_table(jnp.arange(C, dtype=jnp.int32), CAPACITY, 4)
  _, after, new = CREATE(prototypes, few, features, labels, logits, jnp.inf, 7)
  assert int(after.suppressed) == 0 and not new.any()


def test_the_window_weighs_late_steps_more():
  table = growth.new_table(jnp.arange(C, dtype=jnp.int32), CAPACITY, 4)
  for step in range(6):  # round the ring
    importance = jnp.zeros(CAPACITY).at[0].set(10.0**step).at[5].set(1.0)
    table = growth.remembered(table, importance, jnp.int32(step))
  found = growth.recent_importance(table, jnp.int32(5))
  want = (0.25 * 1e2 + 0.5 * 1e3 + 0.75 * 1e4 + 1e5) / 4
  assert float(found[0]) == pytest.approx(want, rel=1e-6)
  assert float(found[5]) == 0  # not in use


def test_the_least_important_goes_and_its_slot_is_filled_again():
  label = jnp.asarray([0, 0, 1, 1, 1], jnp.int32)
  table = growth.new_table(label, CAPACITY, 2)
  for step in range(2):
    importance = jnp.asarray([0.5, 0.1, 0.3, 0.06, 0.04] + [0.0] * (CAPACITY - 5))
    table = growth.remembered(table, importance, jnp.int32(step))
  one = growth.prune(table, jnp.int32(1), 1.0, 1)
  np.testing.assert_array_equal(np.flatnonzero(one.active), [0, 1, 2, 3])
  assert int(one.pruned) == 1 and np.all(one.window[:, 4] == 0)
  most = growth.prune(table, jnp.int32(1), 1.0, CAPACITY)  # all may go but the last of a class
  np.testing.assert_array_equal(np.flatnonzero(most.active), [0, 2])
  assert int(most.pruned) == 3
  none = growth.prune(table, jnp.int32(1), 0.01, CAPACITY)
  assert int(none.pruned) == 0
  young = growth.prune(table._replace(born=jnp.full(CAPACITY, 1)), jnp.int32(1), 1.0, CAPACITY)
  assert int(young.pruned) == 0
  prototypes = Prototypes(jnp.zeros((CAPACITY, D)), jnp.zeros((CAPACITY, C)), jnp.zeros(()))
  far = jnp.full((1, D), 9.0)
  _, again, new = growth.create(
    prototypes, one, far, jnp.array([1]), mixture.first_logits(jnp.array([1]), C), 1.0, 3)
  assert np.flatnonzero(new) == [4] and int(again.label[4]) == 1 and int(again.born[4]) == 3
