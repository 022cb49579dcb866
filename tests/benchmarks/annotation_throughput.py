# ruff: noqa: E402  malloc is set before jax is imported
"""Times the stage that scores the whole corpus: instances and tokens a second, and what bounds it.

    python tests/benchmarks/annotation_throughput.py [--instances N] [--output FILE.md]

The stage `annotate` itself runs on packed instances on disk, with a scorer of small_cpu (its gin
file is in gin/models) at random parameters, for several batch sizes; then its parts alone: reading
rows, and the forward pass over rows already read. Batch sizes take turns, so that a busy moment of
the machine hits all of them. The speed of products is that of float32 squares of 2,048, measured in
the same run; the share of it is taken in processor time, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import pydoc_data.topics
import re
import statistics
import tempfile
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

KEEPS_MEMORY = keep_freed_memory()  # before jax

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.data import instance_writing, packing
from lmops_jax.evaluation import examples
from lmops_jax.host import progress
from lmops_jax.mesh import checkpoints, meshes
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.sizing.flops import forward_flops_per_token
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import prepare, pretrain, scorer
from lmops_jax.training import losses, optimizers

SMALL_CPU = TransformerConfig(  # gin/models/small_cpu.gin
  vocab_size=4096, num_layers=2, width=128, num_heads=2, mlp_width=320, max_length=128,
  tied_embeddings=True, scan_layers=False,
)
LENGTH = SMALL_CPU.max_length
BATCH_SIZES = (16, 64, 256)


class _Context(pipeline.StageContext):
  """A stage that says nothing."""

  def progress(self, total, unit="", description="", **_):
    return progress.Progress(total, unit, description, quiet=True)


def write_corpus(folder: Path, num: int) -> None:
  """Nearly full instances of the words of Python's documentation, numbered by frequency."""
  words = re.findall(r"\w+|[^\w\s]", " ".join(pydoc_data.topics.topics.values()))
  ranks = {w: i for i, (w, _) in enumerate(collections.Counter(words).most_common())}
  tokens = np.array([4 + ranks[w] % (SMALL_CPU.vocab_size - 4) for w in words], np.int32)
  rng = np.random.default_rng(0)

  def rows():
    for i in range(num):
      size = int(rng.integers(LENGTH - 12, LENGTH + 1))
      start = int(rng.integers(0, len(tokens) - size))
      row = np.concatenate([[1], tokens[start : start + size]]).astype(np.int32)
      yield packing.Instance(i, row, np.array([i]), np.array([size], np.int32))

  instance_writing.write_instances(
    folder / "corpus", rows(), length=LENGTH, vocab_size=SMALL_CPU.vocab_size, pad_id=0, bos_id=1,
    eos_id=2,
  )


def measure(work) -> tuple[float, float]:
  """Wall and processor seconds of `work()`."""
  wall, cpu = time.perf_counter(), time.process_time()
  work()
  return time.perf_counter() - wall, time.process_time() - cpu


def matmul_flops() -> float:
  """Operations a second of processor time in a large float32 product, the best of ten."""
  x = jnp.ones((2048, 2048), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  return 2 * 2048**3 / min(measure(lambda: product(x).block_until_ready())[1] for _ in range(10))


class Setting:
  """The stage and its parts at one batch size."""

  def __init__(self, folder: Path, batch_size: int):
    self.folder = folder
    self.config = scorer.Scorer(optimizers.sgd(0.1), inference_batch_size=batch_size)
    self.proxy = pretrain.Pretrain(SMALL_CPU, optimizers.sgd(0.1), num_steps=1)
    self.partitioner = meshes.single_device()
    self.view = scorer.View(prepare.Prepared(folder))
    model = scorer.scorer_model(self.config, self.proxy, self.view)
    boxed = scorer.initializer(model)(jax.random.key(0))
    self.params = nn.unbox(boxed)
    checkpoints.save_params(folder / "fitted" / scorer.PARAMS_FOLDER, self.params)
    self.predict = jax.jit(losses.regression_example_losses(model).predict)
    self.flops_per_instance = LENGTH * forward_flops_per_token(
      model.config, LENGTH, unembedding=False
    )
    self.times = collections.defaultdict(list)

  def stage(self):
    with tempfile.TemporaryDirectory() as directory:
      context = _Context(
        "annotate/x", Path(directory), {"prepare": self.folder, "scorer/x": self.folder / "fitted"},
        lambda text: None,
      )
      scorer.annotate(
        context, self.config, self.proxy, self.partitioner, scorer_stage="scorer/x"
      )

  def forward(self, rows):
    return examples.map_examples(
      self.predict, self.params, rows, self.config.inference_batch_size, self.partitioner
    )

  def run(self) -> None:
    indices = np.arange(len(self.view.instances), dtype=np.int64)
    shards = np.array_split(indices, -(-len(indices) // self.config.shard_size))
    view, rows = scorer.View(prepare.Prepared(self.folder)), []  # nothing in its cache
    self.times["read"].append(measure(lambda: rows.extend(map(view.rows, shards))))
    self.forward({k: v[: self.config.inference_batch_size] for k, v in rows[0].items()})  # compiles
    self.times["forward"].append(measure(lambda: [self.forward(r) for r in rows]))
    self.times["stage"].append(measure(self.stage))


def median(times) -> tuple[float, float]:
  wall, cpu = zip(*times, strict=True)
  return statistics.median(wall), statistics.median(cpu)


def table(num: int, repeats: int) -> str:
  load = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as folder:
    write_corpus(Path(folder), num)
    settings = {size: Setting(Path(folder), size) for size in BATCH_SIZES}
    for _ in range(repeats):
      for setting in settings.values():
        setting.run()
    peak = matmul_flops()
    first = settings[BATCH_SIZES[0]]
    real = int(first.view.rows(np.arange(num))["mask"].sum())
  lines = [
    "# Throughput of the annotation",
    "",
    "Written by `tests/benchmarks/annotation_throughput.py`: the stage `annotate` over "
    f"{num:,} instances of {LENGTH} positions", f"({real / num / LENGTH:.0%} real tokens) with a "
    "scorer of small_cpu, "
    f"{first.flops_per_instance / LENGTH / 1e6:.2f} MFLOP a position; one device.",
    f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, "
    f"jax {jax.__version__}, keep_freed_memory {KEEPS_MEMORY}, load {load:.1f} when it began; "
    f"median of {repeats}.",
    f"Float32 products reach {peak / 1e9:.0f} GFLOP/s a core.",
    "",
    "| batch | part | wall s | processor s | instances/s | positions/s | of product speed, "
    "processor time |",
    "|---:|---|---:|---:|---:|---:|---:|",
  ]
  for size, setting in settings.items():
    for part in ("stage", "forward", "read"):
      wall, cpu = median(setting.times[part])
      share = "" if part == "read" else f"{num * setting.flops_per_instance / cpu / peak:.0%}"
      lines.append(
        f"| {size} | {part} | {wall:.2f} | {cpu:.2f} | {num / wall:,.0f} | "
        f"{num * LENGTH / wall:,.0f} | {share} |"
      )
  lines += [
    "",
    "`stage` is all of it, with loading and compiling the scorer and writing the scores; `forward` "
    "the", "model over rows in memory; `read` the rows from disk.",
    "",
    "What bounds it: float32 products and the element-wise work between them, whose activations "
    "leave", "the caches as the batch grows; reading the rows is a few per cent.",
    "",
  ]
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--instances", type=int, default=16_384)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  text = table(args.instances, args.repeats)
  print(text)
  if args.output:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
