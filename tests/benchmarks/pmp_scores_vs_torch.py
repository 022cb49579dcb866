
r"""PDS scores in JAX against the same solve in PyTorch, on one CPU, one model and one set of data.

    python tests/benchmarks/pmp_scores_vs_torch.py --output FILE
    python tests/benchmarks/pmp_scores_vs_torch.py --steps 100 --batch 2 --proxies 1280 --target 8 \
      --learning-rate 0.008 --exact-proxies 200  # 640 batches of proxies, 4 of target: as published

The PyTorch side is the algorithm of the code of arXiv 2410.07064 (spec section 2.4) with
`torch.func`: SGD steps with a checkpoint every floor(sqrt(T)) steps, segments recomputed, the
target gradient over sequential batches, a Hessian-vector product by `jvp` of `grad`, and for
proxies, every 10th step, `vmap` over examples of a `jvp`. Both sides differentiate as many examples
at once, which is far faster on a CPU than the 2, 4 and 8 of the published script. The model is the
Mistral-type network of `gin/models/small_cpu.gin`; its parameters come from a short training run on
the data: source code of the standard library as the corpus, the language reference as the target.

Each measurement is a process of its own. Times are of the second and later calls (the first, which
compiles, is given apart); memory is the rise of the peak resident size over a call, above what the
process held before it. `--threads` restricts all processes to so many cores: with one, processor
time is comparable on a machine that other work shares, where several threads of PyTorch lose most
of their time in OpenMP's barriers. Both sides run with malloc keeping freed memory for the times
(`lmops` does so, see training/memory.py) and with stock malloc for the memory.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import pydoc_data.topics
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import process_memory  # beside this script

from lmops_jax.sizing.memory import keep_freed_memory

VOCAB, LENGTH, PAD = 4096, 128, 0
DEVICE_BATCH = {"train": 16, "proxy": 32, "target": 32}  # differentiated at once, both sides
MODEL = dict(vocab_size=VOCAB, num_layers=2, width=128, num_heads=2, mlp_width=320,
             max_length=LENGTH, tied_embeddings=True, scan_layers=False)

# name -> (framework, options of the solve)
ROWS = {
  "PyTorch, every 10th step": ("torch", dict(every_k=10)),
  "JAX, every 10th step": ("jax", dict(every_k=10)),
  "JAX, every 10th step, sqrt trajectory": ("jax", dict(every_k=10, trajectory="sqrt")),
  "JAX, two groups": ("jax", dict(groups=2)),
  "JAX, one group": ("jax", dict(groups=1)),
}
_NEEDED = ("PyTorch, every 10th step", "JAX, every 10th step")  # what the others are compared with
# Ranked against "every step", on the first `--exact-proxies` rows, whose scores need no others.
EXACT = "JAX, every step"
RANKED = {
  EXACT: ("jax", dict(every_k=1)),
  "JAX, four groups": ("jax", dict(groups=4)),
  "JAX, ten groups": ("jax", dict(groups=10)),
}


# --- data and parameters, the same files for every process -------------------------------------


def make_data(directory: Path, sizes: argparse.Namespace) -> None:
  """Writes tokens of both texts and a trained set of parameters to `directory`."""
  import numpy as np

  target = " ".join(pydoc_data.topics.topics.values())
  stdlib = Path(sysconfig.get_path("stdlib"))
  corpus = "\n".join(
    path.read_text(errors="replace") for path in sorted(stdlib.glob("*.py"))[:120])
  words = [re.findall(r"\w+|[^\w\s]", text) for text in (corpus, target)]
  counts = collections.Counter(words[0]) + collections.Counter(words[1])
  ranks = {w: 1 + i % (VOCAB - 1) for i, (w, _) in enumerate(counts.most_common())}
  rng = np.random.default_rng(0)

  def rows(words, count):
    tokens = np.array([ranks[w] for w in words], np.int32)
    tokens = tokens[:len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return tokens[rng.permutation(len(tokens))[:count]]

  num_pretrain = 16 * 64
  needed = num_pretrain + sizes.steps * sizes.batch + sizes.proxies
  code = rows(words[0], needed)
  if len(code) < needed:
    raise ValueError(f"The standard library holds {len(code)} sequences, {needed} are needed.")
  pretrain, code = code[:num_pretrain], code[num_pretrain:]
  arrays = {"batches": code[:sizes.steps * sizes.batch].reshape(sizes.steps, sizes.batch, -1),
            "proxy": code[sizes.steps * sizes.batch:], "target": rows(words[1], sizes.target)}
  for name, leaf in _pretrained(pretrain).items():
    arrays[f"params/{name}"] = leaf
  np.savez(directory / "data.npz", **arrays)


def _pretrained(tokens):
  """64 AdamW steps from random parameters, so that losses and gradients are not those of noise."""
  import flax.linen as nn
  import flax.traverse_util
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  losses, _ = _jax_losses()
  model = losses.model
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
  optimizer = optax.adamw(2e-3)
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(lambda p: jnp.mean(losses(p, batch)))(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for batch in tokens.reshape(64, 16, -1):
    params, state = step(params, state, _as_batch(batch))
  flat = flax.traverse_util.flatten_dict(params, sep=".")
  return {k: np.asarray(v) for k, v in flat.items()}


def _as_batch(tokens):
  import numpy as np

  return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:],
          "loss_mask": np.ones(tokens[..., 1:].shape, np.float32)}


def load_data(directory: Path, num_proxies: int | None):
  import numpy as np

  data = dict(np.load(directory / "data.npz"))
  params = {k.removeprefix("params/"): v for k, v in data.items() if k.startswith("params/")}
  return params, data["batches"], data["proxy"][:num_proxies], data["target"]


# --- JAX ----------------------------------------------------------------------------------------


def _jax_losses():
  from lmops_jax.models.transformer import Transformer, TransformerConfig
  from lmops_jax.training.losses import lm_example_losses

  config = TransformerConfig(**MODEL)
  return lm_example_losses(Transformer(config)), config


def jax_solver(directory: Path, options: dict, num_proxies: int | None, rate: float):
  import flax.traverse_util
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from lmops_jax.control import mean_target_loss, pmp_scores

  flat, batches, proxy, target = load_data(directory, num_proxies)
  params = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(flat, sep="."))
  losses, _ = _jax_losses()
  target_loss = mean_target_loss(losses, _as_batch(target), DEVICE_BATCH["target"])
  batches, proxy = (jax.tree.map(jnp.asarray, _as_batch(x)) for x in (batches, proxy))
  optimizer = optax.sgd(rate)

  def solve():
    result = pmp_scores(losses, target_loss, optimizer, params, batches, None, proxy=proxy,
                        micro_batch_size=min(DEVICE_BATCH["train"], batches["tokens"].shape[1]),
                        proxy_batch_size=DEVICE_BATCH["proxy"], **options)
    return np.asarray(result.proxy_scores), {}

  return solve


# --- PyTorch ------------------------------------------------------------------------------------


def torch_losses(params, tokens):
  """`[B]` mean nats of `tokens [B, LENGTH + 1]`; the network of models/transformer.py."""
  import torch
  import torch.nn.functional as F

  num_heads, eps, base = MODEL["num_heads"], 1e-5, 1e4
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  x = params["embedding"][inputs]
  half = MODEL["width"] // num_heads // 2
  frequencies = base ** (-torch.arange(half, dtype=torch.float32) / half)
  angles = torch.arange(LENGTH, dtype=torch.float32)[:, None] * frequencies
  cos, sin = angles.cos()[:, None], angles.sin()[:, None]
  causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

  def norm(x, scale):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale

  def rotary(x):  # [B, S, H, E]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

  for layer in range(MODEL["num_layers"]):
    part = lambda name: params[f"layers.{name}"][layer]  # noqa: B023, E731
    h = norm(x, part("attention_norm.scale"))
    q, k, v = (torch.einsum("bsd,dhe->bshe", h, part(f"attention.{n}.kernel"))
               for n in ("query", "key", "value"))
    scores = torch.einsum("bqhe,bkhe->bhqk", rotary(q), rotary(k)) / (2 * half) ** 0.5
    weights = torch.softmax(scores.masked_fill(~causal, -1e30), dim=-1)
    out = torch.einsum("bhqk,bkhe->bqhe", weights, v)
    x = x + torch.einsum("bqhe,hed->bqd", out, part("attention.out.kernel"))
    h = norm(x, part("mlp_norm.scale"))
    x = x + (F.silu(h @ part("mlp.gate.kernel")) * (h @ part("mlp.up.kernel"))) @ part(
      "mlp.down.kernel")
  logits = norm(x, params["final_norm.scale"]) @ params["embedding"].T
  nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
  return nats.view(targets.shape).mean(1)


def torch_solver(directory: Path, options: dict, num_proxies: int | None, rate: float):
  import numpy as np
  import torch
  from torch.func import grad, jvp, vmap

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  params, batches, proxy, target = load_data(directory, num_proxies)
  params = {k: torch.tensor(v) for k, v in params.items()}
  batches, proxy, target = (torch.tensor(x).long() for x in (batches, proxy, target))
  num_steps, batch_size = batches.shape[:2]
  every_k = options["every_k"]
  size = DEVICE_BATCH
  loss_grad = grad(lambda p, tokens: torch_losses(p, tokens).sum())
  seconds = collections.Counter()

  def mean_gradient(params, tokens, part_size):
    total = {k: torch.zeros_like(v) for k, v in params.items()}
    for part in tokens.split(part_size):
      for k, g in loss_grad(params, part).items():
        total[k] += g / len(tokens)
    return total

  def sgd_step(params, tokens):
    grads = mean_gradient(params, tokens, size["train"])
    return {k: p - rate * grads[k] for k, p in params.items()}

  def hessian_product(params, costate, tokens):
    total = {k: torch.zeros_like(v) for k, v in params.items()}
    for part in tokens.split(size["train"]):
      product = jvp(lambda p: loss_grad(p, part), (params,), (costate,))[1]  # noqa: B023
      for k, h in product.items():
        total[k] += h / len(tokens)
    return total

  def proxy_slopes(params, costate):
    one = lambda row: jvp(  # noqa: E731
      lambda p: torch_losses(p, row[None])[0], (params,), (costate,))[1]
    return torch.cat([vmap(one)(part) for part in proxy.split(size["proxy"])])

  def timed(name, fn, *args):
    start = time.perf_counter()
    out = fn(*args)
    seconds[name] += time.perf_counter() - start
    return out

  def solve():
    seconds.clear()
    interval = int(num_steps ** 0.5)
    stored, state = {}, params
    for t in range(num_steps):
      if t % interval == 0:
        stored[t] = state
      state = timed("trajectory", sgd_step, state, batches[t])
    costate = timed("target", mean_gradient, state, target, size["target"])
    scores = torch.zeros(len(proxy))
    for start in sorted(stored, reverse=True):
      states = [stored[start]]
      for t in range(start, min(start + interval, num_steps) - 1):
        states.append(timed("trajectory", sgd_step, states[-1], batches[t]))
      for t in range(start + len(states) - 1, start - 1, -1):
        state = states.pop()
        if t % every_k == 0:
          scores += rate * timed("proxies", proxy_slopes, state, costate)
        product = timed("hessian", hessian_product, state, costate, batches[t])
        target_grad = timed("target", mean_gradient, state, target, size["target"])
        costate = {k: target_grad[k] + c - rate * product[k] for k, c in costate.items()}
    return np.asarray(scores), dict(seconds)

  return solve


# --- measurement --------------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> None:
  """One row in this process: times, or memory. Prints a JSON line."""
  framework, options = (ROWS | RANKED)[args.row]
  solver = {"jax": jax_solver, "torch": torch_solver}[framework]
  num_proxies = args.exact_proxies if args.row in RANKED else None
  solve = solver(Path(args.data), options, num_proxies, args.learning_rate)
  out = {}
  if args.measure == "memory":
    before = process_memory.settled_bytes()
    solve()
    out["first_call_bytes"] = process_memory.peak_bytes() - before
    before = process_memory.settled_bytes()
    process_memory.restart_peak()
    solve()
    out["call_bytes"] = process_memory.peak_bytes() - before
  else:
    start = time.perf_counter()
    scores, seconds = solve()
    first = time.perf_counter() - start
    wall, processor = [], []
    for _ in range(args.repeats):
      start, start_cpu = time.perf_counter(), time.process_time()
      scores, seconds = solve()
      wall.append(time.perf_counter() - start)
      processor.append(time.process_time() - start_cpu)
    out = {"first_s": first, "wall_s": wall, "processor_s": processor, "phases": seconds,
           "scores": scores.tolist()}
  print(json.dumps(out))


def matmul_flops_per_second() -> float:
  """Fastest of ten float32 products of 2,048 squared, on the cores in use."""
  import jax
  import jax.numpy as jnp

  x = jnp.ones((2048, 2048))
  product = jax.jit(jnp.dot)
  product(x, x).block_until_ready()
  times = []
  for _ in range(10):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * 2048 ** 3 / min(times)


def flops_of(row: str, sizes: argparse.Namespace) -> dict[str, float]:
  """Arithmetic of a row by part, in the multiples of a forward pass of spec section 8.1."""
  from lmops_jax.sizing.flops import forward_flops_per_token

  _, config = _jax_losses()
  sequence = LENGTH * forward_flops_per_token(config, LENGTH)
  framework, options = (ROWS | RANKED)[row]
  num_proxies = sizes.exact_proxies if row in RANKED else sizes.proxies
  passes = options.get("groups") or -(-sizes.steps // options["every_k"])
  recomputed = 1 if framework == "torch" or options.get("trajectory") == "sqrt" else 0
  batch = sizes.steps * sizes.batch * sequence
  targets = sizes.steps * sizes.target * sequence
  return {"trajectory": 3 * (1 + recomputed) * batch,
          "hessian": (9 if framework == "torch" else 8) * batch,
          "target": 3 * (targets + (sizes.target * sequence if framework == "torch" else 0)),
          "proxies": 3 * passes * num_proxies * sequence}


def run_rows(args: argparse.Namespace) -> str:
  import jax
  import torch
  from scipy.stats import spearmanr

  rows = [row for row in ROWS if args.rows is None or row in {*args.rows, *_NEEDED}]
  results = {}
  with tempfile.TemporaryDirectory() as directory:
    make_data(Path(directory), args)

    def measure(row, what, repeats):
      command = [sys.executable, __file__, "--row", row, "--data", directory, "--measure", what,
                 "--repeats", str(repeats), "--exact-proxies", str(args.exact_proxies),
                 "--learning-rate", str(args.learning_rate)]
      out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
      return json.loads(out.splitlines()[-1])

    for row in [*rows, *RANKED]:
      with_memory = row not in RANKED and not args.without_memory
      results[row] = measure(row, "memory", 1) if with_memory else {}
      results[row] |= measure(row, "time", 0 if row in RANKED else args.repeats)
      print(row, {k: v for k, v in results[row].items() if k != "scores"}, file=sys.stderr)

  peak = matmul_flops_per_second()
  exact = results[EXACT]["scores"]
  tenth = results["JAX, every 10th step"]["scores"]
  reference = results["PyTorch, every 10th step"]
  median = lambda x: sorted(x)[len(x) // 2]  # noqa: E731
  mib = lambda x: "" if x is None else f"{x / 2**20:.0f}"  # noqa: E731
  lines = [
    f"cpu, {args.threads} of {os.cpu_count()} cores, Python {platform.python_version()}, "
    f"jax {jax.__version__}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; "
    f"float32 matrix products {peak / 1e9:.0f} GFLOP/s on them. "
    f"{args.steps} SGD steps of {args.learning_rate} on {args.batch} sequences of "
    f"{LENGTH}, {args.target} target sequences, {args.proxies} proxies; median of {args.repeats} "
    f"calls. Ranks against every step: of the first {len(exact)} proxies.",
    "",
    "| row | wall s | processor s | times as fast, processor time | first call s | peak MiB | "
    "peak MiB with first call | TFLOP | of product speed, processor time | Spearman, every step | "
    "Spearman, JAX every 10th |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    r = results[row]
    flops, wall = sum(flops_of(row, args).values()), median(r["wall_s"])
    busy = median(r["processor_s"]) / args.threads
    lines.append(
      f"| {row} | {wall:.1f} | {median(r['processor_s']):.1f} | "
      f"{median(reference['processor_s']) / median(r['processor_s']):.2f} | {r['first_s']:.1f} | "
      f"{mib(r.get('call_bytes'))} | {mib(r.get('first_call_bytes'))} | "
      f"{flops / 1e12:.2f} | {flops / busy / peak:.0%} | "
      f"{spearmanr(exact, r['scores'][:len(exact)])[0]:.4f} | "
      f"{spearmanr(tenth, r['scores'])[0]:.6f} |")
  lines += ["", "| ranks of the first proxies only | Spearman, every step |", "|---|---|"]
  lines += [f"| {row} | {spearmanr(exact, results[row]['scores'])[0]:.4f} |" for row in RANKED]
  lines += ["", "Parts of a row, TFLOP (and, for PyTorch, seconds of the last call):", "",
            "| row | trajectory | Hessian | target | proxies |", "|---|---|---|---|---|"]
  for row in rows:
    r = results[row]
    cells = [f"{v / 1e12:.2f}" + (f" ({r['phases'][k]:.1f} s)" if r["phases"] else "")
             for k, v in flops_of(row, args).items()]
    lines.append(f"| {row} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--target", type=int, default=48)
  parser.add_argument("--proxies", type=int, default=384)
  parser.add_argument("--learning-rate", type=float, default=0.1, help="0.008 as published")
  parser.add_argument("--exact-proxies", type=int, default=384, help="ranked against every step")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--rows", nargs="*", choices=ROWS, help="these and what they compare with")
  parser.add_argument("--without-memory", action="store_true", help="times only: half the calls")
  parser.add_argument("--output", type=Path)
  parser.add_argument("--row", choices=ROWS | RANKED, help=argparse.SUPPRESS)
  parser.add_argument("--data", help=argparse.SUPPRESS)
  parser.add_argument("--measure", choices=("time", "memory"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])  # also of children
  if args.row is not None:
    if args.measure == "time":
      keep_freed_memory()
    worker(args)
    return
  table = run_rows(args)
  print(table)
  if args.output is not None:
    args.output.write_text(table)


if __name__ == "__main__":
  main()
