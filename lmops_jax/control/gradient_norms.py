"""Norms of per-example gradients, which turn scores into cosines.

The size of a score follows the size of the example's gradient, so that mislabelled or noisy
examples can score high; a score divided by that size depends on the direction alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import strong
from lmops_jax.control.problem import tree_norm


def gradient_norms(example_losses: Callable, params: Any, data: Any,
                   batch_size: int = 1) -> jax.Array:
  """`|grad l_n(params)|` of every row of `data`, `[M] float32` (or wider, as the parameters).

  Args:
    example_losses: `(params, batch) -> [B]`.
    data: leaves `[M, ...]`.
    batch_size: how many gradients, each as large as the parameters, exist at a time (any size).
  """
  checks.parameters(params)
  num_rows, = checks.leading_axes(data, "data", 1, "M")
  params, data = strong(params), checks.arrays(data, "data")
  checks.losses(example_losses, params, data, num_rows, "data")
  return _gradient_norms(
    as_pytree(example_losses), params, data, checks.integer(batch_size, "batch_size", 1))


@functools.partial(jax.jit, static_argnames="batch_size")
def _gradient_norms(example_losses, params, data, batch_size):
  def norm(row):
    batch = jax.tree.map(lambda x: x[None], row)
    return tree_norm(jax.grad(lambda p: jnp.sum(example_losses(p, batch)))(params))

  return jax.lax.map(norm, data, batch_size=batch_size)
