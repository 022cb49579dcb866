"""Memory policies: the schedule's invariants, and equal results whatever is stored."""

import math

import jax
import numpy as np
import optax
import pytest

from lmops_jax.control import pmp_scores
from lmops_jax.control.trajectory import make_schedule, num_slots


def _execute(num_steps, slots):
  """Runs a schedule on step indices; returns the reverse order, the slots used and the advances."""
  schedule = make_schedule(num_steps, slots)
  memory = {int(slot): t for t, slot in enumerate(schedule.first_store) if slot >= 0}
  state, order, advances = num_steps - 1, [], num_steps
  for step, is_reverse, load, store in zip(*schedule[1:]):
    if load >= 0:
      state = memory[int(load)]
    if store >= 0:
      memory[int(store)] = state
    assert state == step
    assert len(memory) <= slots
    if is_reverse:
      order.append(state)
      state = None  # not to be used again without a load
    else:
      advances += 1
      state += 1
  return order, set(memory), advances


def _fewest_advances(num_steps, slots):
  """Griewank's closed form: l steps with s checkpoints, plus the last step to the final state."""
  repeats = 0
  while math.comb(slots + repeats, slots) < num_steps:
    repeats += 1
  # repeats * l - C(s + repeats, s + 1) advances, of which the adjoint itself needs none.
  return repeats * num_steps - math.comb(slots + repeats, slots + 1) + 1


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 7, 10, 33])
def test_schedule_visits_every_step_backwards_with_the_fewest_advances(num_steps):
  for slots in range(1, num_steps + 1):
    order, used, advances = _execute(num_steps, slots)
    assert order == list(range(num_steps - 1, -1, -1))
    assert used <= set(range(slots))
    assert advances == _fewest_advances(num_steps, slots)


def test_schedule_of_a_long_run_is_cheap():
  slots = num_slots("sqrt", 1000)
  assert slots == 45
  order, _, advances = _execute(1000, slots)
  assert len(order) == 1000
  assert advances <= 2 * 1000  # one recomputed step for each step


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 7, 10])
def test_policies_give_the_gradient(x64, toy, num_steps):
  problem = toy.regression(num_steps=num_steps)
  optimizer = optax.sgd(0.2, momentum=0.5)
  _, want, _ = toy.unrolled(problem, optimizer)
  first = None
  for policy in ("all", "sqrt", 1) + ((3,) if num_steps == 7 else ()):
    got = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                     trajectory=policy)
    np.testing.assert_allclose(got.scores, want, atol=1e-10)
    first = first or got
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, first)


@pytest.mark.parametrize("objective", ["area", "terminal"])
def test_policies_agree_on_proxies_and_costates(x64, toy, objective):
  problem = toy.regression(num_steps=7)
  run = lambda policy: pmp_scores(  # noqa: E731
    problem.example_losses, problem.target_loss, optax.adam(0.05, eps_root=1e-10), *problem.args,
    objective=objective, trajectory=policy, proxy=problem.proxy, groups=3, keep_costates=True)
  want = run("all")
  for policy in ("host", 2):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
                 run(policy), want)
