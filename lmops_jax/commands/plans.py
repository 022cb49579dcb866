"""`lmops plan` and `lmops aot`: the memory and operations of a run, before anything runs.

`plan` is arithmetic on the shapes that gin files name; `aot` compiles the same programs for a TPU
topology, on a machine without TPUs. The parsers import nothing heavy. Tables go to standard output;
a phase or program that does not fit ends with exit code 2 and a sentence on what would help.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lmops_jax.config.refusals import ConfigError
from lmops_jax.host import progress

COMMANDS = {
  "plan": "print what each phase of a run takes, and run nothing",
  "aot": "compile a run's programs for a TPU topology, without TPUs, and run nothing",
}
EPILOG = """\
examples:
  lmops plan pds
  lmops plan gin/pds/paper_1b.gin --topology v5p:2x2x2
  lmops aot --topology v5e:4x4 gin/pds/paper_160m.gin
  lmops aot --topology v5e:16x16 gin/pds/paper_1.7b.gin --program pretrain

A topology is CHIP:AxB or CHIP:AxBxC with the chip v4, v5e, v5p or v6e (plan also knows a100:8 and
h100:8). aot needs libtpu: pip install 'lmops_jax[tpu]'. Paths that a gin file requires (CORPUS_PATH
and others) may stay unset, since nothing is read.
"""


@runtime_checkable
class Planned(Protocol):
  """A system that tells what its phases take."""

  def phases(self, partitioner: Any, memory: Any, *, num_target: int, num_corpus: int,
             platform: str) -> Sequence[Any]:
    """A `sizing.budget.Phase` for each phase of a run, from shapes alone."""


@runtime_checkable
class Compiled(Protocol):
  """A system whose programs can be compiled ahead of time."""

  def programs(self, partitioner: Any, memory: Any, *, num_target: int) -> Sequence[Any]:
    """The programs that its devices run, as `sizing.aot.compile_program` takes them."""


def add_parsers(commands, options: dict, add_gin) -> None:
  """Adds both commands to argparse's subparsers."""
  for name, text in COMMANDS.items():
    parser = commands.add_parser(
      name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG, **options)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("files", nargs="*", metavar="SYSTEM_OR_FILE")
    default = "" if name == "aot" else "; default: this machine's devices"
    parser.add_argument("--topology", metavar="CHIP:SHAPE", required=name == "aot",
                        help=f"such as v5e:4x4{default}")
    parser.add_argument("--target-instances", type=_positive, default=1024, metavar="N",
                        help="of the target, where the gin files take all of it (default 1024)")
    parser.add_argument("--corpus-instances", type=_positive, default=1_000_000, metavar="N",
                        help="of the corpus, for the annotation (default 1,000,000)")
    if name == "aot":
      parser.add_argument("--program", action="append", default=[], metavar="NAME",
                          help="only programs with this in their name; may be given several times")
    add_gin(parser)


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} is less than 1")
  return value


def set_environment(arguments: argparse.Namespace) -> None:
  """Keeps jax, not imported yet, off this machine's devices if the command names a topology."""
  if arguments.topology is not None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
      # Answers that libtpu would otherwise ask a TPU machine's metadata server for.
      "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is taken, so several compilations may run
    }.items():
      os.environ.setdefault(name, value)


def run(arguments: argparse.Namespace, resolved) -> int:
  """Runs one of the commands on a resolved configuration; raises if something does not fit."""
  from lmops_jax.sizing import chips
  topology = None if arguments.topology is None else chips.topology(arguments.topology)
  job = resolved.run()
  kind, hook, command = (
    (Compiled, "programs", _aot) if arguments.command == "aot" else (Planned, "phases", _plan))
  if not isinstance(job.system, kind):
    raise ConfigError(
      f"{resolved.tree.child('system').selector} does not say what it takes; lmops "
      f"{arguments.command} is for systems with a method {hook!r}, such as pds.")
  return command(arguments, job, topology)


# ------------------------------------------------------------------------------------------- plan


def _plan(arguments, job, topology) -> int:
  import jax

  from lmops_jax.mesh import meshes
  from lmops_jax.sizing.budget import Memory, memory_of
  layout = job.mesh or meshes.MeshConfig(data=1)
  if topology is None:
    devices = jax.devices() if job.mesh else jax.devices()[:1]
    num_devices, platform, memory = len(devices), devices[0].platform, memory_of(devices[0])
    where = f"{num_devices} x {devices[0].device_kind}"
    peak = None
  else:
    chip = topology.chip
    num_devices, platform = topology.num_devices, "gpu" if chip.is_gpu else "tpu"
    memory, peak = Memory(chip.memory_bytes, chip.host_bytes), chip.flops_per_sec
    where = f"{topology.name}, {num_devices} chips"
  partitioner = layout.plan(num_devices)
  phases = job.system.phases(
    partitioner, memory, num_target=arguments.target_instances,
    num_corpus=arguments.corpus_instances, platform=platform)
  print(_heading(where, partitioner, memory.device_bytes))
  print(plan_table(phases, num_devices, peak))
  for phase in phases:
    if phase.refusal:
      raise ValueError(phase.refusal)
  return _verdict([
    (phase.name, phase.total_bytes, phase.remedies) for phase in phases
  ], memory.device_bytes)


