"""Scores for several target losses from one training run.

Scores are linear in J, so each of K target losses needs a costate of its own but not a run of its
own (arXiv 2410.07064 chooses one J; several tell what an example is good for). The K recursions run
side by side: the trajectory, the primal part of every Hessian-vector product and of every
directional derivative, and the forward pass of every target loss are computed once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.pmp import pmp_scores
from lmops_jax.control.result import PmpResult


def pmp_scores_by_target(
    example_losses: Callable, target_losses: Sequence[Callable], optimizer: Any, params: Any,
    batches: Any, weights: Any, **kwargs: Any) -> PmpResult:
  """`pmp_scores` for each of K target losses.

  Args:
    target_losses: K functions `params -> []`. The scores for any weighted sum of them are the same
      weighted sum of the results.
    **kwargs: the further arguments of `pmp_scores`.
  Returns:
    A `PmpResult` whose leaves have a leading axis K (`scores [K,T,B]`, `proxy_scores [K,M]`,
    `target_losses [K,T+1]`, ...), except `params` and `step_losses`, which belong to the one run.
  Raises:
    ValueError: if there is no target loss, and as `pmp_scores`.
  """
  if not isinstance(target_losses, list | tuple) or not target_losses:
    raise ValueError(
      f"target_losses must be a list of one or more functions, got {target_losses!r}.")
  for loss in target_losses:
    if not callable(loss):
      raise ValueError(f"target_losses holds {loss!r}; expected functions.")
    checks.target(loss, params, "one of target_losses")
  losses = tuple(as_pytree(loss) for loss in target_losses)

  def solve(share):
    return pmp_scores(
      example_losses, _WeightedSum(losses, share), optimizer, params, batches, weights, **kwargs)

  # Leaves that do not depend on the target are not batched, which out_axes=None checks.
  axes = PmpResult(*[0] * len(PmpResult._fields))._replace(params=None, step_losses=None)
  return jax.vmap(solve, out_axes=axes)(jnp.eye(len(losses)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WeightedSum:
  """`params -> sum_k shares[k] * losses[k](params)`."""
  losses: tuple[Callable, ...]
  shares: jax.Array  # [K]

  def __call__(self, params: Any) -> jax.Array:
    values = jnp.stack([_value(loss, params) for loss in self.losses])
    return jnp.sum(self.shares.astype(values.dtype) * values)


@jax.custom_vjp
def _value(loss: Callable, params: Any) -> jax.Array:
  """`loss(params)`, whose gradient is taken before it is scaled: once, whatever the shares are."""
  return loss(params)


def _forward(loss, params):
  return jax.value_and_grad(lambda p: loss(p))(params)


def _backward(grads, cotangent):
  return None, jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), grads)


_value.defvjp(_forward, _backward)
