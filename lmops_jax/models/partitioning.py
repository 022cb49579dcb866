"""Hints to the compiler on where activations live, by logical axis names."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def unboxed(tree):
  """A tree of shapes without Linen's boxes; `nn.unbox` would place them on the mesh in use."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def platform_in_use() -> str:
  """The platform of the mesh in use, also while tracing for other devices; or else the default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def on_one_cpu() -> bool:
  """Whether a CPU device runs this alone, also in a `shard_map`: a loop then serialises nothing."""
  mesh = jax.sharding.get_abstract_mesh()
  return platform_in_use() == "cpu" and math.prod(mesh.shape[a] for a in free_axes()) == 1


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """A hint that `x` is split as the rules say for these logical axes.

  Axes of `x` that the mesh axes do not divide stay whole, so a batch of one row and a vocabulary of
  50,257 run on any mesh; mesh axes that a `shard_map` around the model has split are left alone.
  """
  mesh, free = jax.sharding.get_abstract_mesh(), free_axes()
  if not free or not nn.get_logical_axis_rules():
    return x
  kept = []
  for size, axes in zip(x.shape, nn.logical_to_mesh_axes(names), strict=True):
    axes = [a for a in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(a, str)]
    is_even = size % math.prod(mesh.shape[a] for a in axes) == 0
    kept.append(tuple(axes) if axes and is_even and free.issuperset(axes) else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def free_axes() -> frozenset[str]:
  """The axes of the mesh in use that a `shard_map` around the caller has not split already."""
  mesh = jax.sharding.get_abstract_mesh()
  return frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)


def batch_shards() -> int:
  """Devices of the mesh in use over which a batch is still to be split."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in free_axes() & {"data", "fsdp"})
