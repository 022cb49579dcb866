"""What a solve holds in memory, and which trajectory policy that allows. Arithmetic only.

The reverse pass reads the states of the forward pass (see `trajectory`). States that fit on the
device cost nothing more; in host memory they cost their transfer, which overlaps with the step;
with fewer slots than steps the missing states are computed again.
"""

from __future__ import annotations

from typing import NamedTuple

from lmops_jax.control import trajectory as trajectories


class SolveBytes(NamedTuple):
  """Bytes on one device during the reverse pass, activations and data aside.

  With P bytes of parameters and O of floating-point optimizer state: the state itself, the costate
  of the parameters, the cotangents of the gradient and of the optimizer state, and the sums of the
  Hessian product (of all micro-batches, and of one) with a gradient beside them.
  """

  params: float  # P
  opt_state: float  # O
  costate: float  # P
  cotangents: float  # P + O
  accumulators: float  # 2 P, with micro-batches 3 P, and 2 P more for groups
  given: float  # P, the first parameters, which the caller of the solve holds
  gathered: float = 0  # whole parameters, direction, both sums, if only a step has them whole


def solve_bytes(params_bytes: float, opt_bytes: float, *, micro_batches: bool, groups: bool,
                whole_bytes: float = 0) -> SolveBytes:
  """The parts for these sizes; in a step each device gathers parameters of `whole_bytes`."""
  sums = 2 + micro_batches + 2 * groups
  return SolveBytes(
    params_bytes, opt_bytes, params_bytes, params_bytes + opt_bytes, sums * params_bytes,
    params_bytes, (4 + micro_batches) * whole_bytes)


def host_bytes(params_bytes: float, opt_bytes: float, num_segments: int) -> float:
  """Bytes of host memory for a device: the state that each segment starts from, and params_T."""
  return num_segments * (params_bytes + opt_bytes) + params_bytes


def choose_trajectory(state_bytes: float, num_steps: int, device_bytes_free: float,
                      host_bytes_free: float = 0) -> str | int:
  """The policy that recomputes least in the memory that is free.

  Args:
    state_bytes: size of one state on one device. num_steps: T >= 1, how many states are wanted.
    device_bytes_free: free on each device beside everything else that a reverse step needs.
    host_bytes_free: free host memory for each device; 0 if the host has none to give.
  Returns:
    "all" if T states fit on the device; else "host" if they fit in host memory and two (the one in
    use and the next on its way) on the device; else the largest number of slots that fit.
  Raises:
    ValueError: if not even one state fits.
  """
  if num_steps < 1 or not state_bytes > 0:
    raise ValueError(f"num_steps={num_steps} and state_bytes={state_bytes} must be positive.")
  if num_steps * state_bytes <= device_bytes_free:
    return "all"
  if num_steps * state_bytes <= host_bytes_free and 2 * state_bytes <= device_bytes_free:
    return "host"
  slots = int(device_bytes_free // state_bytes)
  if slots < 1:
    raise ValueError(
      f"a state of {state_bytes / 2**20:,.1f} MiB a device does not fit into the "
      f"{max(device_bytes_free, 0) / 2**20:,.1f} MiB that the solve leaves free; give "
      "mesh.make.fsdp more devices or use a smaller micro-batch.")
  return slots


def num_recomputed(policy: str | int, num_steps: int) -> int:
  """Steps that the reverse pass computes again under a policy."""
  slots = trajectories.num_slots(policy, num_steps)
  if slots >= num_steps:
    return 0
  return int((~trajectories.make_schedule(num_steps, slots).is_reverse).sum())


def device_state_copies(policy: str | int, num_steps: int) -> int:
  """States that a policy holds on the device."""
  return 2 if policy == "host" else trajectories.num_slots(policy, num_steps)
