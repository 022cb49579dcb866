"""The smallest TPU slice that fits each size of a run, compiled ahead of time, without a TPU.

For each size of PDS (160M to 1.7B parameters), each program (pre-training at 512 x 1024 with AdamW,
the solve's forward and reverse segment at 256 x 1024) and each kind of chip, and for the training
steps of Kosmos-1 and 2 (`--sizes kosmos1 kosmos2`, a group of rows on each device at a time) and of
MetaLM (`--sizes metalm`, four rows on each device at a time, and `metalm_vl`, a group of four), and
for drawing so many pictures on each device (`--sizes sd1`, `image_programs`): the slices are tried
from small to large. A slice that the arithmetic of `lmops plan` puts far above the memory is not
compiled; the first that compiles and fits is the row, and the next smaller one, tried or planned,
is named in it. Pictures are drawn by each chip for itself, so for them one chip is all that is
tried. Figures are kept in a JSON file as they come, so a run that is stopped goes on.
With `--planned` nothing is compiled and the table is that of the arithmetic.

  python tests/benchmarks/aot_table.py --sizes 160m 470m --chips v5e v5p
  python tests/benchmarks/aot_table.py --sizes kosmos1 kosmos2 --effort -1 --output aot_kosmos.md

Needs libtpu (`pip install 'lmops_jax[tpu]'`) and minutes of processor time for each compilation.
Kosmos has three kinds of rows, two stacks and dropout, so its step holds many times the programs
of a language model's and compiles for as much longer; `--effort -1` asks the compiler for its
quickest work. The tower's forward pass then compiled in a fifth of the time and took 12 % more
memory; whether it is always more is not established.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
SLICES = {
  "v5e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8"],
  "v4": ["1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"],
  "v5p": ["1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"],
}


class Size(NamedTuple):
  """A run: its gin file, and for each of its programs the phase that plans it.

  Attributes:
    groups: parts of a step, of which each device takes one at a time; None: as the file says.
    bindings: further bindings.
  """

  file: str
  programs: dict[str, str]
  groups: int | None = None
  bindings: tuple[str, ...] = ()


_PDS = {"pretrain": "pretrain", "solve, forward": "solve pds, forward",
        "solve, reverse": "solve pds, reverse"}
SIZES = {size: Size(f"pds/paper_{size}.gin", _PDS) for size in ("160m", "470m", "1b", "1.7b")} | {
  "kosmos1": Size("kosmos/kosmos1_paper.gin", {"train": "train"}, groups=128),
  "kosmos2": Size("kosmos/kosmos2_paper.gin", {"train": "train"}, groups=48,
                  bindings=("GROUPS = 48",)),
  "metalm": Size("metalm/language_paper.gin", {"train": "train"}, groups=256),
  "metalm_vl": Size("metalm/vision_language.gin", {"train": "train"}, groups=64)}
IMAGES = {f"images, {num} a device": num for num in (1, 4, 16, 32, 64)}  # see image_programs
SIZES["sd1"] = Size("", dict.fromkeys(IMAGES, ""))
PROGRAMS = tuple(dict.fromkeys(name for size in SIZES.values() for name in size.programs))
_UNSURE = 1.5  # the estimate of activations may be so far off; beyond, a slice is not compiled
COLUMNS = ("size", "program", "slice", "GiB a device", "of", "temporaries", "a step at peak, ms",
           "products / analytic", "collectives a step, GiB a device", "next smaller", "compiled in")


@functools.cache
def _job(size: str, num_devices: int):
  from lmops_jax.config import resolve
  file, _, groups, bindings = SIZES[size]
  if groups is not None:
    bindings += (f"ACCUMULATE = {groups // num_devices}",)
  return resolve.load([file], list(bindings), owed="named").run()


@functools.cache
def _planned(size: str, topology: str) -> dict[str, tuple[float, str]]:
  from lmops_jax.sizing import chips
  from lmops_jax.sizing.budget import Memory
  slice_ = chips.topology(topology)
  job = _job(size, slice_.num_devices)
  phases = job.system.phases(
    job.mesh.plan(slice_.num_devices), Memory(slice_.chip.memory_bytes, slice_.chip.host_bytes),
    num_target=1024, num_corpus=1, platform="tpu")
  return {phase.name: (phase.total_bytes, phase.refusal) for phase in phases}


def planned(size: str, program: str, topology: str) -> tuple[float, str]:
  """Bytes a device by arithmetic, and why the program cannot run for another reason."""
  if program in IMAGES:
    import image_programs
    return image_programs.planned_bytes(IMAGES[program]), ""
  return _planned(size, topology)[SIZES[size].programs[program]]


def compile_one(size: str, program: str, topology: str) -> dict:
  """Compiles one program in this process and returns its figures."""
  from lmops_jax.sizing import aot, chips
  from lmops_jax.sizing.budget import Memory
  slice_ = chips.topology(topology)
  if program in IMAGES:
    import image_programs

    from lmops_jax.mesh.meshes import MeshConfig
    partitioner = MeshConfig().build(aot.tpu_devices(slice_))
    chosen = image_programs.program(IMAGES[program], partitioner)
  else:
    job = _job(size, slice_.num_devices)
    partitioner = job.mesh.build(aot.tpu_devices(slice_))
    programs = job.system.programs(
      partitioner, Memory(slice_.chip.memory_bytes, slice_.chip.host_bytes), num_target=1024)
    chosen, = (p for p in programs if p.name == program)
  try:
    compiled = aot.compile_program(chosen, partitioner)
  except aot.CompilerError as error:
    return {"fits": False, "failed": str(error)}
  found = {"fits": compiled.fits(slice_.chip.memory_bytes), "needed": compiled.needed_bytes,
           "memory": slice_.chip.memory_bytes, "seconds": compiled.seconds,
           "temporaries": compiled.temporary_bytes}
  if compiled.counts is not None:
    per_device = chosen.flops / slice_.num_devices
    found |= {
      "ideal": per_device / slice_.chip.flops_per_sec / chosen.steps,
      "ratio": compiled.counts.product_flops / per_device,
      "collectives": sum(
        c.num_bytes for c in compiled.counts.collectives.values()) / chosen.steps}
  return found


def smallest(size: str, program: str, kind: str, rows: dict, save) -> dict:
  """The row of the smallest slice that fits, filling `rows` by (size, program, topology)."""
  smaller = "none"
  for shape in SLICES[kind][: 1 if program in IMAGES else None]:
    topology = f"{kind}:{shape}"
    key = f"{size}/{program}/{topology}"
    if key not in rows:
      num_bytes, refusal = planned(size, program, topology)
      from lmops_jax.sizing import chips
      if refusal or num_bytes > _UNSURE * chips.topology(topology).chip.memory_bytes:
        rows[key] = {"fits": False, "planned": num_bytes, "refusal": refusal}
      else:
        rows[key] = _in_a_process(size, program, topology)
      save(rows)
    row = rows[key]
    if row["fits"]:
      return row | {"size": size, "program": program, "topology": topology, "smaller": smaller}
    smaller = f"{topology}: {_why(row)}"
  return {"fits": False, "size": size, "program": program, "topology": f"no {kind} slice tried",
          "smaller": smaller}


def planned_table(sizes: list[str], kinds: list[str]) -> str:
  """Markdown: the smallest slice by arithmetic alone."""
  lines = ["| size | program | " + " | ".join(kinds) + " |", "|" + " --- |" * (2 + len(kinds))]
  from lmops_jax.sizing import chips
  for size in sizes:
    for program in SIZES[size].programs:
      cells = []
      for kind in kinds:
        limit, tried = chips.CHIPS[kind].memory_bytes, []
        for shape in SLICES[kind]:
          num_bytes, refusal = planned(size, program, f"{kind}:{shape}")
          tried.append((f"{kind}:{shape}", num_bytes))
          if num_bytes <= limit and not refusal:
            break
        cells.append(f"{tried[-1][0]}, {tried[-1][1] / 2**30:.1f} GiB")
      lines.append(f"| {size} | {program} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _why(row: dict) -> str:
  if row.get("failed"):
    return "the compiler fails"
  if row.get("refusal"):
    return "the host's memory"
  if row.get("needed"):
    return f"{row['needed'] / 2**30:.1f} GiB"
  return f"{row['planned'] / 2**30:.1f} GiB planned"


def _in_a_process(size: str, program: str, topology: str) -> dict:
  """One compilation a process, whose memory is then free again."""
  done = subprocess.run(
    [sys.executable, __file__, "--one", size, program, topology], stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(f"compiling {program} of {size} for {topology} failed; see above.")
  return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
  """Markdown."""
  lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
  for row in rows:
    cells = [row["size"], row["program"], row["topology"]]
    if row["fits"]:
      cells += [f"{row['needed'] / 2**30:.2f}", f"{row['memory'] / 2**30:.2f}",
                f"{row['temporaries'] / 2**30:.2f}", f"{1e3 * row['ideal']:,.0f}",
                f"{row['ratio']:.2f}", f"{row['collectives'] / 2**30:.2f}", row["smaller"],
                f"{row['seconds']:.0f} s"]
    else:
      cells += [""] * 6 + [row["smaller"], ""]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--sizes", nargs="+", default=["160m", "470m", "1b", "1.7b"],
                      choices=list(SIZES))
  parser.add_argument("--chips", nargs="+", default=list(SLICES), choices=list(SLICES))
  parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
  parser.add_argument("--rows", type=Path, default=Path("aot_rows.json"), help="figures so far")
  parser.add_argument("--output", type=Path, default=RESULTS / "aot.md")
  parser.add_argument("--planned", action="store_true", help="compile nothing")
  parser.add_argument("--effort", type=float, default=0.0,
                      help="of the compiler to save time in use, from -1 to 1")
  parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  if arguments.effort:  # read when jax is imported, in the processes of single compilations too
    os.environ["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = str(arguments.effort)
  from lmops_jax.commands import plans as plan_commands
  plan_commands.set_environment(argparse.Namespace(topology="any"))
  if arguments.one:
    print(json.dumps(compile_one(*arguments.one)))
    return
  if arguments.planned:
    print(planned_table(arguments.sizes, arguments.chips))
    return
  rows = json.loads(arguments.rows.read_text()) if arguments.rows.exists() else {}

  def save(rows):
    arguments.rows.write_text(json.dumps(rows, indent=1))

  found = []
  for size in arguments.sizes:
    for program in (p for p in SIZES[size].programs if p in arguments.programs):
      for kind in arguments.chips:
        found.append(smallest(size, program, kind, rows, save))
        print(table(found[-1:]).splitlines()[-1], flush=True)
  versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "libtpu", "flax"))
  command = "python tests/benchmarks/aot_table.py " + " ".join(sys.argv[1:])
  arguments.output.write_text(
    f"# Ahead-of-time compilation for TPU slices\n\n`{command.strip()}`\n\n{versions}, Python "
    f"{platform.python_version()}; no TPU present. Bytes are the compiler's, and what a solve "
    "holds beside the program; the trajectory policy is the one that `lmops plan` prints. Products "
    "are the matrix products of the compiled program, loops counted as often as they run, over the "
    "analytic FLOPs: recomputation in blocks and logits makes them more than 1.\n\n"
    f"{table(found)}\n")


if __name__ == "__main__":
  main()
