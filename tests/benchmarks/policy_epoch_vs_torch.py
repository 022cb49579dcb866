"""One epoch of policy optimisation in JAX against the same epoch in PyTorch, on one CPU.

    python tests/benchmarks/policy_epoch_vs_torch.py --output FILE

The perceptron of arXiv 2402.17759 at the paper's size: a forward pass of T steps under the policy
`gamma [T,N]`, the gradient of the area under the dev loss in all T N weights, one step of the
published script (0.001 on the mean over steps), projection of every row onto the simplex. The
policy that is improved comes from 20 epochs of a hundred times that step, so that rows have weights
of exactly 0 (from uniform weights none gets there in one epoch of the script).

JAX is `control.improve_policy`, one compiled program. Its parts are timed as programs of their own:
the forward pass, both passes (the difference is called reverse) and the projection; the whole epoch
is timed as such, and is not their sum.

PyTorch is the published algorithm from its description, with `torch.func`: a loop over steps that
keeps every theta_t; backwards the dev gradient, gradients of all examples by `vmap` of `grad`, 512
at a time, in product with the costate, and a Hessian product by `jvp` of `grad`; then the rows. All
training examples go through one `grad` and one `jvp` a step (the script takes batches of 512, which
is slower). Rows are projected by a quadratic program each, as published (cvxpy, solver OSQP, in
one process; timed on a sample of rows), or all at once by sorting. "one jvp" takes the products
with the costate from the tangents of the Hessian product, as JAX does.

Each measurement is a process of its own. Memory is the rise of the peak resident size over a call
above what the process held before it. Both sides run with malloc keeping freed memory for the times
(`lmops` does so) and with stock malloc for the memory. `--threads` restricts all processes to so
many cores. cvxpy is optional; without it its row is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import process_memory  # beside this script

from lmops_jax.sizing.memory import keep_freed_memory

LEARNING_RATE = 0.1
STEP_SIZE = 1e-3  # of the mean over steps
EARLIER_EPOCHS, EARLIER_STEP_SIZE = 20, 0.1
EXAMPLES_AT_ONCE = 512  # gradients of single examples, PyTorch
TINY = 64  # examples of the run that shows the cost of calls

# name -> (framework, options)
ROWS = {
  "JAX, bisect": ("jax", dict(method="bisect", trajectory="all")),
  "JAX, sort": ("jax", dict(method="sort", trajectory="all")),
  "JAX, sqrt trajectory, bisect": ("jax", dict(method="bisect", trajectory="sqrt")),
  "JAX, sqrt trajectory, sort": ("jax", dict(method="sort", trajectory="sqrt")),
  "PyTorch, quadratic programs": ("torch", dict(method="program", fused=False)),
  "PyTorch, sort": ("torch", dict(method="sort", fused=False)),
  "PyTorch, one jvp, sort": ("torch", dict(method="sort", fused=True)),
}
REFERENCE = "PyTorch, sort"


# --- data and policy, the same file for every process -------------------------------------------


def make_data(file: Path, sizes: argparse.Namespace) -> None:
  """Writes the task, theta_0 and the policy to improve."""
  import jax
  import numpy as np

  from lmops_jax import control
  from lmops_jax.systems.learning_law import Perceptron

  task = Perceptron(dim=sizes.dim, num_train=sizes.examples, num_desired=sizes.dev).make(seed=0)
  params = task.model.init(jax.random.key(0), task.parts["train"]["inputs"][:1])["params"]
  data = {f"{part}/{name}": value for part in ("train", "dev")
          for name, value in task.parts[part].items()}
  data["theta"] = np.asarray(params["theta"])
  run = _jax_run(data, sizes.steps, "all")
  gamma = run.uniform()
  for _ in range(EARLIER_EPOCHS):
    gamma = control.improve_policy(
      run, gamma, control.ProjectedGradient("bisect"), EARLIER_STEP_SIZE / sizes.steps).gamma
  np.savez(file, gamma=np.asarray(gamma), **data)


def load_data(file: Path):
  import numpy as np

  return dict(np.load(file))


def exact_step(gamma, scores, rate: float):
  """`[R,N]` float64: each row's projection of `gamma + rate * scores`, by sorting."""
  import numpy as np

  rows = gamma.astype(np.float64) + rate * scores.astype(np.float64)
  rows -= rows.max(1, keepdims=True)
  ordered = -np.sort(-rows, axis=1)
  count = np.arange(1, rows.shape[1] + 1)
  tau = (ordered.cumsum(1) - 1) / count
  last = (ordered > tau).sum(1, keepdims=True) - 1
  return np.maximum(rows - np.take_along_axis(tau, last, axis=1), 0)


