"""The outer loop over data weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import (
  SignGradient,
  SolveOptions,
  pmp_scores,
  project_simplex,
  solve_weights,
)

SGD = optax.sgd(0.2)


def _data(problem):
  return jax.tree.map(lambda x: x[0], problem.batches)


def _full_batch(problem, num_steps, gamma):
  batches = jax.tree.map(lambda x: np.repeat(x[None], num_steps, axis=0), _data(problem))
  return problem._replace(batches=batches, weights=np.repeat(gamma[None], num_steps, axis=0))


def test_outer_loop_is_projected_steps_by_hand(x64, toy):
  problem, optimizer = toy.regression(batch_size=5), SGD
  got = solve_weights(problem.example_losses, problem.target_loss, optimizer, problem.params,
                      _data(problem), 4, outer_lr=0.01, outer_epochs=3)
  gamma = np.full(5, 0.2)
  for epoch in range(3):
    np.testing.assert_allclose(got.gammas[epoch], gamma, atol=1e-10)
    area, by_step, _ = toy.unrolled(_full_batch(problem, 4, gamma), optimizer)
    np.testing.assert_allclose(got.objective[epoch], area, rtol=1e-10)
    np.testing.assert_allclose(got.scores[epoch], by_step.sum(0), atol=1e-9)
    gamma = np.asarray(project_simplex(gamma + 0.01 * by_step.sum(0)))
  np.testing.assert_allclose(got.gamma, gamma, atol=1e-9)
  area, _, _ = toy.unrolled(_full_batch(problem, 4, gamma), optimizer)
  np.testing.assert_allclose(got.objective[3], area, rtol=1e-9)


def test_objective_does_not_increase_and_weights_stay_on_the_simplex(toy):
  problem = toy.regression(batch_size=8)
  got = solve_weights(problem.example_losses, problem.target_loss, optax.sgd(0.1, momentum=0.5),
                      problem.params, _data(problem), 4, outer_lr=0.01, outer_epochs=12)
  assert (np.diff(got.objective) <= 1e-5).all()
  assert got.objective[-1] < got.objective[0] - 0.01
  np.testing.assert_allclose(got.gammas.sum(1), 1, atol=1e-5)
  assert (got.gammas >= 0).all()


def test_no_outer_rate_leaves_the_weights(toy):
  problem = toy.regression()
  start = np.float32([0.1, 0.2, 0.3, 0.4])
  got = solve_weights(problem.example_losses, problem.target_loss, optax.sgd(0.1), problem.params,
                      _data(problem), 3, outer_lr=0.0, gamma=start)
  np.testing.assert_allclose(got.gamma, start, rtol=1e-6)


def test_mini_batches_of_the_outer_loop(x64, toy):
  problem, optimizer = toy.regression(batch_size=6), SGD
  rows = np.array([[0, 3], [3, 3], [5, 1], [0, 2]])
  gamma = np.random.default_rng(0).dirichlet(np.ones(6))
  got = solve_weights(problem.example_losses, problem.target_loss, optimizer, problem.params,
                      _data(problem), 4, outer_lr=0.01, batch_indices=rows, gamma=gamma,
                      options=SolveOptions(objective="terminal", trajectory=2))
  drawn = problem._replace(batches=jax.tree.map(lambda x: x[rows], _data(problem)),
                           weights=3 * gamma[rows])  # N / B = 3
  value, by_step, _ = toy.unrolled(drawn, optimizer, "terminal")
  want = np.zeros(6)
  np.add.at(want, rows, 3 * by_step)
  np.testing.assert_allclose(got.scores[0], want, atol=1e-10)
  assert want[4] == 0  # never drawn
  np.testing.assert_allclose(got.objective[0], value, rtol=1e-12)
  np.testing.assert_allclose(got.gamma, project_simplex(gamma + 0.01 * want), atol=1e-9)


def test_uniform_weights_are_the_mean_over_the_batch(x64, toy):
  problem = toy.regression(batch_size=6)
  rows = np.array([[0, 3, 1], [3, 5, 2]])
  got = solve_weights(problem.example_losses, problem.target_loss, SGD, problem.params,
                      _data(problem), 2, outer_lr=0.0, batch_indices=rows)
  want = pmp_scores(problem.example_losses, problem.target_loss, SGD, problem.params,
                    jax.tree.map(lambda x: x[rows], _data(problem)), None)
  np.testing.assert_allclose(got.objective[0], want.target_losses[1:].sum(), rtol=1e-12)


def test_the_step_is_a_rule_and_the_gradient_the_same(x64, toy):
  """Two steps of metagradient descent: the metagradient by autodiff, the step by hand."""
  problem = toy.regression(batch_size=5)
  got = solve_weights(problem.example_losses, problem.target_loss, SGD, problem.params,
                      _data(problem), 4, outer_lr=0.6, outer_epochs=2, rule=SignGradient(),
                      options=SolveOptions(objective="terminal"))
  gamma = np.full(5, 0.2)
  for epoch in range(2):
    loss, by_step, _ = toy.unrolled(_full_batch(problem, 4, gamma), SGD, "terminal")
    scores = by_step.sum(0)
    np.testing.assert_allclose(got.scores[epoch], scores, rtol=1e-8)
    np.testing.assert_allclose(got.objective[epoch], loss, rtol=1e-10)
    gamma = np.maximum(gamma + 0.6 / 5 * np.sign(scores - gamma @ scores), 0)
    gamma /= gamma.sum()
    np.testing.assert_allclose(got.gammas[epoch + 1], gamma, rtol=1e-12)


@pytest.mark.parametrize("change, message", [
  (dict(rule=SignGradient), "rule must be a rule such as ProjectedGradient"),
  (dict(outer_lr=-1.0), "outer_lr must be finite and >= 0"),
  (dict(outer_lr=float("nan")), "outer_lr must be finite and >= 0"),
  (dict(outer_epochs=0), "outer_epochs must be an integer >= 1"),
  (dict(num_steps=0), "num_steps must be an integer >= 1"),
  (dict(gamma=np.full(3, 1 / 3)), r"gamma has shape \(3,\)"),
  (dict(gamma=np.array([0.5, 0.6, -0.1, 0.0])), r"gamma\[2\] is -0.1"),
  (dict(gamma=np.array([0.5, np.nan, 0.5, 0.0])), r"gamma\[1\] is nan"),
  (dict(gamma=np.full(4, 0.3)), "gamma sums to 1.2, not 1"),
  (dict(batch_indices=np.array([[0, 4]] * 3)), r"batch_indices\[0, 1\] is 4; data has rows 0 to 3"),
  (dict(batch_indices=np.array([[0, -1]] * 3)), r"batch_indices\[0, 1\] is -1"),
  (dict(batch_indices=np.array([[0, 1]] * 2)), "with T=3"),
  (dict(batch_indices=np.zeros((3, 2))), "expected integers"),
  (dict(data={"x": jnp.zeros((0, 3)), "y": jnp.zeros(0)}), "each must be at least 1"),
])
def test_bad_arguments_of_the_outer_loop(toy, change, message):
  problem = toy.regression()
  kw = dict(data=_data(problem), num_steps=3, outer_lr=0.1) | change
  with pytest.raises(ValueError, match=message):
    solve_weights(problem.example_losses, problem.target_loss, optax.sgd(0.1), problem.params, **kw)
