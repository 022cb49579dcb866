"""What is measured under a policy, against plain NumPy and jax.grad."""

import json

import numpy as np
import pytest

from lmops_jax.data import sampling
from lmops_jax.systems.learning_law import evaluate, policies
from lmops_jax.systems.learning_law.evaluate import Evaluate

CONFIG = Evaluate(other_inits=(9,), sampled_batch_size=6, sampled_every=4)


def _policy(seed=0):
  weights = np.random.default_rng(seed).dirichlet(np.full(18, 0.3), size=8)
  weights[:, :5] = 0
  weights[2] = np.eye(18)[7]
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def measured(task, training, device, tmp_path_factory):
  from lmops_jax.stages import pipeline

  folder = tmp_path_factory.mktemp("evaluate")
  context = pipeline.StageContext("evaluate", folder, {}, lambda text: None)
  evaluate.run(
    context, config=CONFIG, task=task, training=training, seed=0, partitioner=device,
    optimised={"made-up": _policy()}, practical=[policies.RHO(), policies.LossProportional()],
  )
  return (*evaluate.load(folder), context)


def _find(records, policy, kind="weights", seed=0):
  wanted = (policy, kind, seed)
  return next(r for r in records if (r["policy"], r["kind"], r["init_seed"]) == wanted)


def test_every_policy_is_run_from_every_start_it_should(measured):
  records, _, context = measured
  runs = {(r["policy"], r["kind"], r["init_seed"]) for r in records}
  assert runs == {
    *((p, "weights", 0) for p in ("uniform", "made-up", "rho", "loss")),
    *((p, "weights", 9) for p in ("uniform", "made-up")),
    *((p, "batches", 0) for p in ("uniform", "made-up")),
  }
  assert context.flops > 0
  json.dumps(records, allow_nan=False)


def test_losses_and_statistics_equal_a_plain_run(measured, task, training, device):
  records, series, _ = measured
  record, weights = _find(records, "made-up"), _policy()
  theta = np.asarray(training.on(task, 0, device).params["theta"], np.float64)
  parts = {part: (batch["inputs"].astype(np.float64), batch["labels"].astype(np.float64))
           for part, batch in task.parts.items()}

  def residual(part, theta):
    x, y = parts[part]
    return x, 1 / (1 + np.exp(-x @ theta)) - y

  def loss(part, theta):
    x, y = parts[part]
    return np.mean(np.logaddexp(0, x @ theta) - y * (x @ theta))

  losses, similar, excluded, harmful = [loss("test", theta)], [], 0, 0
  for row in weights:
    x, r = residual("test", theta)
    target = x.T @ r / len(r)
    x, r = residual("train", theta)
    contribution = r * (x @ target)
    active = row > 0
    mean = row @ contribution
    spread = np.sqrt(np.sum((contribution[active] - mean) ** 2) / max(active.sum() - 1, 1))
    similar.append(np.inf if active.sum() == 1 else mean / spread)
    harmful += np.sum(contribution <= 0)
    excluded += np.sum((contribution <= 0) & ~active)
    theta = theta - 0.3 * x.T @ (row * r)
    losses.append(loss("test", theta))
  np.testing.assert_allclose(series["made-up/weights/0/loss_test"], losses, rtol=1e-5)
  np.testing.assert_allclose(series["made-up/weights/0/similarity_test"], similar, rtol=2e-3)
  finite = np.isfinite(similar)
  np.testing.assert_allclose(record["similarity_test"], np.mean(np.array(similar)[finite]),
                             rtol=2e-3)
  assert record["similarity_test_left_out"] == 1
  np.testing.assert_allclose(record["excluded_share_test"], excluded / harmful)
  np.testing.assert_allclose(record["auc_test"], np.mean(losses[1:]), rtol=1e-5)
  np.testing.assert_allclose(
    record["compression_ratio_test"], np.log(2) / np.mean(losses[1:]), rtol=1e-5)
  noise = weights[:, task.is_noise].sum(axis=1)
  np.testing.assert_allclose(series["made-up/weights/0/noise_weight"], noise, rtol=1e-5)
  np.testing.assert_allclose(record["zero_share"], np.mean(weights == 0), rtol=1e-5)
  np.testing.assert_array_equal(
    series["made-up/weights/0/num_active"], (weights > 0).sum(axis=1))


