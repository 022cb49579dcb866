"""Runs that end when held-out rows are told no better: the same as fewer epochs."""

import numpy as np
import pytest

from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.systems.prototypes import stopping
from lmops_jax.systems.prototypes.encoding import Encoded, Encoder, Encoding
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.systems.prototypes.methods import Head, Material, Prototypical
from lmops_jax.training.optimizers import adamw

WIDTH, N = 16, 520
CONFIG = TransformerConfig(
  vocab_size=8, num_layers=2, width=WIDTH, num_heads=2, mlp_width=16, max_length=8, causal=False)
OPTIMIZER = adamw(3e-2, b2=0.999, eps=1e-8, weight_decay=0.0)


def material(directory, number=N):
  """Rows that a third of the labels do not fit, so that learning goes too far."""
  rng = np.random.default_rng(0)
  targets = rng.integers(2, size=number).astype(np.int32)
  hidden = rng.normal(size=(number, 1, WIDTH)).astype(np.float32)
  hidden[:, 0, 0] += targets
  targets = np.where(rng.random(number) < 1 / 3, rng.integers(2, size=number), targets)
  rows = Encoded(hidden, np.ones(number, np.int32), 0)
  return Material(
    Encoder(CONFIG, Encoding(max_tokens=8)), {}, rows, targets.astype(np.int32), 2, 0, directory)


@pytest.mark.parametrize("make", [
  lambda **given: Head(OPTIMIZER, **given),
  lambda **given: Prototypical(
    OPTIMIZER, "proto", Growth(create=False, prunings_per_epoch=0), **given)],
  ids=["raw", "proto"])
def test_the_best_epoch_is_that_of_a_run_of_so_many(make, tmp_path):
  given = material(tmp_path / "stopped")
  stopped = make(num_epochs=40, patience=2).fit(given)
  best = len(stopped.history)
  losses = [record["held/loss"] for record in stopped.history]
  assert 1 <= best < 38 and losses[-1] == min(losses)
  rest, (held, targets) = stopping.parted(given, 2)
  assert len(rest.targets) == 468 and len(targets) == 52
  plain = make(num_epochs=best).fit(rest._replace(directory=tmp_path / "plain"))
  said = stopped.predict(held)
  np.testing.assert_array_equal(said, plain.predict(held))
  assert stopping.mean_loss(said, targets) == pytest.approx(losses[-1], rel=1e-6)
  again = make(num_epochs=40, patience=2).fit(given)  # in the same folder, as after a kill
  np.testing.assert_array_equal(again.predict(held), said)


def test_few_rows_and_lone_ones_are_learned_from(tmp_path):
  few = material(tmp_path, 499)
  assert stopping.parted(few, 1) == (few, None)
  given = material(tmp_path)
  assert stopping.parted(given, 0) == (given, None)
  lone = given._replace(targets=np.where(np.arange(N) == 9, 2, given.targets), num_classes=3)
  rest, (_, targets) = stopping.parted(lone, 1)
  assert np.sum(rest.targets == 2) == 1 and len(targets) == 51


def test_several_processes_do_not_stop_early(tmp_path, monkeypatch):
  monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="this job has 2 processes"):
    stopping.train(None, None, 1, 1, None, None, 1, lambda params: 0.0)
