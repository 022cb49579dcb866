"""Optimal control of training: exact adjoints, data scores, learning policies, influence."""

from lmops_jax.control.adjoint import (
  directional_derivatives,
  directional_scores,
  hvp_and_scores,
  update_pullback,
)
from lmops_jax.control.data_rater import Window, rated_window
from lmops_jax.control.gradient_norms import gradient_norms
from lmops_jax.control.guards import finite_derivatives
from lmops_jax.control.in_run import InRunValues, in_run_values
from lmops_jax.control.influence import influence_direction
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.outer import OuterLoop, WeightSolution, solve_weights
from lmops_jax.control.piecewise import check_optimizer
from lmops_jax.control.pmp import pmp_scores, solve
from lmops_jax.control.policy import (
  ControlledRun,
  Improvement,
  Signals,
  Simulation,
  check_policy,
  controlled_run,
  improve_policy,
  policy_gradient,
  simulate,
)
from lmops_jax.control.result import PmpResult, check_not_all_zero, check_result
from lmops_jax.control.rules import (
  ExponentiatedGradient,
  FrankWolfe,
  ProjectedGradient,
  Rule,
  SignGradient,
)
from lmops_jax.control.several_targets import pmp_scores_by_target
from lmops_jax.control.simplex import project_simplex, stationarity_gap
from lmops_jax.control.surrogates import SURROGATES
from lmops_jax.control.targets import mean_target_loss
from lmops_jax.control.training_run import TrainingRun

__all__ = [
  "SURROGATES",
  "ControlledRun",
  "ExponentiatedGradient",
  "FrankWolfe",
  "InRunValues",
  "Improvement",
  "OuterLoop",
  "PmpResult",
  "ProjectedGradient",
  "Rule",
  "SignGradient",
  "Signals",
  "Simulation",
  "SolveOptions",
  "TrainingRun",
  "WeightSolution",
  "Window",
  "check_not_all_zero",
  "check_optimizer",
  "check_policy",
  "check_result",
  "controlled_run",
  "directional_derivatives",
  "directional_scores",
  "finite_derivatives",
  "gradient_norms",
  "hvp_and_scores",
  "improve_policy",
  "in_run_values",
  "influence_direction",
  "mean_target_loss",
  "pmp_scores",
  "pmp_scores_by_target",
  "policy_gradient",
  "project_simplex",
  "rated_window",
  "simulate",
  "solve",
  "solve_weights",
  "stationarity_gap",
  "update_pullback",
]
