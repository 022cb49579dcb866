"""Area, compression ratio and acceleration ratio of loss curves."""

import math

import numpy as np
import pytest

from lmops_jax.evaluation.learning_speed import (
  acceleration_ratio,
  compression_ratio,
  loss_auc,
)


def test_the_area_leaves_out_the_loss_before_training():
  assert loss_auc([100.0, 3.0, 2.0, 1.0]) == pytest.approx(2)
  assert loss_auc(np.float32([5, 4])) == 4


@pytest.mark.parametrize("vocab_size", [2, 5000])
def test_a_model_that_knows_nothing_compresses_by_one(vocab_size):
  losses = np.full(11, math.log(vocab_size))
  assert compression_ratio(losses, vocab_size) == pytest.approx(1, abs=1e-12)
  assert compression_ratio(losses / 2, vocab_size) == pytest.approx(2)


def test_the_compression_ratio_has_no_unit():
  losses = np.random.default_rng(0).uniform(0.1, 3, size=20)
  bits = losses / math.log(2)
  want = 19 * math.log(7) / losses[1:].sum()
  assert compression_ratio(losses, 7) == pytest.approx(want, rel=1e-12)
  assert compression_ratio(bits, 7, "bits") == pytest.approx(want, rel=1e-12)


def test_no_loss_at_all_compresses_without_bound():
  assert compression_ratio([0.7, 0.0, 0.0], 2) == math.inf


@pytest.mark.parametrize("kw, message", [
  (dict(unit="hartleys"), "unit='hartleys' is not one of nats, bits"),
  (dict(vocab_size=1), "vocab_size=1 must be at least 2"),
])
def test_arguments_of_the_compression_ratio(kw, message):
  with pytest.raises(ValueError, match=message):
    compression_ratio([1.0, 1.0], **({"vocab_size": 2} | kw))


def test_acceleration_is_by_the_first_step_that_is_as_good_as_the_end():
  base = [9.0, 8.0, 7.0, 6.0, 5.0]
  # First at step 2, worse again later.
  assert acceleration_ratio(base, [9.0, 6.0, 4.9, 5.5, 4.0]) == 4 / 2
  assert acceleration_ratio(base, [9.0, 6.0, 5.0, 5.5, 5.5]) == 4 / 2  # as good counts
  assert acceleration_ratio(base, base) == 1
  assert acceleration_ratio(base, [9.0, 4.0, 6.0, 6.0, 6.0]) == 4


def test_acceleration_that_is_not_reached_is_none():
  assert acceleration_ratio([9.0, 8.0, 5.0], [9.0, 8.0, 5.0000001]) is None
  # The start is no step: a run that only ever gets worse is not faster.
  assert acceleration_ratio([5.0, 6.0, 5.0], [5.0, 6.0, 7.0]) is None


def test_published_acceleration():
  """AR 5.50 at T = 2000 is step 364; 2.41 at T = 4000 is step 1660."""
  for num_steps, step, want in ((2000, 364, 5.50), (4000, 1660, 2.41)):
    new = np.where(np.arange(num_steps + 1) < step, 2.0, 1.0)
    base = np.linspace(2, 1, num_steps + 1)
    assert acceleration_ratio(base, new) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("losses, message", [
  ([1.0], r"shape \(1,\); expected \[T \+ 1\], T >= 1"),
  ([[1.0, 2.0]], r"shape \(1, 2\)"),
  ([1.0, 2.0, float("nan"), 1.0], "the loss after step 2 is not finite"),
  ([1.0, float("inf")], "the loss after step 1 is not finite"),
])
def test_what_is_no_curve(losses, message):
  for measure in (loss_auc, lambda x: compression_ratio(x, 2), lambda x: acceleration_ratio(x, x)):
    with pytest.raises(ValueError, match=message):
      measure(losses)
