"""Scores of examples that are not trained on: every step, every k-th step, groups of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from lmops_jax.control import SolveOptions, directional_scores, pmp, pmp_scores
from lmops_jax.control.dynamics import init_state
from lmops_jax.control.problem import Problem, group_bounds
from lmops_jax.control.training_run import batch_at

# A table in float64: optax's own schedules compute in float32.
SGD = optax.sgd(lambda count: jnp.asarray(np.linspace(0.3, 0.1, 7))[count], momentum=0.5)


def _run(problem, **kw):
  return pmp_scores(problem.example_losses, problem.target_loss, SGD, *problem.args,
                    proxy=problem.proxy, **kw)


@pytest.mark.parametrize("every_k", [1, 2, 3])
def test_proxy_scores_are_the_gradient_for_added_examples(x64, toy, every_k):
  problem = toy.regression(num_steps=7)
  _, scores, by_step = toy.unrolled(problem, SGD, with_proxy=True)
  want = by_step[np.arange(7) % every_k == 0].sum(0)
  got = _run(problem, every_k=every_k)
  np.testing.assert_allclose(got.proxy_scores, want, atol=1e-10)
  np.testing.assert_allclose(got.scores, scores, atol=1e-10)  # the run itself is not disturbed


def test_proxies_of_the_language_model_in_float64(x64, toy):
  problem = toy.language_model()
  optimizer = optax.sgd(0.5)
  _, _, by_step = toy.unrolled(problem, optimizer, with_proxy=True)
  got = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                   proxy=problem.proxy, every_k=2)
  np.testing.assert_allclose(got.proxy_scores, by_step[::2].sum(0), atol=1e-9)


def test_proxies_that_are_the_training_batch(x64, toy):
  problem = toy.regression()
  batches = jax.tree.map(lambda x: np.repeat(x[:1], 5, axis=0), problem.batches)
  problem = problem._replace(batches=batches, proxy=jax.tree.map(lambda x: x[0], batches))
  got = _run(problem)
  np.testing.assert_allclose(got.proxy_scores, got.scores.sum(0), rtol=1e-10)


def test_one_group_a_step_is_every_step(x64, toy):
  problem = toy.regression(num_steps=7)
  np.testing.assert_array_equal(_run(problem, groups=7).proxy_scores, _run(problem).proxy_scores)


def test_groups_are_exact_where_gradients_do_not_move(x64):
  # Losses linear in theta: any number of groups gives the sum over all steps.
  rng = np.random.default_rng(0)
  losses = lambda theta, batch: batch["x"] @ theta  # noqa: E731
  target = lambda theta: jnp.sum(jnp.square(theta - 1.0))  # noqa: E731
  batches, proxy = {"x": rng.normal(size=(7, 4, 3))}, {"x": rng.normal(size=(5, 3))}
  run = lambda **kw: pmp_scores(  # noqa: E731
    losses, target, SGD, np.zeros(3), batches, None, proxy=proxy, **kw).proxy_scores
  want = run()
  assert np.abs(want).min() > 1e-3
  for groups in (1, 3):
    np.testing.assert_allclose(run(groups=groups), want, rtol=1e-10)


@pytest.mark.parametrize("groups", [1, 3])
def test_groups_are_the_quadrature_by_hand(x64, toy, groups):
  problem = toy.regression(num_steps=7)
  optimizer = optax.sgd(0.2)
  got = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                   proxy=problem.proxy, groups=groups, keep_costates=True)
  params = jax.tree.map(jnp.asarray, problem.params)
  states = []
  for t in range(7):
    states.append(params)
    batch = jax.tree.map(lambda x: x[t], problem.batches)  # noqa: B023
    grads = jax.grad(
      lambda p: problem.weights[t] @ problem.example_losses(p, batch))(params)  # noqa: B023
    params = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
  want = 0
  for steps in np.array_split(np.arange(7), groups):
    norms = got.costate_norms[steps]
    mean = jax.tree.map(lambda *x: jnp.tensordot(norms, jnp.stack(x), 1) / norms.sum(),  # noqa: B023
                        *[states[t] for t in steps])
    direction = jax.tree.map(lambda c: 0.2 * c[steps].sum(0), got.costates)  # noqa: B023
    want += directional_scores(problem.example_losses, mean, direction, problem.proxy)
  np.testing.assert_allclose(got.proxy_scores, want, atol=1e-10)


@pytest.mark.slow
def test_groups_rank_like_every_step_on_the_language_model(toy):
  problem = toy.language_model(num_steps=12, num_proxies=40)
  run = lambda **kw: np.asarray(pmp_scores(  # noqa: E731
    problem.example_losses, problem.target_loss, optax.sgd(0.02), *problem.args,
    proxy=problem.proxy, **kw).proxy_scores)
  rank = lambda x: np.argsort(np.argsort(x))  # noqa: E731
  exact = rank(run())
  correlation = lambda **kw: np.corrcoef(exact, rank(run(**kw)))[0, 1]  # noqa: E731
  one_group = correlation(groups=1)
  assert one_group > 0.97
  assert one_group > correlation(every_k=12) + 0.1  # the same price: one pass over the proxies


@pytest.mark.parametrize("num_steps, num_proxies", [(7, 7), (3, 10), (7, 4)])
def test_samples_are_single_steps_over_their_probability(x64, toy, num_steps, num_proxies):
  problem = toy.regression(num_steps=num_steps, num_proxies=num_proxies)
  by_step = toy.unrolled(problem, SGD, with_proxy=True)[2]
  counts = np.zeros((num_steps, num_proxies))
  num_seeds = 140
  run = jax.jit(jax.vmap(lambda seed: _sampled(problem, seed)))
  found = np.asarray(run(jnp.arange(num_seeds)))
  for scores in found:
    error = np.abs(scores - num_steps * by_step)
    assert error.min(0).max() < 1e-9  # each is T times the score at one of its steps
    step = error.argmin(0)
    per_step = np.bincount(step, minlength=num_steps)
    assert per_step.max() <= -(-num_proxies // num_steps)  # which are shared out evenly
    np.add.at(counts, (step, np.arange(num_proxies)), 1)
  expected = num_seeds / num_steps  # unbiased: every step is as likely
  assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
  assert stats.chisquare(counts.sum(1)).pvalue > 1e-3


def _sampled(problem, seed):
  """One sample a proxy, the seed traced (in `pmp_scores` it is a plain number)."""
  options = SolveOptions(proxy_samples=1, proxy_batch_size=32)
  object.__setattr__(options, "sample_seed", seed)
  batches = jax.tree.map(jnp.asarray, problem.batches)
  instance = Problem(
    problem.example_losses, problem.target_loss, SGD.update, functools.partial(batch_at, batches),
    jnp.asarray(problem.weights), jax.tree.map(jnp.asarray, problem.proxy), options)
  params = jax.tree.map(jnp.asarray, problem.params)
  return pmp.run_passes(instance, init_state(SGD.init, SGD.update, params)).proxy_scores


def test_more_samples_are_the_mean_of_samples(x64, toy):
  problem = toy.regression(num_steps=7)
  by_step = toy.unrolled(problem, SGD, with_proxy=True)[2]
  got = np.asarray(_run(problem, proxy_samples=2, sample_seed=5).proxy_scores)
  pairs = 7 / 2 * (by_step[:, None] + by_step[None])
  assert np.abs(pairs - got).min((0, 1)).max() < 1e-9
  other = _run(problem, proxy_samples=2, sample_seed=6).proxy_scores
  assert np.abs(other - got).max() > 1e-3
  np.testing.assert_array_equal(_run(problem, proxy_samples=2, sample_seed=5).proxy_scores, got)
  once = _run(toy.regression(num_steps=1), proxy_samples=1).proxy_scores
  np.testing.assert_allclose(once, _run(toy.regression(num_steps=1)).proxy_scores, rtol=1e-12)


def test_group_bounds():
  np.testing.assert_array_equal(group_bounds(7, 3), [0, 3, 5, 7])
  np.testing.assert_array_equal(group_bounds(4, 4), [0, 1, 2, 3, 4])
  np.testing.assert_array_equal(group_bounds(4, 1), [0, 4])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 50])
def test_directional_scores_in_batches_of_any_size(x64, toy, batch_size):
  problem = toy.regression()
  params = jax.tree.map(jnp.asarray, problem.params)
  direction = jax.tree.map(jnp.cos, params)
  slopes = jax.jacobian(problem.example_losses)(params, problem.proxy)
  want = sum(jnp.tensordot(s, d, jnp.ndim(d))
             for s, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction)))
  got = directional_scores(problem.example_losses, params, direction, problem.proxy, batch_size)
  np.testing.assert_allclose(got, want, rtol=1e-10)


def test_losses_without_a_forward_rule(x64, toy):
  # A custom_vjp loss cannot be pushed forward; the transposed path never asks for it.
  problem = toy.regression()

  @jax.custom_vjp
  def square(x):
    return x * x
  square.defvjp(lambda x: (x * x, x), lambda x, ct: (2 * x * ct,))
  def losses(p, batch):
    hidden = jnp.tanh(batch["x"] @ p["w"] + p["b"])
    return square(hidden @ p["v"] * p["scale"] - batch["y"])
  run = lambda losses, mode: pmp_scores(  # noqa: E731
    losses, problem.target_loss, SGD, *problem._replace(weights=problem.weights[:5]).args,
    proxy=problem.proxy, hvp_mode=mode)
  with pytest.raises(TypeError, match="custom_vjp"):
    run(losses, "jvp_of_grad")
  got, want = run(losses, "vjp_of_grad"), run(problem.example_losses, "jvp_of_grad")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