def test_comparison_with_uniform_weights_of_the_same_start(measured):
  records, series, _ = measured
  for kind, seed in (("weights", 0), ("weights", 9), ("batches", 0)):
    base = _find(records, "uniform", kind, seed)
    assert base["auc_change_test"] == 0
    other = _find(records, "made-up", kind, seed)
    np.testing.assert_allclose(
      other["auc_change_test"], other["auc_test"] / base["auc_test"] - 1)
  base = _find(records, "uniform")
  assert base["acceleration_test"] == 1.0
  end = series["uniform/weights/0/loss_test"][-1]
  curve = series["rho/weights/0/loss_test"]
  reached = np.flatnonzero(curve[1:] <= end)
  want = 8 / (reached[0] + 1) if reached.size else None
  assert _find(records, "rho")["acceleration_test"] == want


def test_the_adjoint_measures_belong_to_known_weights_only(measured):
  records, _, _ = measured
  assert _find(records, "uniform")["gap"] > 0
  assert _find(records, "made-up")["adjoint_similarity"] is not None
  assert "gap" not in _find(records, "rho") and "gap" not in _find(records, "made-up", seed=9)


def test_batches_are_drawn_by_the_steps_weights(task):
  weights = _policy()
  batch_at = evaluate.batches_by(weights, task, 6, seed=3)
  for step in (0, 2, 30):
    rows = sampling.draw(weights[min(step, 7)], 6, 3, step)
    batch = batch_at(step)
    np.testing.assert_array_equal(batch["inputs"], task.parts["train"]["inputs"][rows])
    np.testing.assert_array_equal(batch["example_id"], rows)
  assert (batch_at(2)["example_id"] == 7).all()


def test_training_on_drawn_batches_equals_a_plain_loop(measured, task, training, device):
  _, series, _ = measured
  theta = np.asarray(training.on(task, 0, device).params["theta"], np.float64)
  batch_at = evaluate.batches_by(_policy(), task, 6, seed=0)
  losses = []
  for step in range(9):
    if step % 4 == 0:
      x, y = (task.parts["test"][k].astype(np.float64) for k in ("inputs", "labels"))
      losses.append(np.mean(np.logaddexp(0, x @ theta) - y * (x @ theta)))
    if step < 8:
      batch = batch_at(step)
      x, y = batch["inputs"].astype(np.float64), batch["labels"].astype(np.float64)
      theta = theta - 0.3 * x.T @ (1 / (1 + np.exp(-x @ theta)) - y) / 6
  np.testing.assert_array_equal(series["made-up/batches/0/step"], [0, 4, 8])
  np.testing.assert_allclose(series["made-up/batches/0/loss_test"], losses, rtol=1e-5)


def test_divergence_under_a_policy_is_named(task, device, context_at, tmp_path):
  import optax

  from lmops_jax.systems.learning_law.inner import Training

  with pytest.raises(FloatingPointError, match=r"under the policy 'uniform' \(seed 0\) diverged"):
    evaluate.run(
      context_at(tmp_path), config=Evaluate(), task=task, seed=0, partitioner=device,
      training=Training(8, optax.sgd(lambda step: np.inf)), optimised={}, practical=[])


def test_settings_are_checked():
  with pytest.raises(ValueError, match="sampled_batch_size=0"):
    Evaluate(sampled_batch_size=0)
  with pytest.raises(ValueError, match="sampled_every=0"):
    Evaluate(sampled_every=0)