# --- JAX ----------------------------------------------------------------------------------------


def _jax_run(data, num_steps, trajectory):
  import optax

  from lmops_jax import control
  from lmops_jax.models.perceptron import Perceptron, PerceptronConfig
  from lmops_jax.training.losses import binary_example_losses

  losses = binary_example_losses(Perceptron(PerceptronConfig(len(data["theta"]))))
  train, dev = ({name: data[f"{part}/{name}"] for name in ("inputs", "labels")}
                for part in ("train", "dev"))
  return control.controlled_run(
    losses, control.mean_target_loss(losses, dev), optax.sgd(LEARNING_RATE),
    {"theta": data["theta"]}, train, num_steps,
    options=control.SolveOptions(trajectory=trajectory))


def jax_parts(data, options: dict, sizes: argparse.Namespace) -> dict:
  """Functions without arguments: the epoch and its parts. Each waits for its result."""
  import jax
  import jax.numpy as jnp

  from lmops_jax import control

  rule, rate = control.ProjectedGradient(options["method"]), STEP_SIZE / sizes.steps
  gamma = jnp.asarray(data["gamma"])
  run = _jax_run(data, sizes.steps, options["trajectory"])
  steps = jnp.arange(sizes.steps)

  @jax.jit
  def forward(run, gamma):
    problem = run.problem(gamma)
    return jax.lax.scan(lambda s, t: (problem.forward(s, t), s), run.first_state(), steps)

  @jax.jit
  def products(inputs, theta):
    # The products of a gradient and nothing else.
    def step(theta, _):
      return theta - 1e-9 * (inputs @ theta) @ inputs, None
    return jax.lax.scan(step, theta, steps)[0]

  move = jax.jit(rule.move)
  inputs, theta = run.data["inputs"], run.params["theta"]
  scores = control.policy_gradient(run, gamma).scores

  def epoch():
    result = jax.block_until_ready(control.improve_policy(run, gamma, rule, rate))
    return {"gamma": result.gamma, "scores": result.scores, "rows": None}

  def waits(fn, *args):
    return lambda: jax.block_until_ready(fn(*args))

  return {
    "epoch": epoch, "forward": waits(forward, run, gamma),
    "both": waits(control.policy_gradient, run, gamma),
    "projection": waits(move, gamma, scores, rate), "products": waits(products, inputs, theta)}


def _tiny(data, num_steps):
  """The same problem with `TINY` training and dev examples."""
  import numpy as np

  small = {name: value if name == "theta" else value[:TINY] for name, value in data.items()}
  return small | {"gamma": np.full((num_steps, TINY), 1 / TINY, np.float32)}


# --- PyTorch ------------------------------------------------------------------------------------


def torch_passes(data, num_steps: int, num_parts: int, fused: bool):
  """`(forward, reverse)` of the problem; gradients of examples in `num_parts` parts."""
  import torch
  from torch.func import grad, grad_and_value, jvp, vmap
  from torch.nn.functional import binary_cross_entropy_with_logits

  tensors = {name: torch.tensor(value) for name, value in data.items()}
  gamma, theta_0 = tensors["gamma"], tensors["theta"]
  train, dev = ((tensors[f"{part}/inputs"], tensors[f"{part}/labels"]) for part in ("train", "dev"))
  parts = list(zip(*(x.chunk(num_parts) for x in train)))

  def losses(theta, inputs, labels):
    return binary_cross_entropy_with_logits(inputs @ theta, labels, reduction="none")

  def weighted(theta, weights):
    each = losses(theta, *train)
    return weights @ each, each

  def dev_loss(theta):
    return losses(theta, *dev).mean()

  step_grad = grad(lambda theta, weights: weighted(theta, weights)[0])
  step_grad_and_losses = grad_and_value(weighted, has_aux=True)
  dev_grad = grad(dev_loss)
  example_grads = vmap(
    grad(lambda theta, x, y: losses(theta, x, y)), in_dims=(None, 0, 0))

  def hessian_and_slopes(theta, costate, weights):
    if fused:
      def gradient_and_losses(theta):
        gradient, (_, each) = step_grad_and_losses(theta, weights)
        return gradient, each
      return jvp(gradient_and_losses, (theta,), (costate,))[1]
    slopes = torch.cat([example_grads(theta, x, y) @ costate for x, y in parts])
    return jvp(lambda p: step_grad(p, weights), (theta,), (costate,))[1], slopes

  @torch.no_grad()
  def forward():
    thetas, target_losses = [theta_0], [dev_loss(theta_0)]
    for t in range(num_steps):
      theta = thetas[-1] - LEARNING_RATE * step_grad(thetas[-1], gamma[t])
      thetas.append(theta)
      target_losses.append(dev_loss(theta))
    return thetas, target_losses

  @torch.no_grad()
  def reverse(thetas):
    scores = torch.empty_like(gamma)
    costate = dev_grad(thetas[-1])
    for t in range(num_steps - 1, -1, -1):
      product, slopes = hessian_and_slopes(thetas[t], costate, gamma[t])
      scores[t] = LEARNING_RATE * slopes
      costate = costate - LEARNING_RATE * product
      if t > 0:
        costate = costate + dev_grad(thetas[t])
    return scores

  return forward, reverse


