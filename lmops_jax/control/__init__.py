"""Optimal control of training: exact adjoints of optimizer runs, data scores, influence functions."""

from lmops_jax.control.adjoint import (
  directional_derivatives,
  directional_scores,
  hvp_and_scores,
  update_pullback,
)
from lmops_jax.control.guards import finite_derivatives
from lmops_jax.control.pmp import PmpResult, check_result, pmp_scores

__all__ = [
  "PmpResult",
  "check_result",
  "directional_derivatives",
  "directional_scores",
  "finite_derivatives",
  "hvp_and_scores",
  "pmp_scores",
  "update_pullback",
]
