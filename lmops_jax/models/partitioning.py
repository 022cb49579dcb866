"""Hints to the compiler where activations live, by logical axis names."""

from __future__ import annotations

import math

import flax.linen as nn
import jax


def unboxed(tree):
  """A tree of shapes without Linen's boxes; `nn.unbox` would place them on the mesh in use."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """`nn.with_logical_constraint`, leaving whole what the mesh axes do not divide.

  So a batch of one row and a vocabulary of 50,257 run on any mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return x
  kept = []
  for name, size, axes in zip(names, x.shape, nn.logical_to_mesh_axes(names), strict=True):
    axes = axes if isinstance(axes, tuple) else (axes,)
    parts = math.prod(mesh.shape[axis] for axis in axes if isinstance(axis, str))
    kept.append(None if size % parts else name)
  return nn.with_logical_constraint(x, tuple(kept))


def platform() -> str:
  """"cpu", "gpu" or "tpu": of the mesh in use, else the default one; known while tracing."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
