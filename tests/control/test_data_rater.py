"""The metagradient of a rater: autodiff through unrolled training, and a half that is of no use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import TrainingRun, rated_window

NUM_STEPS, BATCH_SIZE = 3, 4
ADAM = optax.adam(0.05, eps=1e-3)


def _ratings(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w"] + batch["y"][:, None])
  return hidden @ params["v"]


@pytest.fixture
def case(x64, toy):
  """The problem, a rater, and two windows' batches."""
  problem = toy.regression(num_steps=2 * NUM_STEPS, batch_size=BATCH_SIZE)
  rng = np.random.default_rng(1)
  rater = {"w": rng.normal(size=(3, 5)), "v": rng.normal(size=5)}
  first, second = ({k: v[half] for k, v in problem.batches.items()}
                   for half in (slice(NUM_STEPS), slice(NUM_STEPS, None)))
  run = TrainingRun(problem.example_losses, ADAM, problem.params, first)
  return problem, rater, run, second


def _unrolled(problem, rater, params, opt_state, batches):
  """The target loss behind a window by a Python loop, and the state there."""
  for t in range(NUM_STEPS):
    batch = jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), batches)
    weights = jax.nn.softmax(_ratings(rater, batch))
    grads = jax.grad(
      lambda p: jnp.vdot(weights, problem.example_losses(p, batch)))(params)  # noqa: B023
    updates, opt_state = ADAM.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  return problem.target_loss(params), (params, opt_state)


def test_the_metagradient_is_that_of_autodiff_in_each_of_two_windows(case):
  problem, rater, run, second = case
  state = jax.tree.map(jnp.asarray, (run.params, ADAM.init(run.params)))
  wanted = jax.jit(lambda rater, state, batches: jax.value_and_grad(
    lambda r: _unrolled(problem, r, *state, batches), has_aux=True)(rater))
  found = None
  for batches in (run.batches, second):
    (loss, state), grads = wanted(rater, state, batches)
    if found is not None:  # goes on, the optimizer's moments included
      run = dataclasses.replace(run, params=found.state.params, batches=batches)
    found = rated_window(_ratings, rater, run, problem.target_loss,
                         opt_state=None if found is None else found.state.opt_state)
    np.testing.assert_allclose(found.target_loss, loss, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), found.grads, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found.state,
                 type(found.state)(*state))
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-12)
  assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-4


def test_parts_of_a_batch_give_the_same(case):
  problem, rater, run, _ = case
  whole = rated_window(_ratings, rater, run, problem.target_loss)
  parts = rated_window(_ratings, rater, run, problem.target_loss, micro_batch_size=2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), whole, parts)
  with pytest.raises(ValueError, match="set run.weights to None"):
    rated_window(_ratings, rater, dataclasses.replace(run, weights=problem.weights[:NUM_STEPS]),
                 problem.target_loss)


def test_a_rater_puts_the_useful_half_above_the_other():
  """Half of all examples teach what the target asks, half are noise; one of five signs tells."""
  rng = np.random.default_rng(0)
  dim, num_steps, batch_size = 4, 2, 16
  teacher = rng.normal(size=dim)

  def draw(*shape):
    useful = rng.integers(2, size=shape) == 1
    x, signs = rng.normal(size=(*shape, dim)), rng.choice([-1.0, 1.0], size=(*shape, 5))
    signs[..., 3] = np.where(useful, 1, -1)
    y = np.where(useful, x @ teacher, 2 * rng.normal(size=shape))
    return useful, {"x": jnp.float32(x), "y": jnp.float32(y), "seen": jnp.float32(signs)}

  dev = rng.normal(size=(32, dim))
  target = jax.tree_util.Partial(_square_mean, jnp.float32(dev), jnp.float32(dev @ teacher))
  optimizer, meta = optax.sgd(0.05), optax.adam(0.1)
  rater = jnp.zeros(5)
  moments = meta.init(rater)
  for window in range(80):
    if window % 5 == 0:  # an inner model lives for five windows
      params = jnp.zeros(dim)
    run = TrainingRun(_square, optimizer, params, draw(num_steps, batch_size)[1])
    found = rated_window(_linear, rater, run, target)
    updates, moments = meta.update(found.grads, moments)
    rater, params = rater + updates, found.state.params
  useful, rows = draw(200)
  values = np.asarray(_linear(rater, rows))
  assert values[useful].min() > values[~useful].max()


def _square(params, batch):
  return jnp.square(batch["x"] @ params - batch["y"])


def _square_mean(x, y, params):
  return jnp.mean(jnp.square(x @ params - y))


def _linear(rater, batch):
  return batch["seen"] @ rater
