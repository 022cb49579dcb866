"""The memory of a solve and the choice of a trajectory policy, against brute force."""

import itertools

import pytest

from lmops_jax.control import trajectory
from lmops_jax.sizing import solve_plan


def _brute_force(state_bytes, num_steps, device, host):
  """Among all policies that fit, one that recomputes least; the device before the host."""
  found = []
  if num_steps * state_bytes <= device:
    found.append((0, 0, "all"))
  if num_steps * state_bytes <= host and 2 * state_bytes <= device:
    found.append((0, 1, "host"))
  for slots in range(1, num_steps):
    if slots * state_bytes <= device:
      found.append((solve_plan.num_recomputed(slots, num_steps), 2, slots))
  return min(found, default=None, key=lambda x: (x[0], x[1], -x[2] if x[1] == 2 else 0))


def test_the_choice_recomputes_least():
  for steps, device, host in itertools.product((1, 2, 5, 12), range(0, 140, 7), (0, 40, 200)):
    best = _brute_force(10, steps, device, host)
    if best is None:
      with pytest.raises(ValueError, match="does not fit"):
        solve_plan.choose_trajectory(10, steps, device, host)
    else:
      chosen = solve_plan.choose_trajectory(10, steps, device, host)
      assert chosen == best[2]
      assert solve_plan.device_state_copies(chosen, steps) * 10 <= device


def test_recomputed_steps_are_those_of_the_schedule():
  assert solve_plan.num_recomputed("all", 10) == solve_plan.num_recomputed("host", 10) == 0
  assert solve_plan.num_recomputed(10, 10) == 0
  # With one slot the state of step t is reached from the first one: t advances for each t below
  # the last, which the forward pass leaves behind.
  assert solve_plan.num_recomputed(1, 10) == sum(range(9))
  for slots in range(1, 10):
    assert solve_plan.num_recomputed(slots, 10) >= solve_plan.num_recomputed(slots + 1, 10)
  assert solve_plan.num_recomputed("sqrt", 50) == solve_plan.num_recomputed(
    trajectory.num_slots("sqrt", 50), 50)


@pytest.mark.parametrize("state, steps", [(0, 3), (10, 0), (-1, 3)])
def test_bad_sizes(state, steps):
  with pytest.raises(ValueError, match="must be positive"):
    solve_plan.choose_trajectory(state, steps, 100)


def test_parts_of_a_solve():
  parts = solve_plan.solve_bytes(100, 200, micro_batches=True, groups=True)
  assert parts == solve_plan.SolveBytes(100, 200, 100, 300, 500, 100)
  whole = solve_plan.solve_bytes(100, 200, micro_batches=True, groups=True, whole_bytes=800)
  assert whole == parts._replace(gathered=4000)
  assert solve_plan.solve_bytes(100, 0, micro_batches=False, groups=False).accumulators == 200
  assert solve_plan.host_bytes(100, 200, 4) == 1300