def plan_table(phases, num_devices: int, peak: float | None) -> str:
  """Text for people: a block a phase."""
  lines = []
  for phase in phases:
    per_step = phase.flops / phase.steps if phase.steps else 0
    head = (f"{phase.name}: {progress.format_count(phase.num_params)} parameters, "
            f"{progress.format_count(phase.flops)}FLOP in {phase.steps:,} steps of "
            f"{progress.format_count(per_step)}FLOP")
    if peak:
      head += (f", at peak {progress.format_seconds(phase.flops / num_devices / peak)} "
               f"({per_step / num_devices / peak * 1e3:,.1f} ms a step)")
    parts = ", ".join(f"{name.replace('_', ' ')} {_mib(size)}"
                      for name, size in phase.parts.items() if size)
    lines += [head, f"  {phase.note}"] if phase.note else [head]
    lines.append(f"  a device: {_mib(phase.total_bytes)} = {parts}")
  return "\n".join(lines)


# -------------------------------------------------------------------------------------------- aot


def _aot(arguments, job, topology) -> int:
  from lmops_jax.mesh import meshes
  from lmops_jax.sizing import aot
  from lmops_jax.sizing.budget import Memory
  chip = topology.chip
  if chip.is_gpu:
    raise ConfigError(f"topology {topology.name!r} is no TPU's; lmops plan knows GPUs.")
  devices = aot.tpu_devices(topology)
  layout = job.mesh or meshes.MeshConfig(data=1)
  partitioner = layout.build(devices if job.mesh else devices[:1])
  programs = job.system.programs(
    partitioner, Memory(chip.memory_bytes, chip.host_bytes),
    num_target=arguments.target_instances)
  chosen = [p for p in programs
            if not arguments.program or any(part in p.name for part in arguments.program)]
  if not chosen:
    raise ConfigError(
      f"no program has {' or '.join(map(repr, arguments.program))} in its name; there are "
      f"{', '.join(repr(p.name) for p in programs)}.")
  print(_heading(f"{topology.name}, {topology.num_devices} chips", partitioner, chip.memory_bytes))
  results = []
  for program in chosen:
    compiled = aot.compile_program(program, partitioner)
    print(compiled_text(compiled, topology), flush=True)
    results.append((program.name, compiled.needed_bytes, program.remedies,
                    compiled.counts is None))
  return _verdict(results, chip.memory_bytes)


def compiled_text(compiled, topology) -> str:
  """Text for people: a block a program."""
  program, chip = compiled.program, topology.chip
  per_device = program.flops / topology.num_devices
  ideal = per_device / chip.flops_per_sec / program.steps
  lines = [
    f"{program.name}: {progress.format_count(program.flops / program.steps)}FLOP a step, at peak "
    f"{ideal * 1e3:,.1f} ms; compiled in {progress.format_seconds(compiled.seconds)}"]
  if compiled.counts is None:
    lines.append(f"  a device: {_mib(compiled.needed_bytes)} wanted, the compiler refused")
    return "\n".join(lines)
  parts = {"arguments": compiled.argument_bytes, "outputs": compiled.output_bytes,
           "temporaries": compiled.temporary_bytes, "code": compiled.code_bytes,
           "held beside": program.bytes_beside}
  lines.append(f"  a device: {_mib(compiled.needed_bytes)} = "
               + ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
               + (f"; of the host {_mib(compiled.host_bytes)}" if compiled.host_bytes else ""))
  counts = compiled.counts
  lines.append(
    f"  matrix products as compiled: {counts.product_flops / per_device:.2f} of the analytic FLOPs"
    + (f", beside {counts.num_kernels:,.0f} kernels that are not counted" if counts.num_kernels
       else "")
    + (f"; {counts.unknown_loops} loops of unknown length counted once" if counts.unknown_loops
       else ""))
  for kind, found in sorted(counts.collectives.items()):
    lines.append(f"  {kind}: {found.count / program.steps:,.0f} a step, "
                 f"{_mib(found.num_bytes / program.steps)} a device")
  return "\n".join(lines)


# ----------------------------------------------------------------------------------------- shared


def _heading(where: str, partitioner, memory_bytes: float | None) -> str:
  axes = ", ".join(f"{name}={size}" for name, size in partitioner.mesh.shape.items())
  known = "memory unknown" if memory_bytes is None else f"{_mib(memory_bytes)} a device"
  return f"{where} ({known}); mesh {axes}"


def _verdict(results, memory_bytes: float | None) -> int:
  """Prints that all fits, or raises for the first that does not.

  Args:
    results: (name, bytes needed, remedies, and perhaps whether the compiler refused).
  """
  if memory_bytes is None:
    return 0
  for name, needed, remedies, *refused in results:
    if needed > memory_bytes or any(refused):
      raise ConfigError(
        f"{name} needs {_mib(needed)} of a device's {_mib(memory_bytes)} and does not fit; what "
        f"helps is {', or '.join(remedies)}.")
  print("everything fits")
  return 0


def _mib(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
