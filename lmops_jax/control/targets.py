"""Target losses from data: the mean over a dev set as a function of the parameters alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks
from lmops_jax.control.dynamics import split_rows, take_part


def mean_target_loss(example_losses: Callable, data: Any, batch_size: int | None = None, *,
                     num_rows: int | None = None) -> "MeanTargetLoss":
  """`params -> mean_n l_n(params)` over the rows of `data`.

  Args:
    example_losses: `(params, batch) -> [B]`.
    data: leaves `[M, ...]`, M >= 1; traced as an argument of whatever is jitted, never compiled in.
    batch_size: rows evaluated at once (any size). The gradient of a part is taken together with its
      loss, so it needs the memory of one part and recomputes nothing; it is of first order then
      (reverse mode only).
    num_rows: the mean is over the first so many rows; what follows fills the data up to a size
      that a mesh divides and does not count (its losses must be finite). By default all rows.
  Raises:
    ValueError: if `data` has no row, or leaves of different lengths, or fewer rows than `num_rows`.
  """
  size, = checks.leading_axes(data, "the target data", 1, "M")
  if num_rows is not None:
    num_rows = checks.integer(num_rows, "num_rows", 1, size)
  if batch_size is not None:
    batch_size = checks.integer(batch_size, "batch_size", 1)
  return MeanTargetLoss(jax.tree.map(jnp.asarray, data), example_losses, batch_size, num_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanTargetLoss:
  """A callable pytree: the data are its leaves."""
  data: Any
  example_losses: Callable = dataclasses.field(metadata={"static": True})
  batch_size: int | None = dataclasses.field(default=None, metadata={"static": True})
  num_rows: int | None = dataclasses.field(default=None, metadata={"static": True})

  def __call__(self, params: Any) -> jax.Array:
    size_of_data = jax.tree.leaves(self.data)[0].shape[0]
    num_rows = size_of_data if self.num_rows is None else self.num_rows
    if self.batch_size is None or self.batch_size >= size_of_data:
      losses = self._losses(params, self.data)
      if num_rows == size_of_data:
        return jnp.mean(losses)
      return jnp.sum(jnp.where(jnp.arange(size_of_data) < num_rows, losses, 0)) / num_rows
    num_parts = -(-size_of_data // self.batch_size)
    size = -(-size_of_data // num_parts)
    padding = num_parts * size - size_of_data
    data = self.data
    if padding:  # repeated rows, masked out below
      data = jax.tree.map(lambda x: jnp.concatenate([x, x[:padding]]), data)
    is_row = jnp.arange(num_parts * size) < num_rows
    parts = split_rows((data, is_row), size, num_parts)

    def loss_of_part(params, parts, j):
      batch, is_row = take_part(parts, j)
      return jnp.sum(jnp.where(is_row, self._losses(params, batch), 0)) / num_rows

    return _sum_of_parts(loss_of_part, num_parts, params, parts)

  def _losses(self, params, batch):
    losses = self.example_losses(params, batch)
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_parts(loss_of_part: Callable, num_parts: int, params: Any, parts: Any) -> jax.Array:
  """`sum_j loss_of_part(params, parts, j)`."""
  return _accumulate(loss_of_part, num_parts, params, parts)


def _forward(loss_of_part, num_parts, params, parts):
  return _accumulate(jax.value_and_grad(loss_of_part), num_parts, params, parts)


def _backward(loss_of_part, num_parts, grads, cotangent):
  return jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), grads), None


_sum_of_parts.defvjp(_forward, _backward)


def _accumulate(fn, num_parts, params, parts):
  """Sum over j of a pytree, in float32 or wider."""
  shapes = jax.eval_shape(fn, params, parts, jnp.zeros((), jnp.int32))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
  total, _ = jax.lax.scan(
    lambda total, j: (jax.tree.map(lambda a, b: a + b, total, fn(params, parts, j)), None),
    zeros, jnp.arange(num_parts))
  return jax.tree.map(lambda x, like: x.astype(like.dtype), total, shapes)
