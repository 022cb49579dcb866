"""In-run values: Shapley values by all subsets, sums over a batch, autodiff of other optimizers."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import TrainingRun, in_run_values, mean_target_loss

NUM_STEPS, NUM_EXAMPLES = 3, 4


def _losses(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w"])
  return jnp.square(hidden @ params["v"] + params["b"] - batch["y"])


def _quadratic(params):
  w, v = params["w"] - 0.3, params["v"] + 0.1
  return (w**2).sum() + (v**2).sum() + w.sum() * v.sum() + params["b"] * w[0, 0] + params["b"]**2


@pytest.fixture
def run(x64):
  rng = np.random.default_rng(0)
  params = {"w": rng.normal(size=(3, 2)), "v": rng.normal(size=2), "b": np.float64(0.2)}
  batches = {"x": rng.normal(size=(NUM_STEPS, NUM_EXAMPLES, 3)),
             "y": rng.normal(size=(NUM_STEPS, NUM_EXAMPLES))}
  weights = rng.uniform(0.1, 0.4, size=(NUM_STEPS, NUM_EXAMPLES))
  return TrainingRun(_losses, optax.sgd(0.3), params, batches, weights)


def _steps(run):
  """By hand: parameters before each step, and each example's part of the change, for SGD."""
  params = run.params
  for t in range(NUM_STEPS):
    batch = jax.tree.map(lambda x, t=t: x[t], run.batches)
    slopes = jax.jacobian(_losses)(params, batch)
    parts = [jax.tree.map(lambda g, n=n, t=t: -0.3 * run.weights[t, n] * g[n], slopes)
             for n in range(NUM_EXAMPLES)]
    yield params, parts
    params = jax.tree.map(lambda p, *d: p + sum(d), params, *parts)


def _shapley(gain):
  """Of players 0 .. N - 1, by all subsets."""
  values = np.zeros(NUM_EXAMPLES)
  for n in range(NUM_EXAMPLES):
    others = [m for m in range(NUM_EXAMPLES) if m != n]
    for size in range(NUM_EXAMPLES):
      share = (math.factorial(size) * math.factorial(NUM_EXAMPLES - size - 1)
               / math.factorial(NUM_EXAMPLES))
      for some in itertools.combinations(others, size):
        values[n] += share * (gain([*some, n]) - gain(some))
  return values


def test_second_order_values_of_a_quadratic_target_are_its_shapley_values(run):
  found = in_run_values(run, _quadratic, second_order=True)
  for t, (params, parts) in enumerate(_steps(run)):
    def gain(some, params=params, parts=parts):
      moved = params
      for n in some:
        moved = jax.tree.map(jnp.add, moved, parts[n])
      return float(_quadratic(params) - _quadratic(moved))

    np.testing.assert_allclose(found.values[t], _shapley(gain), rtol=1e-9)
    np.testing.assert_allclose(found.values[t].sum(), gain(range(NUM_EXAMPLES)), rtol=1e-9)
    np.testing.assert_allclose(found.target_losses[t], _quadratic(params), rtol=1e-12)


def test_first_order_values_sum_to_the_first_order_change(run):
  target = mean_target_loss(_losses, jax.tree.map(lambda x: x[0], run.batches), 2)
  found = in_run_values(run, target)
  for t, (params, parts) in enumerate(_steps(run)):
    slope = jax.grad(target)(params)
    each = [-sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (slope, part))))
            for part in parts]
    np.testing.assert_allclose(found.values[t], each, rtol=1e-9)


def test_other_optimizers_are_differentiated(run):
  optimizer = optax.adam(0.05, eps=1e-3)
  found = in_run_values(dataclasses.replace(run, optimizer=optimizer), _quadratic)
  params, state = run.params, optimizer.init(run.params)
  for t in range(NUM_STEPS):
    batch = jax.tree.map(lambda x, t=t: x[t], run.batches)

    def stepped(weights, params=params, state=state, batch=batch):
      grads = jax.grad(lambda p: jnp.vdot(weights, _losses(p, batch)))(params)
      updates, new = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), new

    slope, weights = jax.grad(_quadratic)(params), jnp.asarray(run.weights[t])

    def lowered(weights, slope=slope, stepped=stepped):
      return -sum(jnp.vdot(a, b) for a, b in zip(
        *map(jax.tree.leaves, (slope, stepped(weights)[0]))))

    np.testing.assert_allclose(
      found.values[t], weights * jax.grad(lowered)(weights), rtol=1e-8)
    params, state = stepped(weights)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found.params, params)


def test_parts_of_a_batch_give_the_same(run):
  whole = in_run_values(run, _quadratic, second_order=True)
  parts = in_run_values(run, _quadratic, second_order=True, micro_batch_size=2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), whole, parts)
  with pytest.raises(ValueError, match="micro_batch_size=3"):
    in_run_values(run, _quadratic, micro_batch_size=3)
