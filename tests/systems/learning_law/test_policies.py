"""Practical policies choose what they say, from the signals of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax import control
from lmops_jax.control import Signals
from lmops_jax.systems.learning_law import evaluate, policies

LOSSES = jnp.array([0.5, 2.0, 0.0, 1.5])
SLOPES = jnp.array([-1.0, 3.0, 0.0, 1.0])


@pytest.fixture(scope="module")
def bench(task, training, device):
  inner = training.on(task, 0, device)
  return policies.Bench(task, inner.control, inner.padded, lambda: inner.params)


def _signals(step=0, losses=LOSSES, slopes=SLOPES):
  return Signals(jnp.asarray(step), losses, {"dev": slopes})


def test_loss_and_alignment(bench):
  got = policies.LossProportional().choose(bench)(_signals())
  np.testing.assert_allclose(got, LOSSES / 4)
  got = policies.LossProportional(power=2.0).choose(bench)(_signals())
  np.testing.assert_allclose(got, LOSSES**2 / 6.5)
  got = policies.GradientAlignment().choose(bench)(_signals())
  np.testing.assert_allclose(got, [0, 0.75, 0, 0.25])
  got = policies.GradientAlignment().choose(bench)(_signals(slopes=-jnp.ones(4)))
  np.testing.assert_allclose(got, 0.25)  # nothing helps: uniform


def test_padded_rows_get_nothing(bench):
  mask = jnp.array([True, True, True, False])
  padded = bench._replace(run=bench.run.__class__(**{
    **{f: getattr(bench.run, f) for f in bench.run.__dataclass_fields__}, "mask": mask}))
  for policy in (policies.LossProportional(), policies.GradientAlignment()):
    for slopes in (SLOPES, -jnp.ones(4)):
      got = np.asarray(policy.choose(padded)(_signals(slopes=slopes)))
      assert got[3] == 0 and abs(got.sum() - 1) < 1e-6
  got = np.asarray(policies._best_share(LOSSES, 0.5, mask))
  np.testing.assert_allclose(got, [0.5, 0.5, 0, 0])  # 2 of 3, the fourth does not count


def test_curriculum_grows_in_the_order_of_difficulty(bench, task):
  choose = policies.Curriculum(start=1 / 3, pace=0.5).choose(bench)
  order = np.argsort(task.difficulty)
  for step, count in ((0, 6), (2, 12), (4, 18), (7, 18)):
    got = np.asarray(choose(_signals(step, jnp.ones(18))))
    np.testing.assert_allclose(got[order[:count]], 1 / count, rtol=1e-6)
    assert (got[order[count:]] == 0).all()


def test_rho_takes_the_largest_reducible_losses(bench, task, training, device):
  with device.activate():
    inner = training.on(task, 0, device)
    choose = policies.RHO(fraction=0.5).choose(bench)
    irreducible = np.asarray(task.example_losses(inner.params, task.parts["train"]))
    losses = np.random.default_rng(0).random(18).astype(np.float32) * 3
    got = np.asarray(choose(_signals(losses=jnp.asarray(losses))))
  best = np.argsort(-(losses - irreducible))[:9]
  np.testing.assert_allclose(got[best], 1 / 9, rtol=1e-6)
  assert (got > 0).sum() == 9


def test_the_irreducible_model_is_trained_on_dev(task, training, device, context_at, tmp_path):
  inner = training.on(task, 0, device)
  with device.activate():
    made = evaluate._bench(context_at(tmp_path), inner).train_on_dev()
  theta = np.asarray(inner.params["theta"], np.float64)
  dev = task.parts["dev"]
  for _ in range(training.num_steps):
    chance = 1 / (1 + np.exp(-dev["inputs"] @ theta))
    theta = theta - 0.3 * dev["inputs"].T @ (chance - dev["labels"]) / 40
  np.testing.assert_allclose(made["theta"], theta, rtol=1e-4)


def test_settings_out_of_range_are_refused():
  with pytest.raises(ValueError, match="Curriculum.start=0"):
    policies.Curriculum(start=0.0)
  with pytest.raises(ValueError, match="RHO.fraction=2"):
    policies.RHO(fraction=2.0)


def test_rules_of_the_outer_loop_are_gin_references():
  import gin

  for rule in (control.ProjectedGradient, control.ExponentiatedGradient, control.FrankWolfe,
               control.SignGradient):
    assert gin.get_configurable(f"policy.{rule.__name__}")() == rule()


def test_a_policy_runs_inside_the_compiled_simulation(bench):
  result = control.simulate(
    bench.run, policies.LossProportional().choose(bench), directions={"dev": bench.run.target_loss})
  losses = jax.jit(bench.run.example_losses)(bench.run.params, bench.run.data)
  np.testing.assert_allclose(result.weights[0], losses / losses.sum(), rtol=1e-5)
