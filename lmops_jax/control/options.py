"""The options of a solve: what it computes and how, without its data.

They are spelled here and nowhere else. Annotations are the rules for a single option; rules that
join several of them, or need the size of the run, are methods.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Seed, component
from lmops_jax.control import checks
from lmops_jax.control.adjoint import HVP_MODES
from lmops_jax.control.surrogates import SURROGATES
from lmops_jax.control.trajectory import POLICIES

OBJECTIVES = ("area", "terminal")
AUTO = "auto"  # a trajectory that is still to be decided


@component(module="control")
@dataclasses.dataclass(frozen=True)
class SolveOptions:
  """What a solve computes and how; hashable, the static argument of every compiled solve.

  Attributes:
    objective: "area", `sum_{t=1..T} J(params_t)`, or "terminal", `J(params_T)`.
    trajectory: "all", "sqrt", "host", or the largest number of states to store (see `trajectory`);
      with a store these are the states of one segment. "auto" stands for the one that recomputes
      least in the memory of the devices; a caller who knows that memory decides it before the
      solve (see `sizing.solve_plan`).
    every_k: proxies are scored at the steps t with `t % every_k == 0`.
    groups: instead, split the T steps into this many contiguous groups and score each group once,
      along the sum of its cotangents at its mean parameters, weighted by the cotangents' norms.
      `groups=T` is `every_k=1`; every step enters whatever the number of groups. At most T.
    proxy_samples: instead of `every_k` or `groups`, score each proxy at this many random steps (its
      own, drawn by `sample_seed`) with weight `T / proxy_samples`: an unbiased estimate of
      `every_k=1` at the price of that many passes over the proxies. At most T.
    sample_seed: the seed of those random steps.
    hessian: False drops the Hessian term of the recursion (an ablation: no longer the gradient).
    hvp_mode: "jvp_of_grad", or "vjp_of_grad" for losses without forward-mode rules.
    micro_batch_size: examples of a step that are differentiated at once, a divisor of B; None: all.
    proxy_batch_size: proxies scored at once; by default `micro_batch_size` or `max(B, 32)`.
    keep_costates: also return all costates (T times the parameters).
    surrogate: "clipped_straight_through" gives a sign in the update of the optimizer a derivative
      that is not 0 (see `surrogates`) if a parameter has no other: the update of Lion, sign SGD or
      Rprop is piecewise constant, and all its exact scores are 0. The run itself stays as it is,
      and so do the derivatives of every other optimizer, which are exact.
    segment_steps: steps between two points that a store keeps, about sqrt(T) for the lowest memory;
      not read without a store, and never part of a compiled program.
  """

  objective: Literal[OBJECTIVES] = "area"
  trajectory: Literal[(*POLICIES, AUTO)] | PositiveInt = "all"
  every_k: PositiveInt = 1
  groups: int | None = None
  proxy_samples: int | None = None
  sample_seed: Seed = 0
  hessian: bool = True
  hvp_mode: Literal[HVP_MODES] = "jvp_of_grad"
  micro_batch_size: PositiveInt | None = None
  proxy_batch_size: PositiveInt | None = None
  keep_costates: bool = False
  surrogate: Literal[SURROGATES] | None = None
  # Options that differ in it alone are equal, so that jit reuses its compiled program.
  segment_steps: PositiveInt = dataclasses.field(default=10, compare=False)

  def __post_init__(self):
    if self.groups is not None and self.every_k != 1:
      raise ValueError(
        f"every_k={self.every_k} and groups={self.groups} both choose when proxies are scored; set "
        "one.")
    if self.proxy_samples is not None and (self.every_k != 1 or self.groups is not None):
      raise ValueError(
        f"proxy_samples={self.proxy_samples} goes with neither groups={self.groups} nor every_k="
        f"{self.every_k}, since both choose when proxies are scored; set groups to None and "
        "every_k to 1.")

  def check_sizes(self, num_steps: int, batch_size: int | None = None) -> None:
    """Refuses options that do not fit T steps, or batches of B examples if B is known.

    Raises:
      ValueError: naming the option.
    """
    for name in ("groups", "proxy_samples"):
      if (value := getattr(self, name)) is not None:
        told = f"control.SolveOptions.{name}={value}: {name} of T={num_steps} steps"
        checks.integer(value, told, 1, num_steps)
    if batch_size is not None:
      checks.micro_batch(
        self.micro_batch_size, "control.SolveOptions.micro_batch_size", batch_size)

  def checked(self, num_steps: int, batch_size: int) -> "SolveOptions":
    """These options for a solve of that size, with plain numbers and every default filled in.

    Raises:
      ValueError: as `check_sizes`, or for a trajectory that is not decided.
    """
    self.check_sizes(num_steps, batch_size)
    if self.trajectory == AUTO:
      raise ValueError(
        f"control.SolveOptions.trajectory={AUTO!r} must be decided before a solve, from the memory "
        f"of its devices; give {', '.join(map(repr, POLICIES))} or a number of states.")
    plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
    return SolveOptions(**plain | dict(
      proxy_batch_size=(
        plain["proxy_batch_size"] or plain["micro_batch_size"] or max(batch_size, 32)),
      segment_steps=min(plain["segment_steps"], num_steps)))

  def changed(self) -> dict[str, Any]:
    """The options that are not at their defaults, by name."""
    return {f.name: value for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default}


def _plain(value: Any) -> Any:
  """NumPy's and jax's scalars as Python's, which are hashable and have one spelling."""
  return value.item() if isinstance(value, np.generic | jax.Array) else value
