"""Several target losses in one solve: the numbers of separate solves, for less arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import mean_target_loss, pmp_scores
from lmops_jax.control.several_targets import pmp_scores_by_target

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2, momentum=0.5))


def _norm(params):
  return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))


def _targets(problem):
  data = mean_target_loss(problem.example_losses, problem.proxy, 3)
  return [problem.target_loss, _norm, data]


@pytest.mark.parametrize("kwargs", [
  dict(),
  dict(groups=2, trajectory=2, micro_batch_size=2),
  pytest.param(dict(objective="terminal", every_k=2, hvp_mode="vjp_of_grad"),
               marks=pytest.mark.slow),
  pytest.param(dict(hessian=False, keep_costates=True, trajectory="host"),
               marks=pytest.mark.slow),
])
def test_each_target_has_the_scores_of_its_own_solve(x64, toy, kwargs):
  problem = toy.regression()
  targets = _targets(problem)
  run = lambda solver, target: solver(  # noqa: E731
    problem.example_losses, target, OPTIMIZER, *problem.args, proxy=problem.proxy, **kwargs)
  got = run(pmp_scores_by_target, targets)
  assert got.scores.shape == (3, 5, 4) and got.proxy_scores.shape == (3, 7)
  for k, target in enumerate(targets):
    want = run(pmp_scores, target)
    own = got._replace(params=None, step_losses=None)
    own = jax.tree.map(lambda x: x[k], own)  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
                 own._replace(params=got.params, step_losses=got.step_losses), want)


def test_a_mixture_has_the_mixture_of_the_scores(x64, toy):
  problem = toy.language_model()
  targets = [problem.target_loss, _norm]
  got = pmp_scores_by_target(problem.example_losses, targets, OPTIMIZER, *problem.args)
  mixed = lambda p: 2 * targets[0](p) - 0.1 * targets[1](p)  # noqa: E731
  want = pmp_scores(problem.example_losses, mixed, OPTIMIZER, *problem.args)
  np.testing.assert_allclose(2 * got.scores[0] - 0.1 * got.scores[1], want.scores, atol=1e-10)


@pytest.mark.slow
def test_the_run_and_the_primal_work_are_shared(toy):
  """By XLA's count of one solve (it counts loop bodies once, in all of them alike)."""
  problem = toy.language_model(batch_size=16)
  targets = [problem.target_loss, lambda p: 2 * problem.target_loss(p), _norm,
             lambda p: problem.target_loss(p) ** 2]

  def flops(solver, target):
    solve = lambda params: solver(  # noqa: E731
      problem.example_losses, target, OPTIMIZER, params, problem.batches, problem.weights)
    return jax.jit(solve).lower(problem.params).compile().cost_analysis()["flops"]

  alone = [flops(pmp_scores, target) for target in targets]
  together = flops(pmp_scores_by_target, targets)
  assert max(alone) < together < 0.75 * sum(alone), (together, alone)


def test_bad_target_losses_are_refused(toy):
  problem = toy.regression()
  for bad, message in [
    ([], "list of one or more functions"), (problem.target_loss, "list of one or more functions"),
    ([problem.target_loss, 1.0], "target_losses holds 1.0"),
    ([lambda p: p["v"]], "expected a scalar"),
  ]:
    with pytest.raises(ValueError, match=message):
      pmp_scores_by_target(problem.example_losses, bad, OPTIMIZER, *problem.args)
