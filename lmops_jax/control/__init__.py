"""Optimal control of training: exact adjoints of optimizer runs, data scores, influence."""

from lmops_jax.control.adjoint import (
  directional_derivatives,
  directional_scores,
  hvp_and_scores,
  update_pullback,
)
from lmops_jax.control.cost import Passes, influence_passes, solve_passes
from lmops_jax.control.guards import finite_derivatives
from lmops_jax.control.influence import influence_direction
from lmops_jax.control.outer import WeightSolution, project_simplex, solve_weights
from lmops_jax.control.pmp import PmpResult, check_result, pmp_scores
from lmops_jax.control.resumable import pmp_scores_resumable
from lmops_jax.control.targets import mean_target_loss

__all__ = [
  "Passes",
  "PmpResult",
  "WeightSolution",
  "check_result",
  "directional_derivatives",
  "directional_scores",
  "finite_derivatives",
  "hvp_and_scores",
  "influence_direction",
  "influence_passes",
  "mean_target_loss",
  "pmp_scores",
  "pmp_scores_resumable",
  "project_simplex",
  "solve_passes",
  "solve_weights",
  "update_pullback",
]
