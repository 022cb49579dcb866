"""The PMP solve here against the same solve in PyTorch: time, peak memory, agreement.

  pip install -e '.[parity]'
  python tests/benchmarks/pmp_scores_vs_torch.py [--output FILE.md]

The peer follows the published code of PDS (arXiv 2410.07064): a forward pass of plain SGD that
keeps its states, then for each step back the gradient of the target loss over sequential batches,
at every tenth step a `vmap` over examples of a forward-mode JVP for the proxies, and a separate
Hessian-vector product by forward-over-reverse, all with `torch.func`. Both sides run the same
Mistral-type model from the same parameters on the same words of the Python language reference, in
float32, on the same threads. Every row is a process of its own; memory is the growth of its peak
over what it needed before the solve. Steps, proxies and sizes are options.
"""

import argparse
import collections
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROWS = {
  "torch, every_k=10": {"library": "torch", "every_k": 10},
  "ours, every_k=10": {"every_k": 10},
  "ours, groups=1": {"groups": 1},
  "ours, groups=T/10": {"groups": -10},
  "ours, in-batch scores only": {"proxy": False},
  "torch, every_k=1": {"library": "torch", "every_k": 1, "once": True},
  "ours, every_k=1": {"every_k": 1, "once": True},
}
BOUNDS = {
  "torch, every_k=10": "target gradients and proxy JVPs; dispatch and element-wise passes",
  "ours, every_k=10": "matrix products of target gradients",
  "ours, groups=1": "matrix products of target gradients",
  "ours, groups=T/10": "matrix products of target gradients",
  "ours, in-batch scores only": "matrix products of target gradients",
  "torch, every_k=1": "proxy JVPs",
  "ours, every_k=1": "proxy JVPs",
}
LEARNING_RATE = 0.1


def problem(options):
  """Parameters (nested dicts of arrays), batches, target and proxies, the same for all rows."""
  import jax

  from lmops_jax.models.transformer import Transformer, TransformerConfig

  model = Transformer(TransformerConfig(
    vocab_size=options.vocab_size, num_layers=2, width=options.width, num_heads=2,
    mlp_width=5 * options.width // 2, max_length=options.length, tied_embeddings=True,
    scan_layers=False,
  ))
  import flax.linen as nn
  tokens = np.zeros((1, options.length), np.int32)
  params = nn.unbox(model.init(jax.random.key(0), tokens)["params"])

  from pydoc_data import topics
  words = re.findall(r"\w+|[^\w\s]", " ".join(text for _, text in sorted(topics.topics.items())))
  ranks = {w: i for i, (w, _) in enumerate(collections.Counter(words).most_common())}
  ids = np.array([ranks[w] % options.vocab_size for w in words], np.int32)
  rows = len(ids) // (options.length + 1)
  ids = ids[: rows * (options.length + 1)].reshape(rows, -1)
  rng = np.random.default_rng(0)

  def draw(*shape):
    chosen = ids[rng.integers(rows, size=shape)]
    return {
      "tokens": chosen[..., :-1], "targets": chosen[..., 1:],
      "loss_mask": np.ones(chosen[..., 1:].shape, np.float32),
    }

  data = (draw(options.steps, options.batch), draw(options.target), draw(options.proxies))
  return model, params, *data


def solve_ours(options, row):
  import jax
  import jax.numpy as jnp

  from lmops_jax import control
  from lmops_jax.training import losses, optimizers

  model, params, batches, target, proxy = problem(options)
  example_losses = losses.lm_example_losses(model)
  target_loss = control.mean_target_loss(example_losses, target, options.micro)
  optimizer = optimizers.sgd(LEARNING_RATE)
  weights = np.full((options.steps, options.batch), 1 / options.batch, np.float32)
  groups = row.get("groups")
  groups = -(options.steps // groups) if groups and groups < 0 else groups
  batches, proxy = jax.tree.map(jnp.asarray, (batches, proxy))

  def run():
    out = control.pmp_scores(
      example_losses, target_loss, optimizer, params, batches, weights,
      proxy=proxy if row.get("proxy", True) else None, every_k=row.get("every_k", 1),
      groups=groups, proxy_batch_size=options.micro,
    )
    return jax.block_until_ready(out)

  return run, lambda out: None if out.proxy_scores is None else np.asarray(out.proxy_scores)


def torch_losses(options):
  """`(params, tokens [B,S], targets, mask) -> [B]`, the model of `lmops_jax.models` in PyTorch."""
  import torch

  def norm(x, scale):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale

  def rotary(x):
    half = x.shape[-1] // 2
    inverse = 1e4 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * inverse
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  future = torch.ones(options.length, options.length, dtype=torch.bool).triu(1)

  def losses(params, tokens, targets, mask):
    x = params["embedding"][tokens]
    layers = params["layers"]
    for i in range(layers["mlp_norm"]["scale"].shape[0]):
      attention, mlp = layers["attention"], layers["mlp"]
      h = norm(x, layers["attention_norm"]["scale"][i])
      q, k, v = (
        torch.einsum("bsd,dhe->bshe", h, attention[n]["kernel"][i])
        for n in ("query", "key", "value")
      )
      q, k = rotary(q), rotary(k)
      scores = torch.einsum("bshe,bmhe->bhsm", q, k) / q.shape[-1] ** 0.5
      weights = scores.masked_fill(future, float("-inf")).softmax(-1)
      out = torch.einsum("bhsm,bmhe->bshe", weights, v)
      x = x + torch.einsum("bshe,hed->bsd", out, attention["out"]["kernel"][i])
      h = norm(x, layers["mlp_norm"]["scale"][i])
      gate = torch.nn.functional.silu(h @ mlp["gate"]["kernel"][i])
      x = x + (gate * (h @ mlp["up"]["kernel"][i])) @ mlp["down"]["kernel"][i]
    logits = norm(x, params["final_norm"]["scale"]) @ params["embedding"].T
    nats = logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]
    return (nats * mask).sum(-1) / mask.sum(-1)

  return losses


