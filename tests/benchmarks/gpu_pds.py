"""PDS at the paper's size on one GPU: the phases of a solve, and pre-training beside PyTorch.

    python tests/benchmarks/gpu_pds.py --output tests/benchmarks/results/gpu_pds.md
    python tests/benchmarks/gpu_pds.py --parts solve pretrain_160m torch_160m
    python tests/benchmarks/gpu_pds.py --toy        # runs on a CPU; its figures mean nothing

The solve is that of arXiv 2410.07064: 162M parameters, T = 100 steps of 256 sequences of 1,024,
1,024 target sequences, and 163,840 proxies, here scored once for each of `--groups` groups of
steps. Each phase runs `--repeats` whole steps after two to warm up (proxies: so many batches); the
whole solve is their median times what a solve takes of them. Pre-training is one AdamW step of
`--rows` sequences; PyTorch runs the same network (transformers' Mistral, SDPA attention,
`torch.compile`, bfloat16 autocast, fused AdamW) on as many tokens. Tokens are random: only speed
is measured.

MFU counts 3 forward passes for a gradient, 3 for the scores of proxies and 8 for a Hessian product
with the scores of its batch; a forward pass is two operations a matmul parameter and token, and
causal attention once (`sizing.flops`); rematerialisation does not count. Each part is a process of
its own, so that one that does not fit leaves the others alone. Needs jax, flax, optax, numpy, gin
and pydantic, and for the PyTorch rows torch and transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util  # noqa: F401  before gin, which forgets to
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("solve", "pretrain_160m", "torch_160m", "pretrain_1.7b", "torch_1.7b")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, operations a second
GIN = Path(__file__).parents[2] / "gin"
LEARNING_RATE = 0.008


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a solve; the published ones by default."""

  steps: int = 100
  batch: int = 256
  target: int = 1024
  proxies: int = 163_840
  micro_batch: int = 16
  proxy_batch: int = 64
  length: int = 1024


TOY = Sizes(steps=3, batch=4, target=4, proxies=12, micro_batch=2, proxy_batch=4, length=16)


def model_config(name: str, args: argparse.Namespace, **changes):
  """`gin/models/pds_<name>.gin` with the published vocabulary, or a toy of the same kind."""
  import gin

  from lmops_jax.models.transformer import TransformerConfig

  if args.toy:
    shape = dict(num_layers=2, width=32, num_heads=2, mlp_width=48, max_length=16, vocab_size=64)
    return TransformerConfig(**shape, **changes)
  with gin.unlock_config():
    gin.clear_config()
    gin.parse_config_file(str(GIN / "models" / f"pds_{name}.gin"))
  config = gin.get_configurable("models.TransformerConfig")()
  return dataclasses.replace(config, vocab_size=32_000, **changes)


def timed(call, repeats: int) -> float:
  """Median seconds of `call()`, which returns when the device is done."""
  times = []
  for i in range(repeats + 2):
    start = time.perf_counter()
    call()
    if i >= 2:
      times.append(time.perf_counter() - start)
  return sorted(times)[len(times) // 2]


# --- JAX ------------------------------------------------------------------------------------------


def _batch(rows: int, length: int, vocab_size: int, seed: int):
  import jax.numpy as jnp
  import numpy as np

  tokens = np.random.default_rng(seed).integers(0, vocab_size, (rows, length + 1), np.int32)
  return {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:]),
          "loss_mask": jnp.ones((rows, length), jnp.float32)}


def _losses_and_params(config):
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from lmops_jax.models.transformer import Transformer
  from lmops_jax.training.losses import lm_example_losses

  model = Transformer(config)
  init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
  return lm_example_losses(model), init(jax.random.key(0))


