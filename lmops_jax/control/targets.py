"""Target losses from data: the mean over a dev set as a function of the parameters alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks
from lmops_jax.control.dynamics import weighted_loss
from lmops_jax.mesh.micro_batches import DeviceRows, RowSum, fill_parts, sum_over_micro_batches


def mean_target_loss(example_losses: Callable, data: Any, batch_size: int | None = None, *,
                     num_rows: int | None = None,
                     device_rows: DeviceRows | None = None) -> "MeanTargetLoss":
  """`params -> mean_n l_n(params)` over the rows of `data`.

  Args:
    example_losses: `(params, batch) -> [B]`.
    data: leaves `[M, ...]`, M >= 1; traced as an argument of whatever is jitted, never compiled in.
    batch_size: rows evaluated at once (any size). The gradient of a part is taken together with its
      loss, so it needs the memory of one part and recomputes nothing; it can then be
      differentiated once only, in reverse mode.
    num_rows: the mean is over the first `num_rows` rows, by default all; the rest only fill the
      data up to a size that a mesh divides (their losses must be finite).
    device_rows: sums over each device's rows first (see `micro_batches`); the loss can then be
      differentiated once only, too.
  Raises:
    ValueError: if `data` has no row, leaves of different lengths, fewer rows than `num_rows`, or
      rows that the devices of `device_rows` do not divide.
  """
  checks.function(example_losses, "example_losses")
  size, = checks.leading_axes(data, "the target data", 1, "M")
  if num_rows is not None:
    num_rows = checks.integer(num_rows, "num_rows", 1, size)
  if batch_size is not None:
    batch_size = checks.integer(batch_size, "batch_size", 1)
  checks.device_rows(device_rows, data=size)
  return MeanTargetLoss(checks.arrays(data, "the target data"), example_losses, batch_size,
                        num_rows, device_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanTargetLoss:
  """A callable pytree: the data are its leaves."""
  data: Any
  example_losses: Callable = dataclasses.field(metadata={"static": True})
  batch_size: int | None = dataclasses.field(default=None, metadata={"static": True})
  num_rows: int | None = dataclasses.field(default=None, metadata={"static": True})
  device_rows: DeviceRows | None = dataclasses.field(default=None, metadata={"static": True})

  def __call__(self, params: Any) -> jax.Array:
    size, num_rows = self._size, self._num_counted
    if self.device_rows is None and (self.batch_size is None or self.batch_size >= size):
      losses = self.example_losses(params, self.data)
      losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
      if num_rows == size:
        return jnp.mean(losses)
      return jnp.sum(jnp.where(jnp.arange(size) < num_rows, losses, 0)) / num_rows
    data, weights, part_size = self._parts()
    return _sum_of_parts(
      self.example_losses, part_size, self.device_rows, params, data, weights)

  def gradient_sum(self, params: Any, is_wanted: jax.Array) -> RowSum:
    """The sum over rows that is `(J, grad J)`, or J and zeros if `is_wanted` (`[]`) is False."""
    data, weights, part_size = self._parts()

    def part(whole, data, weights):
      params, is_wanted = whole
      loss = functools.partial(_weighted_sum, self.example_losses)
      def alone(*args):
        return loss(*args), jax.tree.map(jnp.zeros_like, params)
      return jax.lax.cond(
        is_wanted, jax.value_and_grad(loss), alone, params, data, weights), None

    return RowSum(part, (params, is_wanted), data, weights, part_size)

  @property
  def _size(self) -> int:
    return jax.tree.leaves(self.data)[0].shape[0]

  @property
  def _num_counted(self) -> int:
    return self._size if self.num_rows is None else self.num_rows

  def _parts(self) -> tuple[Any, jax.Array, int | None]:
    """Rows that the size of a part divides, their weights in the mean, and that size."""
    data, part_size = self.data, self.batch_size
    if self.device_rows is None:
      data, part_size = fill_parts(data, part_size)
    is_row = jnp.arange(jax.tree.leaves(data)[0].shape[0]) < self._num_counted  # no repeats
    return data, jnp.where(is_row, 1 / self._num_counted, 0), part_size


def _weighted_sum(example_losses, params, data, weights):
  return weighted_loss(example_losses, params, data, weights)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum_of_parts(example_losses: Callable, part_size: int | None, device_rows: DeviceRows | None,
                  params: Any, data: Any, weights: jax.Array) -> jax.Array:
  """`sum_n weights[n] * l_n(params)`, `part_size` rows at a time."""
  return _accumulate(lambda fn: fn, example_losses, part_size, device_rows, params, data, weights)


def _forward(example_losses, part_size, device_rows, params, data, weights):
  return _accumulate(
    jax.value_and_grad, example_losses, part_size, device_rows, params, data, weights)


def _backward(example_losses, part_size, device_rows, grads, cotangent):
  return jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), grads), None, None


_sum_of_parts.defvjp(_forward, _backward)


def _accumulate(transform, example_losses, part_size, device_rows, params, data, weights):
  loss = transform(functools.partial(_weighted_sum, example_losses))
  return sum_over_micro_batches(
    lambda *args: (loss(*args), None), params, data, weights, part_size, device_rows)[0]