def solve_torch(options, row):
  import torch
  from torch.utils import _pytree

  torch.set_num_threads(os.cpu_count())
  _, params, batches, target, proxy = problem(options)
  losses = torch_losses(options)

  def tensors(tree):
    return _pytree.tree_map(lambda x: torch.from_numpy(np.array(x)), tree)

  def fields(batch):
    return (
      torch.from_numpy(np.array(batch["tokens"])).long(),
      torch.from_numpy(np.array(batch["targets"])).long(),
      torch.from_numpy(np.array(batch["loss_mask"])),
    )

  initial = tensors(params)
  batches, target, proxy = fields(batches), fields(target), fields(proxy)

  def mean_loss(params, *batch):
    return losses(params, *batch).mean()

  grad = torch.func.grad(mean_loss)

  def add(a, b, scale=1.0):
    return _pytree.tree_map(lambda x, y: x + scale * y, a, b)

  def zeros(tree):
    return _pytree.tree_map(torch.zeros_like, tree)

  def target_grad(params):
    total, num = zeros(params), len(target[0])
    for start in range(0, num, options.micro):
      part = tuple(x[start : start + options.micro] for x in target)
      total = add(total, grad(params, *part), len(part[0]) / num)
    return total

  def hvp(params, direction, batch):
    return torch.func.jvp(lambda p: grad(p, *batch), (params,), (direction,))[1]

  def slope(params, direction, tokens, targets, mask):
    one = (tokens[None], targets[None], mask[None])
    return torch.func.jvp(lambda p: losses(p, *one)[0], (params,), (direction,))[1]

  slopes = torch.func.vmap(slope, in_dims=(None, None, 0, 0, 0))

  def run():
    states = [initial]
    for t in range(options.steps):
      step = tuple(x[t] for x in batches)
      states.append(add(states[-1], grad(states[-1], *step), -LEARNING_RATE))
    scores = torch.zeros(options.proxies)
    costate = target_grad(states[options.steps])
    for t in reversed(range(options.steps)):
      if t % row["every_k"] == 0:
        for start in range(0, options.proxies, options.micro):
          part = tuple(x[start : start + options.micro] for x in proxy)
          scores[start : start + options.micro] += LEARNING_RATE * slopes(
            states[t], costate, *part
          )
      step = tuple(x[t] for x in batches)
      change = hvp(states[t], costate, step)
      costate = add(add(costate, change, -LEARNING_RATE), target_grad(states[t]))
    return scores

  return run, lambda scores: scores.numpy()


def measure(options, name):
  row = ROWS[name]
  make = solve_torch if row.get("library") == "torch" else solve_ours
  run, scores_of = make(options, row)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  seconds = []
  for _ in range(1 if row.get("once") else options.repeats + 1):
    start = time.perf_counter()
    out = run()
    seconds.append(time.perf_counter() - start)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  scores = scores_of(out)
  warm = seconds[1:] or seconds
  return {
    "first": seconds[0], "seconds": statistics.median(warm), "fastest": min(warm),
    "peak_mib": (peak - before) / 1024, "scores": None if scores is None else scores.tolist(),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--target", type=int, default=128)
  parser.add_argument("--proxies", type=int, default=512)
  parser.add_argument("--micro", type=int, default=32, help="examples differentiated at a time")
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--vocab-size", type=int, default=4096)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--output", type=Path)
  parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.row:
    print(json.dumps(measure(options, options.row)))
    return

  results = {}
  for name in ROWS:
    command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
      sys.exit(f"{name} failed:\n{done.stderr}")
    results[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {results[name]['seconds']:.1f} s", file=sys.stderr)
  text = report(options, results)
  print(text)
  if options.output:
    options.output.write_text(text)


def report(options, results):
  import importlib.metadata

  from scipy import stats

  exact = results["ours, every_k=1"]["scores"]
  peer = results["torch, every_k=10"]
  versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "torch", "numpy"))
  lines = [
    "# The PMP solve against PyTorch", "",
    "Written by `tests/benchmarks/pmp_scores_vs_torch.py`.", "",
    f"CPU, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}, load "
    f"{os.getloadavg()[0]:.1f}; T={options.steps} SGD steps of {options.batch} x {options.length} "
    f"tokens, {options.target} target and {options.proxies} proxy instances, {options.micro} at a "
    f"time; 2 layers, width {options.width}, vocabulary {options.vocab_size}, float32. Median of "
    f"{options.repeats} solves after the first, which compiles (rows with every_k=1 ran once, "
    "compilation included). Memory is the growth of the process's peak.", "",
    "| row | seconds | fastest | first | ratio to torch every_k=10 | peak MiB | Spearman to exact |"
    " bound by |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name, result in results.items():
    rank = "-"
    if result["scores"] is not None:
      rank = f"{stats.spearmanr(result['scores'], exact).statistic:.4f}"
    lines.append(
      f"| {name} | {result['seconds']:.2f} | {result['fastest']:.2f} | {result['first']:.2f} | "
      f"{peer['seconds'] / result['seconds']:.2f} | {result['peak_mib']:.0f} | {rank} | "
      f"{BOUNDS[name]} |"
    )
  ours, theirs = (np.array(results[f"{who}, every_k=10"]["scores"]) for who in ("ours", "torch"))
  error = np.abs(ours - theirs).max() / np.abs(theirs).max()
  lines += ["", f"Largest difference between ours and torch at every_k=10: {error:.1e} of the "
            "largest score.", ""]
  return "\n".join(lines)


if __name__ == "__main__":
  main()
