"""Sums over the rows of a batch: a micro-batch at a time, and on many devices added once.

Left to the partitioner, gradients are added over the mesh in every micro-batch, and parameters that
are split over devices are gathered in every layer of every micro-batch. With `DeviceRows` each
device gathers them once, runs through its own rows, and what the devices summed is added once: more
memory (whole parameters and sums on each device), far less communication.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


@dataclasses.dataclass(frozen=True)
class DeviceRows:
  """How batches lie on devices that sum their own rows before anything is added over the mesh.

  Attributes:
    mesh: the mesh that the batches lie on.
    axes: its axes that the rows are split over.
  """

  mesh: Mesh | AbstractMesh
  axes: tuple[str, ...]

  @property
  def num_shards(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes)

  def sum(self, fn: Callable, whole: Any, rows: Any) -> tuple[Any, Any]:
    """`fn(whole, rows) -> (summed pytree, per-row pytree)` over the devices' own rows.

    Args:
      whole: leaves that every device needs in full; gathered if they are split over `axes`.
      rows: leaves `[B, ...]`, B a multiple of the shards.

    Returns:
      The first output added over the devices, the second `[B, ...]` in the order of the rows.
    """
    def own(whole, rows):
      summed, of_rows = fn(whole, rows)
      return jax.tree.map(lambda x: x[None], summed), of_rows

    split = PartitionSpec(self.axes)
    # Other axes stay the partitioner's unless there is nothing on them to split.
    others = math.prod(self.mesh.shape.values()) // self.num_shards
    names = set(self.axes if others > 1 else self.mesh.axis_names)
    summed, of_rows = jax.shard_map(
      own, mesh=self.mesh, in_specs=(PartitionSpec(), split), out_specs=split, axis_names=names,
      check_vma=False)(whole, rows)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), summed), of_rows

  def size(self, num_rows: int, micro_batch_size: int | None) -> int | None:
    """Rows of a micro-batch on one device."""
    return None if micro_batch_size is None else device_share(
      num_rows, micro_batch_size, self.num_shards)


def device_share(num_rows: int, micro_batch_size: int, num_shards: int) -> int:
  """Rows of a micro-batch on each of the devices that share `num_rows`, one at least.

  A micro-batch of fewer rows than devices would be computed by several of them alike. Otherwise the
  devices' rows together are at most `micro_batch_size`.
  """
  own = num_rows // num_shards
  wanted = max(1, micro_batch_size // num_shards)
  return next(size for size in range(min(wanted, own), 0, -1) if own % size == 0)


class RowSum(NamedTuple):
  """A sum over rows that is still to be computed: the arguments of `sum_over_micro_batches`."""

  fn: Callable
  whole: Any
  batch: Any
  weights: jax.Array
  micro_batch_size: int | None


def sum_together(sums: Sequence[RowSum], device_rows: DeviceRows) -> list[tuple[Any, Any]]:
  """Several sums, one after another on each device; what they give crosses the mesh together.

  Returns:
    For each sum, what `sum_over_micro_batches` returns.
  """
  sizes = [device_rows.size(s.weights.shape[0], s.micro_batch_size) for s in sums]

  def own(wholes, rows):
    found = []
    for part, whole, own_rows, size in zip(sums, wholes, rows, sizes, strict=True):
      if found:  # the working memory of two sums never exists at the same time
        whole, found = jax.lax.optimization_barrier((whole, found))
      found.append(sum_over_micro_batches(part.fn, whole, *own_rows, size))
    return tuple(zip(*found))

  return list(zip(*device_rows.sum(
    own, [s.whole for s in sums], [(s.batch, s.weights) for s in sums])))


def fill_parts(rows: Any, micro_batch_size: int) -> tuple[Any, int]:
  """`rows` with the first ones repeated until equal parts of at most that size divide them.

  Returns:
    Leaves `[M', ...]`, and the size of a part: the smallest for as many parts as that size needs,
    so that the fewest rows are repeated.
  """
  num_rows = jax.tree.leaves(rows)[0].shape[0]
  num_parts = -(-num_rows // micro_batch_size)
  size = -(-num_rows // num_parts)
  padding = num_parts * size - num_rows
  if padding:
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x[:padding]]), rows)
  return rows, size


def sum_over_micro_batches(fn: Callable, whole: Any, batch: Any, weights: jax.Array,
                           micro_batch_size: int | None, device_rows: DeviceRows | None = None):
  """Sums `fn(whole, batch, weights) -> (summed pytree, per-example pytree)` a part at a time.

  Micro-batch `j` of `n` takes examples `j, n + j, 2n + j, ...`: the example axis is cut on its
  minor side, so a batch that is sharded over devices stays sharded and no example moves.

  Args:
    fn: reads no traced arrays but its arguments; derivatives are taken in it, not of the sum.
    whole: the same for every part, such as parameters.
    batch: leaves `[B, ...]`. weights: `[B]`.
    micro_batch_size: examples at once, a divisor of B; None means all.
    device_rows: sums on each device first; None leaves it to the partitioner.

  Returns:
    The first output summed over parts (accumulated in float32 or wider), the second with `[B]` rows
    in the original order.
  """
  size = weights.shape[0]
  if device_rows is not None:
    return sum_together([RowSum(fn, whole, batch, weights, micro_batch_size)], device_rows)[0]
  if micro_batch_size is None or micro_batch_size >= size:
    return fn(whole, batch, weights)
  num_parts = size // micro_batch_size
  parts = jax.tree.map(
    lambda x: x.reshape(micro_batch_size, num_parts, *x.shape[1:]), (batch, weights))

  def take(j):
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False), parts)

  def part(total, j):
    summed, rows = fn(whole, *take(j))
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, summed), rows

  out, _ = jax.eval_shape(lambda: fn(whole, *take(0)))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), out)
  total, rows = jax.lax.scan(part, zeros, jnp.arange(num_parts))
  total = jax.tree.map(lambda a, b: a.astype(b.dtype), total, out)
  def join(x):  # [num_parts, micro_batch_size, ...] -> [B, ...], undoing the interleaving
    return jnp.swapaxes(x, 0, 1).reshape(size, *x.shape[2:])
  return total, jax.tree.map(join, rows)
