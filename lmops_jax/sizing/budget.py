"""What devices may give and what the phases of a run take, as plain numbers."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from lmops_jax.config.refusals import ConfigError


def check_splits(num: int, what: str, partitioner, setting: str) -> None:
  """Raises ConfigError when a mesh does not divide the examples of a batch.

  Args:
    num: examples. what: the word for them. setting: names their number.
  """
  shards = partitioner.num_batch_shards
  if num % shards:
    raise ConfigError(
      f"{num} {what} do not split over the mesh's {shards} data shards; use at most "
      f"{math.gcd(num, shards)} of them and the others for mesh.make.tensor, or another {setting}."
    )


class Memory(NamedTuple):
  """Bytes that a device may give, None if unknown, and the host for each of its devices."""

  device_bytes: float | None = None
  host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase of a run.

  Attributes:
    name: for people.
    num_params: parameters of its model.
    flops: operations in all, on all devices.
    steps: how many steps these operations are for.
    parts: bytes on one device, by what they are.
    note: what else was decided, such as the trajectory policy.
    remedies: settings that lower its memory, the best first.
    refusal: a sentence if it cannot run for another reason than the memory of a device.
  """

  name: str
  num_params: int
  flops: float
  steps: int
  parts: dict[str, float]
  note: str = ""
  remedies: tuple[str, ...] = ()
  refusal: str = ""

  @property
  def total_bytes(self) -> float:
    return sum(self.parts.values())


def memory_of(device: jax.Device, device_bytes: float | None = None) -> Memory:
  """What a device of this process has.

  Args:
    device_bytes: taken if jax does not tell the device's memory, as on a CPU.
  """
  try:
    stats = device.memory_stats() or {}
  except (jax.errors.JaxRuntimeError, NotImplementedError):
    stats = {}
  host = 0.0
  if device.platform != "cpu":  # a CPU's devices are the host
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    host = free / 2 / jax.local_device_count()  # the other half is for everything else
  return Memory(stats.get("bytes_limit", device_bytes), host)


def memory_of_mesh(partitioner, device_bytes: float | None = None) -> Memory:
  """What each device of a mesh has at least, the same in all of its processes, which all call it.

  What is decided by it is part of the program that they run together.

  Args:
    device_bytes: as for `memory_of`.
  """
  mesh = partitioner.mesh
  own = memory_of(mesh.local_devices[0], device_bytes)
  if not mesh.is_multi_process:
    return own
  from jax.experimental import multihost_utils
  unknown = math.nan  # the least of several numbers is then unknown too
  found = multihost_utils.process_allgather(np.asarray(
    [unknown if own.device_bytes is None else own.device_bytes, own.host_bytes], np.float32))
  device, host = np.min(found, axis=0).tolist()
  return Memory(None if math.isnan(device) else device, host)


def device_bytes(tree: Any) -> int:
  """Of a tree of placed shapes, on one device."""
  def leaf(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize
  return sum(map(leaf, jax.tree.leaves(tree)))
