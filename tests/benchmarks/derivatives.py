# ruff: noqa: E402  malloc is set before jax is imported
"""What derivatives of a language model cost against its forward pass, whole and in parts.

    taskset -c 0 python tests/benchmarks/derivatives.py [--output FILE]
    python tests/benchmarks/derivatives.py --attention      # lengths, "xla" against "chunked"
    python tests/benchmarks/derivatives.py --loss           # chunks of the loss, vocabulary 32,000

By arithmetic a gradient costs 3 forward passes, a forward-mode derivative of the losses 3 and a
Hessian-vector product with the scores of the batch 8 (of a part: 6 to 8, since sums in front of the
part drop out). Calls take turns, so that a busy moment of the machine hits all of them; the table
gives the fastest processor time, summed over cores, and XLA's temporary memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models import layers, positions
from lmops_jax.models.products import project_to_vocabulary
from lmops_jax.models.transformer import Transformer, TransformerConfig, num_params
from lmops_jax.sizing.flops import forward_flops_per_token
from lmops_jax.training.losses import cross_entropy, lm_example_losses

CONFIG = TransformerConfig(
  vocab_size=8192, num_layers=4, width=256, num_heads=4, mlp_width=1024, max_length=128,
  tied_embeddings=False, scan_layers=False,
)
MULTIPLES = {"forward": 1, "gradient": 3, "jvp": 3, "HVP": 8}


def passes(function, args):
  """Name to a compiled derivative of `function(args) -> []`, called without arguments."""
  rng = np.random.default_rng(1)
  tangent = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), args)
  grad = jax.grad(function)
  return {
    "forward": (function, (args,)),
    "gradient": (grad, (args,)),
    "jvp": (lambda p, u: jax.jvp(function, (p,), (u,)), (args, tangent)),
    "HVP": (lambda p, u: jax.jvp(grad, (p,), (u,))[1], (args, tangent)),
  }


def language_model(config: TransformerConfig, batch_size: int, chunk: int | None = None):
  """The mean loss as a function of the parameters, those, and the operations of one pass."""
  length = config.max_length
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length + 1))
  batch = {"tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
           "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
           "loss_mask": jnp.ones((batch_size, length), jnp.float32)}
  model = Transformer(config)
  losses = lm_example_losses(model, chunk=chunk)
  params = nn.unbox(model.init(jax.random.key(0), batch["tokens"][:1, :1])["params"])
  flops = forward_flops_per_token(config, length) * batch_size * length
  return lambda p: jnp.mean(losses(p, batch)), params, flops


def parts(config: TransformerConfig, batch_size: int):
  """Name to (function, arguments, operations of a forward pass)."""
  tokens, length, width = batch_size * config.max_length, config.max_length, config.width
  keys = jax.random.split(jax.random.key(0), 3)
  x, weight = (jax.random.normal(k, (batch_size, length, width)) for k in keys[:2])
  frequencies = positions.rotary_frequencies(config.rotary_width, config.rope_base)
  angles = positions.rotary_angles(np.arange(length, dtype=np.int32)[None], frequencies)

  def of_module(module, *rest):
    params = nn.unbox(module.init(keys[2], x, *rest)["params"])
    def loss(args):
      return jnp.vdot(weight, module.apply({"params": args[0]}, args[1], *rest))
    return loss, (params, x)

  def head(args):
    return jnp.mean(cross_entropy(project_to_vocabulary(*args), targets))

  targets = jax.random.randint(keys[1], (batch_size, length), 0, config.vocab_size)
  matrix = 0.02 * jax.random.normal(keys[2], (width, config.vocab_size))
  return {
    "SwiGLU": (*of_module(layers.MLP(config)), 6 * width * config.mlp_width * tokens),
    "attention": (*of_module(layers.Attention(config), layers.Sequence(positions.Angles(angles))),
                  (8 * width**2 + 4 * length * width) * tokens),
    "RMS norm": (*of_module(layers.RMSNorm(config)), 0),
    "head and cross-entropy": (head, (x, matrix), 2 * width * config.vocab_size * tokens),
  }


def attention_variants(lengths):
  """One block of width 256 on 2,048 tokens in sequences of each length."""
  for length in lengths:
    for kind, chunk in (("xla", 128), ("chunked", 128), ("chunked", 256)):
      config = dataclasses.replace(
        CONFIG, num_layers=1, vocab_size=64, max_length=length, attention=kind,
        attention_chunk=chunk)
      name = f"length {length}, {kind}" + (f" {chunk}" if kind == "chunked" else "")
      yield name, language_model(config, 2048 // length)


def loss_variants():
  """One block and a vocabulary of 32,000, the logits of so many positions at a time."""
  config = dataclasses.replace(CONFIG, num_layers=1, vocab_size=32_000)
  for chunk in (None, 128, 64, 32, 16, 8, 4):
    name = "default" if chunk is None else f"{chunk} positions of 128"
    yield name, language_model(config, 8, chunk)


def variants(args):
  if args.attention:
    return dict(attention_variants(args.lengths))
  if args.loss:
    return dict(loss_variants())
  return {"whole model": language_model(CONFIG, 8), **parts(CONFIG, 8)}


def measured(args) -> list[str]:
  """The rows of the table."""
  compiled, seconds = {}, {}
  for name, (function, params, flops) in variants(args).items():
    for which, (derivative, inputs) in passes(function, params).items():
      if args.only and which not in ("forward", *args.only):
        continue
      program = jax.jit(derivative).lower(*inputs).compile()
      jax.block_until_ready(program(*inputs))
      compiled[name, which] = program, inputs, flops
      seconds[name, which] = []
  for _ in range(args.repeats):
    for key, (program, inputs, _) in compiled.items():
      start = time.process_time()
      jax.block_until_ready(program(*inputs))
      seconds[key].append(time.process_time() - start)
  rows = []
  for (name, which), (program, _, flops) in compiled.items():
    fastest, forward = min(seconds[name, which]), min(seconds[name, "forward"])
    rate = f"{MULTIPLES[which] * flops / fastest / 1e9:.0f}" if flops else ""
    temp = program.memory_analysis().temp_size_in_bytes / 2**20
    rows.append(f"| {name} | {which} | {fastest * 1e3:.1f} | "
                f"{np.median(seconds[name, which]) * 1e3:.1f} | {fastest / forward:.2f} | {rate} | "
                f"{temp:.1f} |")
  return rows


def product_rate() -> float:
  """Operations a second of processor time in a float32 product of 1,024 squared, best of 20."""
  x = jnp.ones((1024, 1024), jnp.float32)
  product = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(20):
    start = time.process_time()
    product(x, x).block_until_ready()
    seconds.append(time.process_time() - start)
  return 2 * 1024**3 / min(seconds)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--only", nargs="*", choices=MULTIPLES, help="derivatives beside forward")
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--attention", action="store_true", help="lengths and kinds of attention")
  which.add_argument("--loss", action="store_true", help="chunks of the cross-entropy")
  parser.add_argument("--lengths", nargs="*", type=int, default=(256, 512, 1024, 2048))
  parser.add_argument("--output", type=Path, help="also write the table there")
  args = parser.parse_args()
  rows = measured(args)
  table = "\n".join([
    f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} core(s), Python "
    f"{platform.python_version()}, jax {jax.__version__}, load {os.getloadavg()[0]:.1f}; float32 "
    f"products of 1,024 squared {product_rate() / 1e9:.0f} GFLOP/s; {num_params(CONFIG):,} "
    f"parameters; {args.repeats} calls each.", "",
    "| what | derivative | fastest ms | median ms | of a forward pass | GFLOP/s | temp MiB |",
    "|---|---|---|---|---|---|---|", *rows, ""])
  print(table)
  if args.output is not None:
    args.output.write_text(table)


if __name__ == "__main__":
  main()
