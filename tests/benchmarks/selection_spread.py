"""How much of PDS's target test loss is chance: the default run again, with other selection seeds.

  python tests/benchmarks/selection_spread.py --workdir DIR [--selection-seeds 0 1 2 3] \
      [--gin PARAMETER=VALUE ...] [--output FILE.md]

A selection seed decides the proxy's training, the draw of the proxy set and of the target's
instances, the inner batches, the scorer and the selection's noise. The corpus is prepared once, and
the final models of a training seed start from the same parameters. Beside the losses the table has
what two selections have in common (chance gives `RATIO`) and how alike their scores rank the corpus
(Spearman). Seeds that the workdir holds already are not run again.

Another training on the same selection gives another loss too. With several training seeds,
`--gin SEEDS=[0,1,2,3]`, an analysis of variance tells the two apart.

A last training has the first seed's selection with one instance exchanged: what its loss differs by
is no selection's merit, and is how far another processor's rounding could lead.
"""

import argparse
import itertools
import json
import os
import platform
from pathlib import Path

import jax
import numpy as np
from scipy import stats

from lmops_jax import cli
from lmops_jax.config import resolve
from lmops_jax.evaluation import correlation
from lmops_jax.host.manifests import load_manifest
from lmops_jax.mesh import meshes
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import evaluate, prepare, pretrain, scores, select

BINDINGS = ("METHODS=[@pds.PMP()]", "pds.Pretrain.keep_every=None")


def _system(bindings: list[str]):
  return resolve.load(["pds/default.gin"], [*BINDINGS, *bindings]).build()


def run(workdir: Path, seed: int, bindings: list[str]) -> dict:
  """Runs what another selection seed changes; the losses, the seconds, scores and chosen rows."""
  kept, stages = workdir / f"selection{seed}.npz", workdir / "run"
  if not kept.is_file():
    # From `prepare` to `evaluate`.
    names = [stage.name for stage in _system(bindings).stages(None) if stage.name != "report"]
    code = cli.main([
      "run", "pds/default.gin", "--workdir", str(stages),
      *(f"--gin.{binding}" for binding in (
        *BINDINGS, f"SELECTION_SEED={seed}", f"STAGES={names}", *bindings))])
    if code:
      raise SystemExit(code)
    num = len(prepare.Prepared(stages / "prepare").corpus)
    shards = scores.read_shards(stages / "annotate" / "pds", num)
    np.savez(
      kept, losses=_last_losses(stages / "evaluate"),
      seconds=sum(load_manifest(stages / name, name)["seconds"] for name in names[1:-1]),
      scores=np.concatenate([values for _, values in shards]),
      chosen=np.load(stages / "select" / "pds" / select.INDICES_FILE))
  with np.load(kept) as arrays:
    return dict(arrays)


def exchanged(workdir: Path, first: dict, bindings: list[str]) -> float:
  """A loss of seed 0 behind a training with the first instance left out for the last chosen."""
  system = _system(bindings)
  config = system.pretrain
  chosen, partitioner, inputs = first["chosen"], meshes.single_device(), {}
  left_out = np.setdiff1d(np.arange(len(first["scores"])), chosen)[:1]

  def context(name):
    folder = inputs[name] = workdir / "exchanged" / name
    folder.mkdir(parents=True, exist_ok=True)
    return pipeline.StageContext(name, folder, inputs, print)

  inputs["prepare"] = workdir / "run" / "prepare"
  pretrain.run(context("train"), config, partitioner, seed=0,
               indices_of=lambda _: np.union1d(left_out, chosen[:-1]))
  tested = context("evaluate")
  evaluate.run(tested, system.evaluate, config, partitioner, {("pds", 0): "train"})
  return _last_losses(tested.directory)[0]


def _last_losses(evaluated: Path) -> list[float]:
  return [result["curve"][-1][evaluate.TARGET]
          for result in json.loads((evaluated / evaluate.FILE).read_text())]


def deviations(losses: np.ndarray) -> tuple[float, float, float]:
  """Deviations that losses `[G,N]` owe to their training and to their selection.

  Returns:
    The deviation within selections; that of selections beyond it, by one-way analysis of variance
    with random groups; and the upper end of the latter (Williams 1962, 95 %, one-sided).
  """
  num_groups, num = losses.shape
  within = losses.var(axis=1, ddof=1).mean()
  between = num * losses.mean(axis=1).var(ddof=1)
  freedom = num_groups - 1
  least = stats.f.ppf(0.05, freedom, num_groups * (num - 1))
  most = freedom * (between - least * within) / (num * stats.chi2.ppf(0.05, freedom))
  return tuple(np.sqrt(np.maximum([within, (between - within) / num, most], 0)))


def table(runs: dict[int, dict], exchanged_loss: float, bindings: list[str]) -> str:
  """Losses by seed, then what the pairs have in common."""
  seeds, first = _system(bindings).seeds, next(iter(runs))
  losses = np.array([[*one["losses"], one["losses"].mean()] for one in runs.values()])

  def row(name, numbers, seconds=""):
    return f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} | {seconds} |"

  lines = [
    "# Chance in PDS's selection", "",
    f"`gin/pds/default.gin`{''.join(', ' + one for one in bindings)}; target test loss by "
    "selection seed and training seed. "
    f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}.", "",
    f"| selection seed | {' | '.join(f'training seed {seed}' for seed in seeds)} | mean "
    "| seconds behind `prepare` |", "|---:" * (len(seeds) + 3) + "|",
    *(row(seed, numbers, f"{float(one['seconds']):.0f}")
      for (seed, one), numbers in zip(runs.items(), losses, strict=True)),
    row("mean", losses.mean(0)), row("standard deviation", losses.std(0, ddof=1)),
    *_apart(losses[:, :-1]),
    "", f"With one instance of seed {first}'s selection exchanged, training seed 0 reaches "
    f"{exchanged_loss:.3f}.",
    "", "| seeds | selected by both | Spearman of the scores |", "|---|---:|---:|"]
  for (a, one), (b, other) in itertools.combinations(runs.items(), 2):
    share = len(np.intersect1d(one["chosen"], other["chosen"])) / len(one["chosen"])
    rank = correlation.spearman(one["scores"], other["scores"])
    lines.append(f"| {a}, {b} | {share:.1%} | {rank:.3f} |")
  return "\n".join([*lines, ""])


def _apart(losses) -> list[str]:
  if min(losses.shape) < 2:
    return []
  within, between, most = deviations(losses)
  return ["", f"Trainings of one selection deviate by {within:.3f}, selections by {between:.3f} "
          f"beyond that (at most {most:.3f}, 95 %)."]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--selection-seeds", type=int, nargs="+", default=[0, 1, 2, 3])
  parser.add_argument("--gin", nargs="*", default=[], metavar="PARAMETER=VALUE")
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  runs = {seed: run(args.workdir, seed, args.gin) for seed in args.selection_seeds}
  first = runs[args.selection_seeds[0]]
  text = table(runs, exchanged(args.workdir, first, args.gin), args.gin)
  print(text)
  if args.output:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
