"""Device mesh and where every array lives on it.

Three mesh axes: `data` splits the batch and replicates parameters, `fsdp` splits the batch and the
parameters, `tensor` splits heads, mlp and vocabulary. Logical axis names of parameters and
activations map to them in one table of rules, first match first, each mesh axis at most once an
array.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lmops_jax.config.setting_types import PositiveInt, Text, component
from lmops_jax.mesh import processes
from lmops_jax.mesh.micro_batches import DeviceRows, device_share
from lmops_jax.models.partitioning import unboxed

AXES = ("data", "fsdp", "tensor")
MeshSize = PositiveInt | Literal[-1]
MeshAxes = Literal[AXES] | Sequence[Literal[AXES]] | None
REDUCTIONS = ("auto", "step", "layer")
BATCH_AXES = ("data", "fsdp")
HOST_FIELDS = ("example_id",)  # 63-bit, and read on the host only

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

_TENSOR: Rules = (("mlp", "tensor"), ("heads", "tensor"), ("kv_heads", "tensor"),
                  ("vocab", "tensor"))
_WHOLE: Rules = (("sequence", None), ("head_dim", None), ("layers", None))
RULES: dict[str, Rules] = {
  # Activations give `fsdp` to the batch first, so only parameters are split over embed.
  "default": (("batch", BATCH_AXES), *_TENSOR, ("embed", "fsdp"), *_WHOLE),
  # Parameters and optimizer state over the data axis as well (ZeRO-3).
  "sharded": (("batch", BATCH_AXES), *_TENSOR, ("embed", BATCH_AXES), *_WHOLE),
  # Plain data parallelism.
  "replicated": (("batch", BATCH_AXES), ("mlp", None), ("heads", None), ("kv_heads", None),
                 ("vocab", None), ("embed", None), *_WHOLE),
}


@component("make", module="mesh")
@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left.

  Attributes:
    data: batch split, parameters replicated.
    fsdp: batch and parameters split.
    tensor: heads, mlp and vocabulary split.
    rules: name in `RULES`, or pairs of logical axis and mesh axis (or axes, or None).
    reduction: when gradients are added over the mesh: "step", once, after each device has gathered
      the parameters and summed its own rows; "layer", wherever the partitioner does it, in every
      layer and micro-batch, so that no device holds all parameters; "auto" is "step" unless
      parameters are split over the axes of the batch.

  Raises:
    ValueError: for sizes, rules or a reduction that make no sense.
  """

  data: MeshSize = -1
  fsdp: MeshSize = 1
  tensor: MeshSize = 1
  rules: Literal[tuple(RULES)] | Sequence[tuple[Text, MeshAxes]] = "default"
  reduction: Literal[REDUCTIONS] = "auto"

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor)
    if sizes.count(-1) > 1:
      raise ValueError(
        f"mesh.make has data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}; each must be at "
        "least 1, and at most one may be -1 to take the remaining devices."
      )
    if not isinstance(self.rules, str):
      object.__setattr__(self, "rules", tuple(
        (name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in self.rules))

  def build(self, devices: Sequence[jax.Device] | None = None) -> Partitioner:
    """The mesh over all devices of all processes, or over those given.

    Raises:
      ValueError: when the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = self.sizes(len(devices))
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Partitioner(mesh, self._rules(), reduction=self.reduction)

  def plan(self, num_devices: int) -> Partitioner:
    """The mesh over devices that need not exist, for shapes and shardings only.

    Raises:
      ValueError: as `build`.
    """
    mesh = AbstractMesh(self.sizes(num_devices), AXES, axis_types=(AxisType.Auto,) * 3)
    return Partitioner(mesh, self._rules(), reduction=self.reduction)

  def sizes(self, num_devices: int) -> tuple[int, ...]:
    """Sizes of the axes on that many devices.

    Raises:
      ValueError: when they do not multiply to that number.
    """
    sizes = [self.data, self.fsdp, self.tensor]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and num_devices % known == 0:
      sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
      raise ValueError(
        f"mesh.make has data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}, which does not "
        f"fit {num_devices} devices; their product must be that number."
      )
    return tuple(sizes)

  def _rules(self) -> Rules:
    return RULES[self.rules] if isinstance(self.rules, str) else self.rules


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """A mesh, the rules that place arrays on it, and the mesh axes that split a batch."""

  mesh: Mesh | AbstractMesh
  rules: Rules
  batch_axes: tuple[str, ...] = BATCH_AXES
  reduction: str = "auto"

  @property
  def device_rows(self) -> DeviceRows | None:
    """How rows lie, if gradients are added over the mesh once a step; else None."""
    axes = self._axes_in_use
    if not axes or self.reduction == "layer" or (self.reduction == "auto" and self.splits_params):
      return None
    return DeviceRows(self.mesh, axes)

  @property
  def splits_params(self) -> bool:
    """Whether parameters are split over axes that split the batch."""
    split = {axis for name, to in self.rules if name != "batch"
             for axis in (to if isinstance(to, tuple) else (to,))}
    return bool(split.intersection(self._axes_in_use))

  @property
  def _axes_in_use(self) -> tuple[str, ...]:
    return tuple(axis for axis in self.batch_axes if self.mesh.shape[axis] > 1)

  def with_batch_over(self, *axes: str) -> Partitioner:
    """The same with the batch over other mesh axes, or over none."""
    others = tuple(rule for rule in self.rules if rule[0] != "batch")
    return dataclasses.replace(self, rules=(("batch", axes or None), *others), batch_axes=axes)

  @property
  def num_batch_shards(self) -> int:
    """The number that a batch size must be a multiple of."""
    return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

  @property
  def platform(self) -> str:
    """The kind of the mesh's devices: "cpu", "gpu" or "tpu"."""
    return self.mesh.devices.flat[0].platform

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @contextlib.contextmanager
  def activate(self):
    """Inside, constraints on logical axes in the models take effect. Enter it to trace and call."""
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
      yield self

  def shardings(self, abstract, *, uneven: str = "refuse"):
    """A `NamedSharding` for every leaf.

    Args:
      abstract: tree of `ShapeDtypeStruct`s or arrays as from `jax.eval_shape`, with Linen's boxes
        around leaves that have logical axes (an optax state of boxed parameters has them too).
        Leaves without box are replicated.
      uneven: what to do with an axis that its mesh axes do not divide: "refuse" it, or leave it
        "whole" on each device (for models whose sizes are given).

    Returns:
      The unboxed tree of shardings.

    Raises:
      ValueError: naming a parameter that a mesh axis does not divide.
    """
    if uneven not in ("refuse", "whole"):
      raise ValueError(f'uneven={uneven!r} is neither "refuse" nor "whole".')
    specs = nn.get_partition_spec(_without_empty_boxes(abstract))
    shardings = nn.logical_to_mesh_sharding(specs, self.mesh, self.rules)

    def even(path, leaf, sharding):
      spec = []
      for size, axes in zip(leaf.shape, sharding.spec):
        names = axes if isinstance(axes, tuple) else (axes,)
        parts = math.prod(self.mesh.shape[a] for a in names if a is not None)
        if size % parts and uneven == "refuse":
          raise ValueError(
            f"{jax.tree_util.keystr(path)} of shape {leaf.shape} has an axis of {size} that the "
            f"mesh axes {names} cannot split into {parts}; change mesh.make or the model's sizes."
          )
        spec.append(None if size % parts else axes)
      return NamedSharding(self.mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(even, unboxed(abstract), shardings)

  def placed_shapes(self, abstract, *, uneven: str = "refuse"):
    """The leaves' `ShapeDtypeStruct`s, unboxed, with the shardings that `shardings` gives them."""
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      unboxed(abstract), self.shardings(abstract, uneven=uneven))

  def filled_rows(self, num: int, micro_batch_size: int) -> tuple[int, int]:
    """How many rows `num` is filled up to, and a micro-batch size, both divided by the mesh.

    Returns:
      A multiple of the micro-batch size, at least `num`, and that size: at most `micro_batch_size`
      rounded up to a multiple of the mesh's shards.
    """
    shards = self.num_batch_shards
    num_parts = -(-num // (-(-micro_batch_size // shards) * shards))
    size = -(-num // (num_parts * shards)) * shards
    return num_parts * size, size

  def micro_batch_size(self, num_rows: int, wanted: int | None) -> int | None:
    """Rows of a micro-batch of `num_rows`, equally many on each device (see `device_share`).

    Args:
      num_rows: a multiple of the mesh's shards.
      wanted: the most rows, unless the mesh has more shards; None for all.
    """
    if wanted is None:
      return None
    return self.num_batch_shards * device_share(num_rows, wanted, self.num_batch_shards)

  def batch_sharding(self, ndim: int, axis: int = 0) -> NamedSharding:
    """The rows' axis over the batch axes, others whole; an array of `ndim` 0 is replicated."""
    split = ndim and self.batch_axes
    spec = PartitionSpec(*(None,) * axis, self.batch_axes) if split else PartitionSpec()
    return NamedSharding(self.mesh, spec)

  def place_batch(
    self, batch: Mapping[str, np.ndarray], axis: int = 0
  ) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process holds; `example_id` stays on the host.

    Args:
      batch: the rows of this process.
      axis: that of the rows: 0, or 1 for batches that are stacked by step, `[T,B,...]`.

    Raises:
      ValueError: when the batch does not split evenly over the mesh.
    """
    return self._placed(batch, self._processes, self._from_own_rows, axis)

  def place_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """As `place_batch`, from rows that every process holds, or can read, in full."""
    return self._placed(rows, 1, self._from_all_rows, 0)

  def _placed(self, rows, parts, make, axis):
    placed = {}
    for name, value in rows.items():
      if name in HOST_FIELDS:
        continue
      value = np.asarray(value)
      num = value.shape[axis] * parts
      if num % self.num_batch_shards:
        raise ValueError(
          f"A batch of {num} examples does not split over {' x '.join(self.batch_axes)} = "
          f"{self.num_batch_shards} devices; set the batch size to a multiple of "
          f"{self.num_batch_shards}."
        )
      placed[name] = make(value, self.batch_sharding(value.ndim, axis))
    return placed

  @property
  def _processes(self) -> int:
    """Processes that the mesh spans: each gives its part of a batch."""
    return len({device.process_index for device in self.mesh.devices.flat})

  def _from_own_rows(self, value, sharding):
    if self._processes == 1:
      return jax.device_put(value, sharding)
    return jax.make_array_from_process_local_data(sharding, value)

  def _from_all_rows(self, value, sharding):
    if self._processes == 1:
      return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  def local(self) -> Partitioner:
    """The same rules on a mesh of this process's devices only; itself in a job of one process."""
    if self._processes == 1:
      return self
    num, sizes = len(jax.local_devices()), {}
    for axis in ("tensor", "fsdp"):
      sizes[axis] = math.gcd(self.mesh.shape[axis], num)
      num //= sizes[axis]
    shape = (num, sizes["fsdp"], sizes["tensor"])
    mesh = jax.make_mesh(
      shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.local_devices())
    return dataclasses.replace(self, mesh=mesh)


def _without_empty_boxes(tree):
  """A tree whose boxes hold an array each: an optimizer that masks parameters leaves others."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  return jax.tree.map(
    lambda x: x.value if is_box(x) and not jax.tree.leaves(x) else x, tree, is_leaf=is_box)


def activated(partitioner: Partitioner | None):
  """`partitioner.activate()`, or for None a context that does nothing."""
  return contextlib.nullcontext() if partitioner is None else partitioner.activate()


def shards_of(partitioner: Partitioner | None) -> int:
  """`partitioner.num_batch_shards`, or 1 for None, which is one device."""
  return 1 if partitioner is None else partitioner.num_batch_shards


def single_device() -> Partitioner:
  """A mesh of one device, the first of this process."""
  return MeshConfig(data=1).build(jax.local_devices()[:1])


def initialize_distributed(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  environ: Mapping[str, str] | None = None,
) -> bool:
  """Joins the other processes of this job, if the arguments or the environment tell of any.

  Explicit arguments win. Then `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`; then what `jax.distributed` detects by itself: SLURM and Open MPI with more than
  one task, Cloud TPU workers, Kubernetes jobs. `LMOPS_DISTRIBUTED=1` asks it to detect in any case:
  the hosts of a slice that are reached by ssh are listed in Cloud TPU's metadata only. Call it
  before anything else touches jax.

  Returns:
    Whether this is one of several processes.

  Raises:
    ValueError: when only some of the three values are given.
  """
  env = os.environ if environ is None else environ
  told = processes.told_by(env)
  explicit = tuple(
    value if value is not None else known
    for value, known in zip((coordinator_address, num_processes, process_id), told))
  if any(value is not None for value in explicit):
    if any(value is None for value in explicit):
      raise ValueError(
        "Of coordinator_address, num_processes and process_id (JAX_COORDINATOR_ADDRESS, "
        f"JAX_NUM_PROCESSES, JAX_PROCESS_ID) only some are given, {explicit}; give all or none."
      )
    jax.distributed.initialize(*explicit)
  elif processes.are_expected(env):
    jax.distributed.initialize()
  else:
    return False
  return processes.place()[1] > 1
