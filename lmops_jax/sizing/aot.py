"""Compiling programs ahead of time for devices that are not there, and what they would take.

libtpu compiles for a named TPU topology on any machine (`pip install 'lmops_jax[tpu]'`). Nothing is
allocated: programs are lowered from shapes with the shardings of a mesh over the topology's
devices. What comes out is what the chips would run, so bytes a device are the compiler's own, and
collectives and arithmetic are read from its optimised HLO.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.sizing import chips, hlo


class CompilerError(RuntimeError):
  """The compiler fails on a program; one sentence that says on which and what may help."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that a system runs on its mesh.

  Attributes:
    name: for people.
    lower: `() -> jax.stages.Lowered`, called with the mesh in use.
    flops: operations of one call on all devices, counted analytically (see `sizing.flops`).
    steps: optimizer steps of one call.
    bytes_beside: bytes held on each device while the program runs, without being its argument.
    branch_shares: see `hlo.count`.
    remedies: settings that lower its memory, the best first.
  """

  name: str
  lower: Callable[[], Any]
  flops: float
  steps: int = 1
  bytes_beside: float = 0.0
  branch_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
  remedies: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What compiling a program told.

  Attributes:
    program: the program that was compiled.
    argument_bytes, output_bytes, temporary_bytes, code_bytes: bytes on one device; outputs that
      reuse an argument's memory are not counted.
    host_bytes: bytes of host memory, for one device.
    counts: what one call does on one device; None if the compiler refused it for its memory.
    seconds: how long lowering and compiling took.
    needed_bytes: bytes on one device, with what is held beside the program; if the compiler
      refused, by its own figure.
  """

  program: Program
  argument_bytes: int
  output_bytes: int
  temporary_bytes: int
  code_bytes: int
  host_bytes: int
  counts: hlo.Counts | None
  seconds: float
  needed_bytes: float

  def fits(self, memory_bytes: int) -> bool:
    return self.counts is not None and self.needed_bytes <= memory_bytes


def compile_program(program: Program, partitioner: Partitioner) -> Compiled:
  """Compiles for the devices of the partitioner's mesh.

  Raises:
    CompilerError: if the compiler fails for another reason than memory.
  """
  began = time.monotonic()
  try:
    with partitioner.activate():
      compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    refused = _out_of_memory(str(error))
    if refused is None:
      raise CompilerError(
        f"the compiler failed on {program.name}: {str(error).splitlines()[0]}; what may help is "
        f"{', or '.join((*program.remedies, 'another slice'))}.") from error
    seconds = time.monotonic() - began
    return Compiled(program, 0, 0, 0, 0, 0, None, seconds, refused + program.bytes_beside)
  seconds = time.monotonic() - began
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  host = (memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
          + memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes)
  parts = (memory.argument_size_in_bytes, outputs, memory.temp_size_in_bytes,
           memory.generated_code_size_in_bytes)
  return Compiled(
    program, *parts, host, hlo.count(compiled.as_text(), program.branch_shares), seconds,
    sum(parts) + program.bytes_beside,
  )


def _out_of_memory(message: str) -> float | None:
  """Bytes that the compiler wanted, from its refusal.

  `Used 17.5G of 15.75G hbm`, or `HLO temporaries (15.94G) exceeds available HBM (15.75G)`.
  """
  found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
  if found is None:
    return None
  return float(found[1]) * 2.0 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[found[2]]


def tpu_devices(topology: chips.Topology) -> list:
  """The devices of a TPU topology, as libtpu describes them; no TPU is needed.

  Raises:
    ValueError: without libtpu, or for a shape that libtpu does not know.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "compiling for a TPU topology needs libtpu, which is not installed; run "
      "pip install 'lmops_jax[tpu]'."
    )
  from jax.experimental import topologies
  options = {}
  if topology.num_devices < 4:  # else a host holds 2x2 chips
    options["chips_per_host_bounds"] = (topology.shape + (1, 1))[:3]
  if topology.kind == "v4":  # the two cores of a chip as one device, as jobs run on it
    options["chip_config_name"] = "megacore"
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name, **options).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
    raise ValueError(
      f"libtpu gives no topology {topology.name!r} ({str(error).splitlines()[0]}); write one that "
      "can be ordered, such as v5e:4x4 or v5p:2x2x4."
    ) from error
  return list(devices)