def torch_parts(data, options: dict, sizes: argparse.Namespace) -> dict:
  """As `jax_parts`; `epoch` takes the time of each part as well."""
  import numpy as np
  import torch

  rate = STEP_SIZE / sizes.steps
  num_parts = -(-sizes.examples // EXAMPLES_AT_ONCE)
  forward, reverse = torch_passes(data, sizes.steps, num_parts, options["fused"])
  tiny = torch_passes(_tiny(data, sizes.steps), sizes.steps, num_parts, options["fused"])
  gamma, inputs, theta = (
    torch.tensor(data[name]) for name in ("gamma", "train/inputs", "theta"))
  sampled = np.linspace(0, sizes.steps - 1, min(sizes.sample, sizes.steps)).astype(int)
  count = torch.arange(1, sizes.examples + 1)

  @torch.no_grad()
  def project_sorted(scores):
    rows = gamma + rate * (scores - scores.mean(1, keepdim=True))
    rows -= rows.amax(1, keepdim=True)
    ordered = rows.sort(dim=1, descending=True).values
    tau = (ordered.cumsum(1) - 1) / count
    last = (ordered > tau).sum(1, keepdim=True) - 1
    return (rows - tau.gather(1, last)).clamp_(min=0)

  def project_by_programs(scores):
    import cvxpy

    rows = []
    for t in sampled:
      target = gamma[t].double().numpy() + rate * scores[t].double().numpy()
      x = cvxpy.Variable(len(target))
      cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum_squares(x - target)), [x >= 0, cvxpy.sum(x) == 1]).solve(
          solver=cvxpy.OSQP)
      rows.append(x.value)
    return np.stack(rows)

  def epoch():
    clock = [time.process_time()]
    thetas, _ = forward()
    clock.append(time.process_time())
    scores = reverse(thetas)
    clock.append(time.process_time())
    is_program = options["method"] == "program"
    new = (project_by_programs if is_program else project_sorted)(scores)
    clock.append(time.process_time())
    parts = dict(zip(("forward", "reverse", "projection"), np.diff(clock).tolist()))
    if is_program:
      parts["projection"] *= sizes.steps / len(sampled)
    return {"gamma": new, "scores": scores, "parts": parts,
            "rows": sampled if is_program else None}

  @torch.no_grad()
  def products():
    p = theta
    for _ in range(sizes.steps):
      p = p - 1e-9 * ((inputs @ p) @ inputs)

  return {"epoch": epoch, "products": products, "tiny": lambda: tiny[1](tiny[0]()[0])}


# --- measurement --------------------------------------------------------------------------------


def _calls(fn, repeats: int) -> tuple[list[float], list[float], list, object]:
  """Wall seconds, processor seconds, what each call says of its parts, and the last result."""
  wall, processor, parts = [], [], []
  for _ in range(repeats):
    result = None  # held results would make every call fault in memory of its own
    start, start_cpu = time.perf_counter(), time.process_time()
    result = fn()
    wall.append(time.perf_counter() - start)
    processor.append(time.process_time() - start_cpu)
    parts.append(result.get("parts") if isinstance(result, dict) else None)
  return wall, processor, parts, result


