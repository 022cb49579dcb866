"""What a solve gives, and the checks that it did not diverge."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.control.problem import Outputs, Target

# The costate grows like T times the target gradient; beyond this factor the adjoint has diverged.
_MAX_GROWTH = 1e4


class PmpResult(NamedTuple):
  """Scores and the logs of both passes.

  Index t of `costate_norms`, `target_grad_norms` and `costates` belongs to `params_{t+1}`.
  """
  scores: jax.Array  # [T, B] -dA/dweights[t, n], positive = helpful
  proxy_scores: jax.Array | None  # [M] summed over the scored steps
  target_losses: jax.Array  # [T + 1] J(params_0 .. params_T)
  params: Any  # params_T
  costate_norms: jax.Array  # [T] |lambda_1| .. |lambda_T|
  target_grad_norms: jax.Array  # [T] |grad J| at params_1 .. params_T, 0 outside A
  step_losses: jax.Array  # [T] weighted training loss before each step
  costates: Any  # leaves [T, ...] lambda_1 .. lambda_T, or None
  monitors: Any = None  # leaves [T + 1, ...] at params_0 .. params_T, or None


def make_result(outs: Outputs, final_target: Target, proxy_scores: Any,
                final_params: Any) -> PmpResult:
  """Puts the stacked outputs of the reverse pass together."""
  target = jax.tree.map(lambda x, last: jnp.append(x, last.astype(x.dtype)), outs.target,
                        final_target)
  return PmpResult(
    scores=outs.scores, proxy_scores=proxy_scores, target_losses=target.loss, params=final_params,
    costate_norms=outs.costate_norm, target_grad_norms=target.grad_norm[1:],
    step_losses=outs.step_loss, costates=outs.costate, monitors=target.monitor)


def check_result(result: PmpResult) -> PmpResult:
  """Returns `result`, or raises if the forward or the adjoint recursion diverged (host side).

  Raises:
    FloatingPointError: naming the first step at which a loss is not finite, or the step at which
      the costate is not finite or exceeds `1e4 * T * max |grad J|`: the adjoint explodes when the
      learning rate is above 2 / (largest Hessian eigenvalue), even if training looks fine.
    ValueError: if every score is 0, with the likely reason.
  """
  num_steps = len(result.step_losses)
  check_steps(result.step_losses, result.target_losses, result.costate_norms, result.scores,
              np.max(np.asarray(result.target_grad_norms, np.float64)), num_steps)
  if result.proxy_scores is not None and not np.isfinite(np.asarray(result.proxy_scores)).all():
    raise FloatingPointError("A proxy score is not finite although the costates are; check the "
                             "proxy examples.")
  check_not_all_zero(result.scores, result.target_grad_norms, result.proxy_scores)
  return result


def check_not_all_zero(scores: Any, target_grad_norms: Any, proxy_scores: Any = None) -> None:
  """Waits for the scores, and refuses them if all are 0, since they then rank nothing.

  Raises:
    ValueError: with the likely reason.
  """
  if not jnp.any(scores):
    reason = "is the learning rate 0, or are fewer steps taken than the optimizer accumulates?"
    if not jnp.any(target_grad_norms):
      reason = "the gradient of the target loss is 0 at every parameter of the run."
    raise ValueError(f"Every score is 0, so the scores rank nothing: {reason}")
  if proxy_scores is not None and not jnp.any(proxy_scores):
    raise ValueError(
      "Every proxy score is 0 although those of the examples trained on are not: does the loss of "
      "a proxy depend on the parameters?")


def check_steps(step_losses, target_losses, costate_norms, scores, target_grad_norm: float,
                num_steps: int, start: int = 0) -> None:
  """`check_result` for the steps from `start` on; `target_grad_norm` is the largest known."""
  for name, values in (("training loss", step_losses), ("target loss", target_losses)):
    values = np.asarray(values, np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      raise FloatingPointError(
        f"The {name} is {values[bad[0]]} at step {start + bad[0]} of {num_steps}; lower the "
        "learning rate or check the data.")
  norms = np.asarray(costate_norms, np.float64)
  bound = _MAX_GROWTH * num_steps * target_grad_norm
  for i in range(len(norms) - 1, -1, -1):  # in the order of the recursion
    if not np.isfinite(norms[i]) or norms[i] > bound:
      raise FloatingPointError(
        f"The costate diverged: its norm is {norms[i]:.3g} at step {start + i + 1} of {num_steps} "
        f"(bound {bound:.3g}); lower the learning rate below 2 / (largest Hessian eigenvalue).")
  bad = np.argwhere(~np.isfinite(np.asarray(scores)))
  if bad.size:
    raise FloatingPointError(f"A score is not finite at step {start + bad[0][0]} of {num_steps}.")
