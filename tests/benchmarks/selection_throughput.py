"""Selects 40 % of ten million synthetic scores: time, throughput and memory, against plain sorting.

  python tests/benchmarks/selection_throughput.py [--examples N] [--output FILE.md]

Every run is a process of its own, so that peak memory is its own (Linux only: it resets the peak).
Scores are standard normal float32 in shards on disk, read through memory maps, as an annotated
corpus is. Methods:
- `select_in_process`: three passes over the shards, flat memory;
- `gumbel_top_k`: the same noise and the same set, all scores in memory;
- `numpy sort`: the reference's way, all scores in memory, NumPy's own unseeded noise, full sort.
The table holds the median of the repeats and the growth of resident memory at its peak; the run
fails unless both seeded methods choose the same set.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 1 << 20
RATIO, TAU, SEED = 0.4, 0.1, 7


def write_shards(folder: Path, num_examples: int):
  rng = np.random.default_rng(0)
  for i, start in enumerate(range(0, num_examples, SHARD)):
    scores = rng.standard_normal(min(SHARD, num_examples - start), np.float32)
    np.save(folder / f"scores_{i:05d}.npy", scores)


def read_shards(folder: Path):
  start = 0
  for path in sorted(folder.glob("scores_*.npy")):
    scores = np.load(path, mmap_mode="r")
    yield np.arange(start, start + len(scores)), np.asarray(scores)
    start += len(scores)


def select_in_process(folder: Path, num_examples: int):
  from lmops_jax.systems.pds import parallel_selection

  digest, count = hashlib.blake2b(digest_size=8), 0

  def write(rows, ids):
    nonlocal count
    digest.update(ids.astype("<i8").tobytes())
    count += len(ids)

  result = parallel_selection.select_in_process(
    lambda: read_shards(folder), write, num_examples=num_examples, ratio=RATIO, tau=TAU, seed=SEED
  )
  return count, digest.hexdigest(), result.num_passes


def gumbel_top_k(folder: Path, num_examples: int):
  from lmops_jax.systems.pds import selection

  scores = np.concatenate([scores for _, scores in read_shards(folder)])
  ids = selection.gumbel_top_k(scores, ratio=RATIO, tau=TAU, seed=SEED)
  return len(ids), hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest(), 1


def numpy_sort(folder: Path, num_examples: int):
  scores = np.concatenate([scores for _, scores in read_shards(folder)])
  noise = -np.log(-np.log(np.random.rand(num_examples)))
  ids = np.argsort(-(scores / TAU + noise))[: int(RATIO * num_examples)]
  return len(np.sort(ids)), "", 1


METHODS = {
  "select_in_process": select_in_process, "gumbel_top_k": gumbel_top_k, "numpy sort": numpy_sort,
}


def measure(name: str, folder: Path, num_examples: int) -> dict:
  """Runs in the child process."""
  import lmops_jax.systems.pds.parallel_selection  # noqa: F401  imports count for no method

  Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, without the imports'
  before, start, cpu = memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
  count, digest, num_passes = METHODS[name](folder, num_examples)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  return {
    "seconds": seconds, "cpu_seconds": cpu, "growth_bytes": memory_bytes("VmHWM") - before,
    "selected": count, "digest": digest, "passes": num_passes,
  }


def memory_bytes(field: str) -> int:
  status = Path("/proc/self/status").read_text()
  return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def run_child(name, folder, num_examples) -> dict:
  out = subprocess.run(
    [sys.executable, __file__, "--child", name, str(folder), "--examples", str(num_examples)],
    check=True, capture_output=True, text=True,
  )
  return json.loads(out.stdout.splitlines()[-1])


def table(num_examples: int, repeats: int) -> str:
  sizes = (num_examples // 10, num_examples, 4 * num_examples)
  lines = [
    "# Selection throughput",
    "",
    f"`select_in_process` and its peers keep {RATIO:.0%} of standard normal float32 scores (tau "
    f"{TAU}) read from shards of {SHARD:,}.",
    f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy "
    f"{np.__version__}; median of {repeats} runs (range), each in a process of its own. Memory is",
    "the peak growth of the resident size after the imports, mapped pages of score files included.",
    f"Load of the machine when the run began (1 is one busy core): {os.getloadavg()[0]:.1f}.",
    "",
    "| scores | method | seconds | CPU s | million scores/s | memory growth | passes | selected |",
    "|---:|---|---:|---:|---:|---:|---:|---:|",
  ]
  for size in sizes:
    with tempfile.TemporaryDirectory() as folder:
      write_shards(Path(folder), size)
      digests = {}
      for name in METHODS if size <= num_examples else ["select_in_process"]:
        runs = [run_child(name, folder, size) for _ in range(repeats)]
        times = [run["seconds"] for run in runs]
        seconds = statistics.median(times)
        cpu = statistics.median(run["cpu_seconds"] for run in runs)
        growth = max(run["growth_bytes"] for run in runs)
        digests[name] = {run["digest"] for run in runs}
        lines.append(
          f"| {size:,} | {name} | {seconds:.2f} ({min(times):.2f} to {max(times):.2f}) | "
          f"{cpu:.2f} | "
          f"{size / seconds / 1e6:.1f} | {growth / 2**20:.0f} MiB | {runs[0]['passes']} | "
          f"{runs[0]['selected']:,} |"
        )
      assert len(set.union(*digests.values()) - {""}) == 1, digests
  lines += [
    "",
    "`select_in_process` and `gumbel_top_k` chose the same ids in every run, in the same order.",
    "",
    "What bounds it: one core's integer and float arithmetic, most of it noise, which is drawn in",
    "every pass rather than kept; reading is 4 bytes a score a pass. Memory is the candidates, one",
    "shard and fixed buffers.",
    "",
  ]
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--examples", type=int, default=10_000_000)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--output", type=Path)
  parser.add_argument("--child", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    name, folder = args.child
    print(json.dumps(measure(name, Path(folder), args.examples)))
    return
  text = table(args.examples, args.repeats)
  print(text)
  if args.output:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
