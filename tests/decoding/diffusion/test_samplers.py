"""Samplers against closed forms: times, exact flows of points and Gaussians, orders, guidance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding.diffusion.guidance import guided
from lmops_jax.decoding.diffusion.plans import follow, trajectory
from lmops_jax.decoding.diffusion.samplers import Ddim, DpmSolver, Plms, solver_plan
from lmops_jax.models.diffusion.noise import NoiseSchedule, target

SCHEDULE = NoiseSchedule()
SAMPLERS = (DpmSolver(20), DpmSolver(7), DpmSolver(20, order=1), Ddim(20), Plms(20), Plms(3))
DDIM_20 = list(range(951, 0, -50))


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def at(times, schedule=SCHEDULE):
  """alpha and sigma `[B]` at the times that a network is told."""
  return jnp.asarray(schedule.alphas)[times], jnp.asarray(schedule.sigmas)[times]


def knows_point(mean, schedule=SCHEDULE):
  """The perfect network for data that is one point."""

  def predict(x, times):
    alpha, sigma = (a[:, None] for a in at(times, schedule))
    return target(schedule.prediction, mean, (x - alpha * mean) / sigma, alpha, sigma)

  return predict


@pytest.mark.parametrize("sampler, times", [
  (DpmSolver(20), [999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 500, 450, 400, 350, 300, 250,
                   200, 150, 100, 50]),
  (Ddim(20), DDIM_20),
  (Plms(20), [951, 901, *DDIM_20[1:]]),
  (Plms(2), [501, 1, 1]),
  (Plms(1), [1]),
  (Ddim(4, offset=0), [750, 500, 250, 0]),
])
def test_times_are_the_published_ones(sampler, times):
  plan = sampler.plan(SCHEDULE)
  assert plan.timesteps.tolist() == times
  assert plan.num_evaluations == len(times)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_point_is_reached_exactly(sampler, prediction, x64):
  """Spec 8.3: noise and picture are constant along the path, so no method makes an error."""
  schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
  plan = sampler.plan(schedule)
  noise, mean = np.random.default_rng(0).normal(size=(2, 4, 3))
  t = plan.timesteps[0]
  x = schedule.alphas[t] * mean + schedule.sigmas[t] * noise
  found = follow(plan, knows_point(mean, schedule), jnp.asarray(x))
  np.testing.assert_allclose(found, schedule.alphas[0] * mean + schedule.sigmas[0] * noise,
                             rtol=0, atol=1e-9)


def test_the_end_without_noise_is_the_picture(x64):
  plan = DpmSolver(20, final="zero").plan(SCHEDULE)
  noise, mean = np.random.default_rng(0).normal(size=(2, 4, 3))
  x = SCHEDULE.alphas[999] * mean + SCHEDULE.sigmas[999] * noise
  np.testing.assert_allclose(follow(plan, knows_point(mean), jnp.asarray(x)), mean, atol=1e-9)


def gaussian_error(num_steps, order):
  """Spec 8.4: the error on N(m, s^2) over a grid that is uniform in lambda."""
  mean, deviation, z = 0.7, 0.5, 1.0
  lambdas = np.linspace(SCHEDULE.lambdas[999], SCHEDULE.lambdas[0], num_steps + 1)
  alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
  sigmas = 1 / np.sqrt(1 + np.exp(2 * lambdas))
  plan = solver_plan(np.arange(num_steps), alphas, sigmas, order, ends_low=False)

  def predict(x, numbers):
    alpha, sigma = (jnp.asarray(a)[numbers][:, None] for a in (alphas, sigmas))
    return sigma * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

  exact = alphas * mean + np.sqrt((alphas * deviation) ** 2 + sigmas**2) * z
  found = follow(plan, predict, jnp.full((1, 1), exact[0]))
  return abs(float(found[0, 0]) - exact[-1])


@pytest.mark.parametrize("order, errors", [
  (1, [7.18e-2, 3.73e-2, 1.90e-2, 9.59e-3, 4.82e-3]),
  (2, [9.04e-3, 2.80e-3, 7.27e-4, 1.83e-4, 4.60e-5]),
])
def test_errors_on_a_gaussian_shrink_with_the_order(order, errors, x64):
  found = np.array([gaussian_error(num, order) for num in (10, 20, 40, 80, 160)])
  np.testing.assert_allclose(found, errors, rtol=4e-3)  # as many figures as the source has
  slopes = np.log2(found[:-1] / found[1:])
  assert abs(slopes[-1] - order) < 0.02


def bent(x, times):
  """A network that is nowhere linear."""
  return jnp.tanh(x * 1.3 + times[:, None] / 500) + 0.3 * x


def test_order_one_is_ddim_on_the_same_times(x64):
  plan = DpmSolver(20, order=1).plan(SCHEDULE)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))
  want = x
  times = [*plan.timesteps.tolist(), 0]
  for t, s in zip(times[:-1], times[1:]):
    noise = bent(want, jnp.full(2, t))
    clean = (want - SCHEDULE.sigmas[t] * noise) / SCHEDULE.alphas[t]
    want = SCHEDULE.alphas[s] * clean + SCHEDULE.sigmas[s] * noise
  np.testing.assert_allclose(follow(plan, bent, x), want, atol=1e-10)


def test_few_steps_end_with_order_one():
  few, many = (DpmSolver(n).plan(SCHEDULE).weights for n in (14, 15))
  assert few[-1, 1] == 0 and few[-2, 1] != 0 and many[-1, 1] != 0
  assert few[0, 1] == many[0, 1] == 0


def test_a_trajectory_ends_where_its_sample_does():
  plan = Plms(6).plan(SCHEDULE)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)
  path = trajectory(plan, bent, x)
  assert path.shape == (7, 2, 3)
  np.testing.assert_array_equal(path[-1], follow(plan, bent, x))


def conditioned(x, times, condition):
  return bent(x, times) * condition


def test_guidance_leans_from_one_condition_to_the_other():
  x, times = jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), jnp.asarray([10, 700])
  condition, without = jnp.asarray([[2.0], [3.0]]), jnp.asarray([[1.0], [0.5]])
  found = guided(conditioned, condition, without, 7.5)(x, times)
  low, high = (conditioned(x, times, c) for c in (without, condition))
  np.testing.assert_allclose(found, low + 7.5 * (high - low), rtol=1e-6)
  same = guided(conditioned, condition, condition, 7.5)(x, times)
  np.testing.assert_allclose(same, high, rtol=1e-6)


def test_guidance_of_one_asks_once():
  x, times, condition = jnp.ones((2, 2)), jnp.asarray([10, 700]), jnp.asarray([[2.0], [3.0]])
  sizes = []

  def watched(x, times, condition):
    sizes.append(len(x))
    return conditioned(x, times, condition)

  found = guided(watched, condition, None, 1.0)(x, times)
  np.testing.assert_array_equal(found, conditioned(x, times, condition))
  guided(watched, condition, condition, 2.0)(x, times)
  assert sizes == [2, 4]


@pytest.mark.parametrize("make, message", [
  (lambda: DpmSolver(0), "decoding.DpmSolver.num_steps=0"),
  (lambda: Ddim(1001), "decoding.Ddim.num_steps=1001"),
  (lambda: DpmSolver(1000).plan(SCHEDULE), "num_steps=1000 is more than .* take at most 999"),
  (lambda: Ddim(1000).plan(SCHEDULE), "num_steps=1000 and offset=1 asks for the time 1000"),
  (lambda: Plms(20).plan(NoiseSchedule(num_times=10)), "decoding.Plms with num_steps=20"),
  (lambda: guided(conditioned, None, None, 0.0), "guidance=0.0 must be a number above 0"),
  (lambda: guided(conditioned, None, None, float("nan")), "guidance=nan must be a number above 0"),
])
def test_refuses(make, message):
  with pytest.raises(ValueError, match=message):
    make()