def worker(args: argparse.Namespace) -> None:
  """One row in this process: times, or memory. Prints a JSON line."""
  import numpy as np

  framework, options = ROWS[args.row]
  if framework == "torch":
    import torch

    torch.set_num_threads(args.threads)
    if options["method"] == "program":
      import cvxpy  # noqa: F401  not part of what a call needs
  data = load_data(Path(args.data))
  make = {"jax": jax_parts, "torch": torch_parts}[framework]
  if args.measure == "memory":
    epoch = make(data, options, args)["epoch"]
    epoch()
    before = process_memory.settled_bytes()
    process_memory.restart_peak()
    epoch()
    print(json.dumps({"peak_bytes": process_memory.peak_bytes() - before}))
    return

  is_jax, is_program = framework == "jax", options["method"] == "program"
  parts = make(data, options, args)
  out = {"first_s": _calls(parts["epoch"], 1)[0][0]}
  wall, processor, phases, result = _calls(
    parts["epoch"], args.repeats if is_jax else args.torch_repeats)
  for name in parts.keys() - {"epoch"}:
    parts[name]()
    out[name] = statistics.median(_calls(parts[name], args.repeats if is_jax else 1)[1])
  if is_jax:
    out["reverse"] = out["both"] - out["forward"]
  else:
    out |= {k: statistics.median(p[k] for p in phases) for k in phases[0]}
  if is_program:  # what the rows outside of the sample would have taken
    more = (1 - len(result["rows"]) / args.steps) * out["projection"]
    wall, processor = ([seconds + more for seconds in times] for times in (wall, processor))
    out["first_s"] += more
  out |= {"wall": wall, "processor": processor, "load": os.getloadavg()[0]}
  np.save(args.scores, np.asarray(result["scores"]))

  rows = result["rows"]
  rows = np.arange(args.steps) if rows is None else rows
  scores, new = np.asarray(result["scores"])[rows], np.asarray(result["gamma"], np.float64)
  want = exact_step(data["gamma"][rows], scores, STEP_SIZE / args.steps)
  a_row = lambda found: float(found.sum() / len(rows))  # noqa: E731
  out["errors"] = {
    "rows": len(rows), "largest": float(np.abs(new - want).max()),
    "sum": float(np.abs(new.sum(1) - 1).max()), "negative": a_row(new < 0),
    "zeros": a_row(new == 0), "want_zeros": a_row(want == 0)}
  print(json.dumps(out))


def measure_rows(args: argparse.Namespace) -> tuple[dict, list[str]]:
  """Row name to what was measured, and notes on rows that were left out."""
  import numpy as np

  results, notes, scores = {}, [], {}
  with tempfile.TemporaryDirectory() as directory:
    folder = Path(directory)
    make_data(folder / "data.npz", args)
    sizes = [f"--{name}={getattr(args, name)}" for name in (
      "dim", "examples", "dev", "steps", "sample", "repeats", "threads")]
    for row, (_, options) in ROWS.items():
      if options["method"] == "program" and importlib.util.find_spec("cvxpy") is None:
        notes.append(f"{row}: left out, cvxpy is not installed (`pip install cvxpy`).")
        continue
      results[row] = {}
      for measure in ("memory", "time"):
        command = [
          sys.executable, __file__, *sizes, "--torch-repeats", str(args.torch_repeats),
          "--row", row, "--data", str(folder / "data.npz"), "--measure", measure,
          "--scores", str(folder / "scores.npy")]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[row] |= json.loads(out.splitlines()[-1])
      scores[row] = np.load(folder / "scores.npy")
      print(row, results[row], file=sys.stderr)
    for row, values in scores.items():
      reference = scores[REFERENCE].astype(np.float64)
      results[row]["difference"] = float(
        np.linalg.norm(values - reference) / np.linalg.norm(reference))
  return results, notes