def solve(args: argparse.Namespace) -> dict:
  """Phases of the solve: seconds, operations and how often a solve runs each."""
  import jax
  import jax.numpy as jnp

  from lmops_jax.control import mean_target_loss
  from lmops_jax.control.adjoint import directional_scores, hvp_scores_losses
  from lmops_jax.control.dynamics import gradient
  from lmops_jax.sizing.flops import forward_flops_per_token

  sizes = TOY if args.toy else dataclasses.replace(
    Sizes(), micro_batch=args.micro_batch, proxy_batch=args.proxy_batch)
  config = model_config("160m", args, attention=args.attention, attention_chunk=args.chunk,
                        remat=args.remat, scan_layers=args.scan)
  losses, params = _losses_and_params(config)
  batch = _batch(sizes.batch, sizes.length, config.vocab_size, 1)
  target = _batch(sizes.target, sizes.length, config.vocab_size, 2)
  proxies = _batch(sizes.proxy_batch, sizes.length, config.vocab_size, 3)
  weights = jnp.full((sizes.batch,), 1 / sizes.batch)
  costate = jax.tree.map(jnp.ones_like, params)

  @jax.jit
  def trajectory(params):
    grads = gradient(losses, params, batch, weights, micro_batch_size=sizes.micro_batch)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)

  @jax.jit
  def hessian(params, costate):
    direction = jax.tree.map(lambda c: -LEARNING_RATE * c, costate)
    product, scores, _ = hvp_scores_losses(
      losses, params, direction, batch, weights, micro_batch_size=sizes.micro_batch)
    return jax.tree.map(jnp.add, costate, product), scores

  target_loss = mean_target_loss(losses, target, sizes.micro_batch)
  target_gradient = jax.jit(jax.value_and_grad(lambda p, loss: loss(p)))

  def run(program, *arguments):
    return lambda: jax.block_until_ready(program(*arguments))

  sequence = sizes.length * forward_flops_per_token(config, sizes.length)
  num_parts = -(-sizes.proxies // sizes.proxy_batch) * args.groups
  phases = {  # call, forward passes' worth, sequences, times a solve
    "trajectory": (run(trajectory, params), 3, sizes.batch, sizes.steps),
    "Hessian and batch scores": (run(hessian, params, costate), 8, sizes.batch, sizes.steps),
    "target gradient": (run(target_gradient, params, target_loss), 3, sizes.target, sizes.steps),
    "proxies": (run(functools.partial(directional_scores, losses), params, costate, proxies), 3,
                sizes.proxy_batch, num_parts),
  }
  return {name: dict(seconds=timed(call, args.repeats), flops=multiple * rows * sequence,
                     times=times, tokens=rows * sizes.length)
          for name, (call, multiple, rows, times) in phases.items()}


def pretrain(name: str, args: argparse.Namespace) -> dict:
  """One training step of this library."""
  import jax

  from lmops_jax.sizing.flops import forward_flops_per_token
  from lmops_jax.training import optimizers
  from lmops_jax.training.learner import supervised

  kind = args.train_attention
  config = model_config(name, args, attention=kind, remat=args.train_remat, scan_layers=args.scan)
  losses, params = _losses_and_params(config)
  optimizer = optimizers.adamw(1e-4)
  rows, length = _train_rows(args), config.max_length
  learner, key = supervised(None, losses, optimizer), jax.random.key(0)
  state = [learner.init(key, params)]
  del params
  batch = _batch(rows, length, config.vocab_size, 1)
  step = jax.jit(learner.step, donate_argnums=0)

  def call():
    state[0], metrics = step(state[0], batch, key)
    jax.block_until_ready((state[0], metrics))

  flops = 3 * forward_flops_per_token(config, length) * rows * length
  return {f"pre-training {name}": dict(
    seconds=timed(call, args.repeats), flops=flops, times=None, tokens=rows * length)}


def _train_rows(args) -> int:
  return 2 if args.toy else args.rows


# --- PyTorch --------------------------------------------------------------------------------------


def torch_pretrain(name: str, args: argparse.Namespace) -> dict:
  """The same step in PyTorch."""
  import torch
  from transformers import MistralConfig, MistralForCausalLM

  from lmops_jax.sizing.flops import forward_flops_per_token

  config = model_config(name, args)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")
  model = MistralForCausalLM(MistralConfig(
    vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
    num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
    num_key_value_heads=config.key_heads, max_position_embeddings=config.max_length,
    tie_word_embeddings=config.tied_embeddings, sliding_window=None, use_cache=False,
    attn_implementation="sdpa")).to(device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
  forward = model if args.toy else torch.compile(model)
  rows, length = _train_rows(args), config.max_length
  tokens = torch.randint(0, config.vocab_size, (rows, length), device=device)

  def call():
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
      loss = forward(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()  # waits for the device
    if device == "cuda":
      torch.cuda.synchronize()

  flops = 3 * forward_flops_per_token(config, length) * rows * length
  return {f"PyTorch pre-training {name}": dict(
    seconds=timed(call, args.repeats), flops=flops, times=None, tokens=rows * length)}


# --- measurement ----------------------------------------------------------------------------------


def run_part(part: str, args: argparse.Namespace) -> dict:
  if part == "solve":
    return solve(args)
  framework, name = part.split("_")
  return (pretrain if framework == "pretrain" else torch_pretrain)(name, args)


def measure(part: str) -> tuple[dict, str | None]:
  """Rows of a part run in its own process, and what went wrong there, or None."""
  command = [sys.executable, __file__, *sys.argv[1:], "--worker", part]
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  if done.returncode:
    reasons = [line for line in done.stderr.splitlines() if line.strip()]
    return {}, (reasons[-1] if reasons else f"exit status {done.returncode}")[:300]
  return json.loads(done.stdout.splitlines()[-1]), None


def device_name() -> str:
  """Asked of a process that ends, so that no memory of the device stays taken."""
  code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, jax.__version__)"
  return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                        text=True).stdout.strip()


def table(rows: dict, problems: dict, device: str, args: argparse.Namespace) -> str:
  """What was measured, as Markdown."""
  peak = args.peak or next((v for k, v in PEAKS.items() if k in device), None)
  lines = [
    "# PDS at the paper's size on one GPU", "",
    "Written by `tests/benchmarks/gpu_pds.py`, whose docstring says what is counted.", "",
    f"    python tests/benchmarks/gpu_pds.py {' '.join(sys.argv[1:])}", "",
    f"{device} (platform, device, jax), Python {platform.python_version()}; "
    + (f"peak {peak / 1e12:.0f} TFLOP/s." if peak else "peak not known: give `--peak`."), "",
    "| phase | seconds a step | TFLOP a step | tokens/s | TFLOP/s | MFU | times a solve | "
    "seconds a solve |", "|---|---|---|---|---|---|---|---|"]
  total = 0.0
  for name, row in rows.items():
    rate = row["flops"] / row["seconds"]
    whole = row["seconds"] * row["times"] if row["times"] else None
    total += whole or 0
    lines.append(
      f"| {name} | {row['seconds']:.4f} | {row['flops'] / 1e12:.3g} | "
      f"{row['tokens'] / row['seconds']:,.0f} | {rate / 1e12:.3g} | "
      f"{f'{rate / peak:.1%}' if peak else ''} | {row['times'] or ''} | "
      f"{'' if whole is None else f'{whole:.1f}'} |")
  if total:
    work = sum(row["flops"] * row["times"] for row in rows.values() if row["times"])
    mfu = f", {work / total / peak:.1%} MFU" if peak else ""
    lines += ["", f"A whole solve, from these: {total / 60:.1f} minutes{mfu}."]
  lines += ["", *(f"{part} failed: {reason}" for part, reason in problems.items())]
  return "\n".join(lines).rstrip() + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
  parser.add_argument("--repeats", type=int, default=10, help="timed steps of each phase")
  parser.add_argument("--groups", type=int, default=1, help="passes over the proxies")
  parser.add_argument("--micro-batch", type=int, default=16, help="sequences a gradient")
  parser.add_argument("--proxy-batch", type=int, default=64, help="proxies scored at once")
  parser.add_argument("--attention", default="chunked", help="of the solve")
  parser.add_argument("--chunk", type=int, default=256, help="queries a block of chunked attention")
  parser.add_argument("--remat", default="none", help="of the solve")
  parser.add_argument("--rows", type=int, default=16, help="sequences of a pre-training step")
  parser.add_argument("--train-attention", default=None, help="of pre-training; cudnn on a GPU")
  parser.add_argument("--train-remat", default="dots", help="of pre-training")
  parser.add_argument("--scan", action="store_true", help="loop over layers instead of unrolling")
  parser.add_argument("--peak", type=float, help="operations a second of the device")
  parser.add_argument("--toy", action="store_true", help="seconds on a CPU")
  parser.add_argument("--output", type=Path)
  parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.train_attention = args.train_attention or ("xla" if args.toy else "cudnn")
  if args.worker:
    print(json.dumps(run_part(args.worker, args)))
    return
  rows, problems = {}, {}
  for part in args.parts:
    found, problem = measure(part)
    rows |= found
    if problem:
      problems[part] = problem
    print(part, problem or found, file=sys.stderr)
  text = table(rows, problems, device_name(), args)
  print(text)
  if args.output is not None:
    args.output.write_text(text)
  if problems:
    raise SystemExit(1)


if __name__ == "__main__":
  main()
