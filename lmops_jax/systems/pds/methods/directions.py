"""Scores along one direction at proxy checkpoints: the methods that PDS is compared with."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import numpy as np

from lmops_jax import control
from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  Name,
  NonEmpty,
  NonNegative,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.mesh import processes
from lmops_jax.sizing import solve_cost
from lmops_jax.systems.pds.methods.bench import DIVISORS, Bench
from lmops_jax.systems.pds.methods.sizes import Inner
from lmops_jax.training import language_models


@dataclasses.dataclass(frozen=True)
class _DirectionMethod(abc.ABC):
  """Scores `<direction, grad l_n>` at proxy checkpoints; subclasses say which direction.

  Attributes:
    checkpoints, num_target, micro_batch_size, divide_by: as in `PMP`.
  """

  checkpoints: Annotated[Sequence[Count], NonEmpty, Distinct] | None = None
  num_target: PositiveInt | None = None
  micro_batch_size: PositiveInt = 64
  divide_by: Literal[DIVISORS] | None = None

  def needs_forward_mode(self) -> bool:
    """True: it differentiates the proxy's losses along the direction."""
    return True

  @abc.abstractmethod
  def direction(self, bench: Bench, params, target_grad):
    """A tree like `params`, along which the proxies' losses are differentiated."""

  def score_proxies(self, bench: Bench) -> np.ndarray:
    bench.check_sizes(self)
    num_proxies = len(bench.proxies["example_id"])
    proxies, proxy_batch_size = bench.place_rows(bench.proxies, self.micro_batch_size)
    target_loss = bench.target_loss(self.num_target, self.micro_batch_size)
    gradient = jax.jit(jax.grad(target_loss))
    rows = []
    for step in self.checkpoints or (bench.proxy.num_steps,):
      params = bench.proxy_params(step)
      with bench.partitioner.activate():
        direction = self.direction(bench, params, gradient(params))
        values = processes.fetch(control.directional_scores(
          bench.example_losses, params, direction, proxies, proxy_batch_size,
          device_rows=bench.partitioner.device_rows,
        ))[:num_proxies]
      rows.append(bench.divided(values, params, self.divide_by))
    num_target = len(bench.target_batch(self.num_target)["example_id"])
    num_scored = num_target + num_proxies
    bench.add_flops(num_scored * bench.corpus.length * len(rows), 3)
    return np.stack(rows)


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class OneStep(_DirectionMethod):
  """Gradient similarity at one step, `<grad J, grad l_n>`: the limit of PDS for T = 1."""

  name: Name = "one_step"

  def direction(self, bench, params, target_grad):
    return target_grad


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class InfluenceScores(_DirectionMethod):
  """IF-score: `<(H + damping I)^-1 grad J, grad l_n>` at one checkpoint, H of the corpus loss.

  Attributes:
    curvature: "fisher" (positive semi-definite) or "hessian", which far from a minimum has negative
      eigenvalues that the damping must exceed.
    damping: added to the Hessian's diagonal; None: a hundredth of its mean eigenvalue.
    solver: "lissa" or "cg". The matrix is so ill-conditioned with a small damping that conjugate
      gradients need hundreds of products before they are better than nothing.
    iterations: the number of Hessian-vector products.
    num_hessian: corpus instances that estimate the Hessian, a multiple of `micro_batch_size`.
  """

  name: Name = "if_score"
  curvature: Literal["fisher", "hessian"] = "fisher"
  damping: NonNegative | None = None
  solver: Literal["lissa", "cg"] = "lissa"
  iterations: PositiveInt = 50
  num_hessian: PositiveInt = 256
  data_seed: Seed = 0

  def __post_init__(self):
    if self.num_hessian % min(self.micro_batch_size, self.num_hessian):
      raise ValueError(
        f"pds.InfluenceScores.num_hessian={self.num_hessian} is not a multiple of "
        f"micro_batch_size={self.micro_batch_size}; choose one."
      )

  def inner(self) -> Inner:
    """The instances that estimate the Hessian."""
    return Inner(self.num_hessian, "num_hessian")

  def direction(self, bench, params, target_grad):
    source = language_models.batch_source(bench.corpus, None, self.num_hessian, self.data_seed)
    batch = bench.partitioner.place_batch(
      {name: rows[None] for name, rows in source.batch(0).items()}, axis=1
    )
    passes = solve_cost.influence_passes(
      self.solver, self.iterations, curvature=self.curvature, damping=self.damping
    )
    bench.add_flops(self.num_hessian * bench.corpus.length, passes)
    return control.influence_direction(
      bench.example_losses, target_grad, params, batch, damping=self.damping,
      curvature=self.curvature, method=self.solver, iterations=self.iterations,
      micro_batch_size=bench.partitioner.micro_batch_size(
        self.num_hessian, min(self.micro_batch_size, self.num_hessian)),
    )
