"""Accelerators by name: memory and arithmetic of one chip, for what a run takes before it runs.

Figures of one chip: TPUs from the "TPU versions" pages of the Cloud TPU documentation, GPUs from
NVIDIA's data sheets (dense products, the 80 GB SXM forms). Host memory is half of what the cloud's
usual machine has for each chip.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from lmops_jax.config.refusals import ConfigError, nearest


class Chip(NamedTuple):
  """One device.

  Attributes:
    memory_bytes: what programs may use. The compiler and the runtime keep the rest: libtpu 0.0.42
      offers 15.75 of 16 GiB on a v5e, 30.75 of 32 on a v4, 94.75 of 95 on a v5p, 31.25 of 32 on a
      v6e; on a GPU nine tenths, which jax takes with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (three
      quarters without).
    flops_per_sec: dense bfloat16 peak.
    bytes_per_sec: bandwidth of the memory.
    host_bytes: bytes of the host's memory that one chip may use.
    is_gpu: whether it is a GPU and no TPU.
  """

  memory_bytes: int
  flops_per_sec: float
  bytes_per_sec: float
  host_bytes: int
  is_gpu: bool = False


_GIB = 2**30
CHIPS = {
  "v4": Chip(int(30.75 * _GIB), 275e12, 1.2e12, 50 * 10**9),
  "v5e": Chip(int(15.75 * _GIB), 197e12, 0.82e12, 24 * 10**9),
  "v5p": Chip(int(94.75 * _GIB), 459e12, 2.77e12, 56 * 10**9),
  "v6e": Chip(int(31.25 * _GIB), 918e12, 1.64e12, 90 * 10**9),
  "a100": Chip(72 * 10**9, 312e12, 2.04e12, 85 * 10**9, is_gpu=True),
  "h100": Chip(72 * 10**9, 989.4e12, 3.35e12, 115 * 10**9, is_gpu=True),
}


class Topology(NamedTuple):
  """A slice of one kind of chip.

  Attributes:
    name: as libtpu knows it, "v5e:16x16".
    kind: a name in `CHIPS`.
    shape: chips along each axis.
  """

  name: str
  kind: str
  shape: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def num_devices(self) -> int:
    return math.prod(self.shape)


def topology(name: str) -> Topology:
  """The slice that a name such as "v5e:16x16", "v4:2x2x4" or "h100:8" means.

  Raises:
    ConfigError: for a name of another form, or a chip that is not in `CHIPS`.
  """
  match = re.fullmatch(r"([a-z]+\d+[a-z]*):(\d+(?:x\d+)*)", name)
  if match is None:
    raise ConfigError(
      f"topology {name!r} is not of the form CHIP:AxB or CHIP:AxBxC; write for example v5e:16x16 "
      "or v5p:2x2x4."
    )
  kind, shape = match[1], tuple(int(n) for n in match[2].split("x"))
  if kind not in CHIPS:
    raise ConfigError(f"topology {name!r} has an unknown chip{nearest(kind, CHIPS)}")
  if min(shape) < 1:
    raise ConfigError(f"topology {name!r} has an axis without chips; make each at least 1.")
  return Topology(name, kind, shape)
