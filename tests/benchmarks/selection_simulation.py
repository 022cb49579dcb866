"""Selects 40 % of up to a billion scores through Beam's selection: time, memory, the same set.

  python tests/benchmarks/selection_simulation.py [--examples N ...] [--check-up-to N] \
      [--output FILE.md]

Scores are bell-shaped and a function of the index, made where they are read, so that nothing is
stored but what the selection itself holds; a part of the corpus is one item of the
pipelines, which run on Beam's runner in this process, one worker. Each size is a process of its
own, whose growth of resident memory over its imports is the peak (Linux only). Up to --check-up-to
scores, `gumbel_top_k` chooses from the same scores in another process and in memory, and the run
fails unless both chose the same set in the same order.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import process_memory  # beside this script

SIZE, BLOCK = 1 << 20, 1 << 15  # scores of an item, scores made together
RATIO, TAU, SEED = 0.4, 0.1, 7


def scores(ids: np.ndarray) -> np.ndarray:
  """Bell-shaped scores of mean 0 and deviation 1, `[n] float32`: sums of four uniform numbers."""
  from lmops_jax.host.hashing import GOLDEN, mix64

  bits = mix64(ids.astype(np.uint64) * np.uint64(GOLDEN))
  pairs = np.uint64(0x0000FFFF0000FFFF)
  bits = (bits & pairs) + ((bits >> np.uint64(16)) & pairs)
  sums = (bits & np.uint64(0xFFFFFFFF)) + (bits >> np.uint64(32))
  return (sums.astype(np.float32) - 131_070) / np.float32(37_837.2)


def read(num_examples: int, item: int):
  stop = min((item + 1) * SIZE, num_examples)
  for start in range(item * SIZE, stop, BLOCK):
    ids = np.arange(start, min(start + BLOCK, stop))
    yield ids, scores(ids)


def write(folder: Path, item: int, chosen) -> None:
  """Leaves the count and a digest of an item's ids instead of the ids."""
  digest, count = hashlib.blake2b(digest_size=16), 0
  for _, ids in chosen:
    digest.update(ids.astype("<i8").tobytes())
    count += len(ids)
  (folder / f"{item:06d}").write_text(f"{count} {digest.hexdigest()}")


def spread(num_examples: int, folder: Path):
  from lmops_jax.data.distributed import Engine
  from lmops_jax.systems.pds import parallel_selection

  items = range(-(-num_examples // SIZE))
  result = parallel_selection.select(
    functools.partial(Engine().total, folder=folder), items,
    functools.partial(read, num_examples), functools.partial(write, folder),
    num_examples=num_examples, ratio=RATIO, tau=TAU, seed=SEED,
  )
  return result, sum(int((folder / f"{i:06d}").read_text().split()[0]) for i in items)


def in_memory(num_examples: int, folder: Path):
  from lmops_jax.systems.pds import parallel_selection, selection

  items = range(-(-num_examples // SIZE))
  values = np.concatenate([s for item in items for _, s in read(num_examples, item)])
  kept = selection.gumbel_top_k(values, ratio=RATIO, tau=TAU, seed=SEED)
  for item, ids in zip(items, np.split(kept, np.searchsorted(kept, SIZE * np.array(items[1:])))):
    write(folder, item, [(None, ids)])
  return parallel_selection.Selection(num_examples, len(kept), float("nan"), 1), len(kept)


METHODS = {"beam": spread, "gumbel_top_k": in_memory}


def measure(name: str, num_examples: int) -> dict:
  """Runs in the child process."""
  from lmops_jax.systems.pds import selection  # noqa: F401  imports count for no method

  if name == "beam":
    from lmops_jax.data.distributed import transforms  # noqa: F401
  with tempfile.TemporaryDirectory() as folder:
    before = process_memory.settled_bytes()
    process_memory.restart_peak()
    start, cpu = time.perf_counter(), time.process_time()
    result, written = METHODS[name](num_examples, Path(folder))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    growth = process_memory.peak_bytes() - before
    parts = sorted(p for p in Path(folder).iterdir() if p.name.isdigit())
    digest = hashlib.blake2b("".join(p.read_text() for p in parts).encode(), digest_size=8)
  if written != result.num_selected:
    raise SystemExit(f"{name} wrote {written} ids instead of {result.num_selected}")
  return {
    "seconds": seconds, "cpu": cpu, "growth": growth, "selected": written,
    "threshold": result.threshold, "passes": result.num_passes, "digest": digest.hexdigest(),
  }


def run_child(name: str, num_examples: int) -> dict:
  out = subprocess.run(
    [sys.executable, __file__, "--child", name, "--examples", str(num_examples)],
    check=True, stdout=subprocess.PIPE, text=True,
  )
  return json.loads(out.stdout.splitlines()[-1])


def table(sizes: list[int], check_up_to: int) -> str:
  import apache_beam

  lines = [
    "# Selecting from a billion scores", "",
    f"{RATIO:.0%} of bell-shaped scores (tau {TAU}), each a function of its index, by the "
    "pipelines of",
    f"`parallel_selection` in items of {SIZE:,} on Beam's runner in one process, and by "
    "`gumbel_top_k` in memory.",
    f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy "
    f"{np.__version__}, Apache Beam {apache_beam.__version__}; one run each, in a process of its",
    "own. Memory is the peak growth of the resident size after the imports. Load of the machine "
    "when the",
    f"run began (1 is one busy core): {os.getloadavg()[0]:.1f}.", "",
    "| scores | method | seconds | CPU s | CPU ns a score and pass | memory growth | passes | "
    "selected | threshold |",
    "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
  ]
  checked = []
  for size in sizes:
    digests = set()
    for name in METHODS if size <= check_up_to else ["beam"]:
      run = run_child(name, size)
      digests.add(run["digest"])
      lines.append(
        f"| {size:,} | {name} | {run['seconds']:.0f} | {run['cpu']:.0f} | "
        f"{1e9 * run['cpu'] / size / run['passes']:.0f} | {run['growth'] / 2**20:.0f} MiB | "
        f"{run['passes']} | {run['selected']:,} | {run['threshold']:.9f} |"
      )
      print(lines[-1], flush=True)
    if len(digests) > 1:
      raise SystemExit(f"the two methods chose different sets from {size} scores")
    if size <= check_up_to:
      checked.append(f"{size:,}")
  lines += ["", f"Both chose the same ids, in the same order, from {' and '.join(checked)} scores.",
            ""] if checked else [""]
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--examples", type=int, nargs="+", default=[10_000_000, 100_000_000, 1_000_000_000]
  )
  parser.add_argument("--check-up-to", type=int, default=100_000_000)
  parser.add_argument("--output", type=Path)
  parser.add_argument("--child", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    print(json.dumps(measure(args.child, *args.examples)))
    return
  text = table(args.examples, args.check_up_to)
  print(text)
  if args.output:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
