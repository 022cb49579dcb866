# ruff: noqa: E402  malloc is set before jax is imported
"""Times the training step under different loss chunks, layer loops and attention kinds.

    python tests/benchmarks/train_step.py                      # the whole comparison
    python tests/benchmarks/train_step.py --only default --steps 50
    python tests/benchmarks/train_step.py --plain-malloc       # without keep_freed_memory
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python tests/benchmarks/train_step.py --plain-malloc

Variants take turns, a few steps each, so that a busy moment of the machine hits all of them; the
table gives the median and the fastest step, the processor time of a step (summed over cores: what
a busy machine disturbs least), the rate of the fastest step, the operations a second of processor
time as a share of one core's matrix-product speed (measured in the same run, float32, 2,048
squared), page faults, and XLA's temporary memory.
Batches hold text tokens of the installed Python library's own documentation, split into words, so
that embedding rows repeat as they do in text.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import os
import platform
import pydoc_data.topics
import re
import resource
import sys
import time

from lmops_jax.sizing.memory import keep_freed_memory

KEEPS_MEMORY = "--plain-malloc" not in sys.argv and keep_freed_memory()  # before jax

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.transformer import Transformer, TransformerConfig, num_params
from lmops_jax.sizing.flops import forward_flops_per_token
from lmops_jax.training import optimizers
from lmops_jax.training.learner import supervised
from lmops_jax.training.losses import lm_example_losses

SMALL_CPU = TransformerConfig(  # gin/models/small_cpu.gin
  vocab_size=4096, num_layers=2, width=128, num_heads=2, mlp_width=320, max_length=128,
  tied_embeddings=True, scan_layers=False,
)


def variants(config: TransformerConfig, length: int):
  """Name to (config, chunk)."""
  out = {"default": (config, None)}
  for chunk in (4, 8, 16, 32, 64, length):
    out[f"chunk {chunk}"] = (config, chunk)
  replace = functools.partial(dataclasses.replace, config)
  out["scan layers"] = (replace(scan_layers=not config.scan_layers), None)
  out["attention chunked 32"] = (replace(attention="chunked", attention_chunk=32), None)
  out["attention chunked 64"] = (replace(attention="chunked", attention_chunk=64), None)
  out["remat full"] = (replace(remat="full"), None)
  out["untied"] = (replace(tied_embeddings=False), None)
  return out


def text_tokens(vocab_size: int) -> np.ndarray:
  """Word ids by frequency, the rarer ones folded into the vocabulary."""
  text = " ".join(pydoc_data.topics.topics.values())
  words = re.findall(r"\w+|[^\w\s]", text)
  ranks = {w: i for i, (w, _) in enumerate(collections.Counter(words).most_common())}
  return np.array([ranks[w] % vocab_size for w in words], np.int32)


def batches(batch_size: int, length: int, vocab_size: int, count: int = 8):
  """Batches that take turns, already on the device."""
  tokens = text_tokens(vocab_size)
  rng = np.random.default_rng(0)
  out = []
  for _ in range(count):
    starts = rng.integers(0, len(tokens) - length - 1, batch_size)
    rows = np.stack([tokens[s : s + length + 1] for s in starts])
    out.append({
      "tokens": jnp.asarray(rows[:, :-1]),
      "targets": jnp.asarray(rows[:, 1:]),
      "loss_mask": jnp.ones((batch_size, length), jnp.float32),
    })
  return out


def matmul_flops() -> float:
  """Operations a second of processor time in a large float32 product, the best of ten."""
  x = jnp.ones((2048, 2048), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  seconds = []
  for _ in range(10):
    start = time.process_time()
    product(x).block_until_ready()
    seconds.append(time.process_time() - start)
  return 2 * 2048**3 / min(seconds)


class Variant:
  """A compiled step and its times."""

  def __init__(self, config, chunk, optimizer, data):
    model = Transformer(config)
    params = model.init(jax.random.key(0), data[0]["tokens"][:1, :1])["params"]
    learner = supervised(None, lm_example_losses(model, chunk=chunk), optimizer)
    self.key = jax.random.key(0)
    self.state = learner.init(self.key, nn.unbox(params))
    start = time.perf_counter()
    step = jax.jit(learner.step, donate_argnums=0)
    self.step = step.lower(self.state, data[0], self.key).compile()
    self.compile_seconds = time.perf_counter() - start
    self.temp_mib = self.step.memory_analysis().temp_size_in_bytes / 2**20
    self.data = data
    self.seconds, self.cpu_seconds, self.faults = [], [], []
    self.done = 0

  def run(self, steps, warm=False):
    for _ in range(steps):
      start, cpu, faults = time.perf_counter(), time.process_time(), _faults()
      self.state, metrics = self.step(self.state, self.data[self.done % len(self.data)], self.key)
      jax.block_until_ready((self.state, metrics))
      self.done += 1
      if not warm:
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu)
        self.faults.append(_faults() - faults)


def _faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=40, help="timed steps a variant")
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--vocab", type=int, default=4096)
  parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="adamw")
  parser.add_argument("--plain-malloc", action="store_true", help="leave malloc as it is")
  parser.add_argument("--only", nargs="*", help="names of variants")
  args = parser.parse_args()

  config = dataclasses.replace(SMALL_CPU, vocab_size=args.vocab, max_length=args.length)
  optimizer = optimizers.adamw(1e-3) if args.optimizer == "adamw" else optimizers.sgd(0.1)
  data = batches(args.batch, args.length, args.vocab)
  chosen = variants(config, args.length)
  if args.only:
    chosen = {name: chosen[name] for name in args.only}
  compiled = {name: Variant(*v, optimizer, data) for name, v in chosen.items()}
  for variant in compiled.values():
    variant.run(3, warm=True)
  turn = 5
  for _ in range(-(-args.steps // turn)):
    for variant in compiled.values():
      variant.run(turn)

  peak = matmul_flops()
  tokens = args.batch * args.length
  print(
    f"{jax.devices()[0].device_kind} x {os.cpu_count()} cores, Python {platform.python_version()}, "
    f"jax {jax.__version__}, GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')!r}, "
    f"keep_freed_memory {KEEPS_MEMORY}, "
    f"load {os.getloadavg()[0]:.1f}; {num_params(config):,} parameters, V={args.vocab}, "
    f"batch {args.batch} x {args.length}, {args.optimizer}; "
    f"matrix products {peak / 1e9:.0f} GFLOP/s a core.\n"
  )
  print(
    "| variant | median ms | fastest ms | processor ms | tokens/s | of product speed | "
    "page faults | temp MiB | compile s |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  for name, variant in compiled.items():
    fastest, cpu = min(variant.seconds), float(np.median(variant.cpu_seconds))
    flops = 3 * forward_flops_per_token(chosen[name][0], args.length) * tokens
    print(
      f"| {name} | {np.median(variant.seconds) * 1e3:.1f} | {fastest * 1e3:.1f} | "
      f"{cpu * 1e3:.1f} | {tokens / fastest:,.0f} | {flops / cpu / peak:.0%} | "
      f"{np.median(variant.faults):,.0f} | {variant.temp_mib:.1f} | "
      f"{variant.compile_seconds:.1f} |"
    )


if __name__ == "__main__":
  main()