def table(results: dict, notes: list[str], args: argparse.Namespace) -> str:
  import jax
  import torch

  versions = [f"Python {platform.python_version()}", f"jax {jax.__version__}",
              f"torch {torch.__version__}"]
  if "PyTorch, quadratic programs" in results:
    from importlib.metadata import version
    versions += [f"cvxpy {version('cvxpy')}", f"osqp {version('osqp')}"]
  loads = [r["load"] for r in results.values()]
  lines = [
    "# An epoch on a policy against PyTorch", "",
    "Written by `tests/benchmarks/policy_epoch_vs_torch.py`, whose docstring says what is timed.",
    "",
    f"cpu, {args.threads} of {os.cpu_count()} cores, {', '.join(versions)}; load "
    f"{min(loads):.1f} to {max(loads):.1f}. D={args.dim}, N={args.examples}, K={args.dev}, "
    f"T={args.steps}; median of {args.repeats} epochs for JAX, of {args.torch_repeats} for "
    "PyTorch, the fastest in brackets. Parts are processor seconds, which other work on the "
    f"machine does not stretch. Quadratic programs: {min(args.sample, args.steps)} rows "
    f"timed, times {args.steps / min(args.sample, args.steps):g} (extrapolated).",
    "",
    "| row | forward | reverse | projection | epoch, processor s | epoch, wall s | first epoch s | "
    "peak MiB |",
    "|---|---|---|---|---|---|---|---|"]
  for row, r in results.items():
    lines.append(
      f"| {row} | {r['forward']:.3g} | {r['reverse']:.3g} | {r['projection']:.3g} | "
      f"{statistics.median(r['processor']):.3g} | "
      f"{statistics.median(r['wall']):.3g} ({min(r['wall']):.3g}) | {r['first_s']:.3g} | "
      f"{r['peak_bytes'] / 2**20:.0f} |")
  lines += [
    "",
    "New weights against a float64 projection of the same policy and gradient, counts a row of "
    f"{args.examples}, and the gradient against that of \"{REFERENCE}\":", "",
    "| row | largest error | largest error of a row's sum | negative weights | zeros | zeros, "
    "float64 | rows | relative difference of the gradient |",
    "|---|---|---|---|---|---|---|---|"]
  for row, r in results.items():
    e = r["errors"]
    lines.append(
      f"| {row} | {e['largest']:.1e} | {e['sum']:.1e} | {e['negative']:.1f} | {e['zeros']:.1f} | "
      f"{e['want_zeros']:.1f} | {e['rows']} | {r['difference']:.1e} |")
  return "\n".join([*lines, "", *(f"{note}\n" for note in notes), bounds(results, args)])


def bounds(results: dict, args: argparse.Namespace) -> str:
  """What each row spends its time on, from the measured parts."""
  sentences = []
  for row, r in results.items():
    parts = {name: r[name] for name in ("forward", "reverse", "projection")}
    total = sum(parts.values())
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    text = f"{row}: {shares} of the parts' sum; a row's projection takes " \
           f"{1e3 * r['projection'] / args.steps:.2g} ms, a step forward " \
           f"{1e6 * r['forward'] / args.steps:.0f} us and back " \
           f"{1e6 * r['reverse'] / args.steps:.0f} us, the two bare products of a gradient " \
           f"{1e6 * r['products'] / args.steps:.0f} us"
    if "tiny" in r:
      both = r["forward"] + r["reverse"]
      text += f"; with {TINY} examples both passes take {min(r['tiny'] / both, 1):.0%} as long, " \
              "the cost of calls alone"
    sentences.append(text + ".")
  return "What bounds each row. " + " ".join(sentences) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--dim", type=int, default=128)
  parser.add_argument("--examples", type=int, default=4096)
  parser.add_argument("--dev", type=int, default=512)
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--sample", type=int, default=40, help="rows for the quadratic programs")
  parser.add_argument("--repeats", type=int, default=21, help="epochs of JAX")
  parser.add_argument("--torch-repeats", type=int, default=3)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--smoke", action="store_true", help="a small size, in a minute")
  parser.add_argument("--output", type=Path)
  parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
  parser.add_argument("--data", help=argparse.SUPPRESS)
  parser.add_argument("--scores", help=argparse.SUPPRESS)
  parser.add_argument("--measure", choices=("time", "memory"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.smoke:
    small = dict(dim=16, examples=256, dev=64, steps=50, sample=5, repeats=3, torch_repeats=1)
    for name, value in small.items():
      setattr(args, name, value)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])  # also of children
  if args.row is not None:
    if args.measure == "time":
      keep_freed_memory()
    worker(args)
    return
  text = table(*measure_rows(args), args)
  print(text)
  if args.output is not None:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
