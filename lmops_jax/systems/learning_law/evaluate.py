"""Stage `evaluate`: train under every policy alike, and measure.

All runs of a task and seed share the data, the initialisation, the steps and the optimizer. Besides
the losses, each run records the contributions to the dev and the test loss (the learning law's
statistics), the exact adjoint contributions under its weights, and the weight of spoilt examples.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from lmops_jax import control
from lmops_jax.config.setting_types import Distinct, PositiveInt, Seed, component
from lmops_jax.data import sampling
from lmops_jax.evaluation import contributions, learning_speed
from lmops_jax.host.whole_files import write_json
from lmops_jax.stages import pipeline
from lmops_jax.systems.learning_law import inner as inner_lib
from lmops_jax.systems.learning_law.inner import InnerRun, Training
from lmops_jax.systems.learning_law.policies import Bench
from lmops_jax.systems.learning_law.tasks import Task
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Batches

UNIFORM = "uniform"
RESULTS_FILE, SERIES_FILE = "results.json", "series.npz"
PARTS = ("dev", "select", "test")


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Evaluate:
  """What is measured under each policy.

  Attributes:
    other_inits: seeds of further initialisations under which the uniform and the optimised policies
      are trained too; a policy is made for a single one.
    adjoint: also run the costates back under uniform and optimised weights, for the exact
      contributions and the Frank-Wolfe gap.
    sampled_batch_size: also train, through the training loop, on batches of so many examples drawn
      by each optimised policy and uniformly; None does not.
    sampled_every: steps between two evaluations of these runs.
  """

  other_inits: Annotated[Sequence[Seed], Distinct] = ()
  adjoint: bool = True
  sampled_batch_size: PositiveInt | None = None
  sampled_every: PositiveInt = 20


def run(
  context: pipeline.StageContext, *, config: Evaluate, task: Task, training: Training, seed: int,
  partitioner, optimised: Mapping[str, np.ndarray], practical: Sequence[Any],
) -> None:
  """Writes `results.json`, a record a run, and `series.npz`, their curves.

  Args:
    seed: seed of the initialisation that all policies share.
    optimised: name to weights `[T,N]`.
    practical: settings as in `policies`.
  """
  series: dict[str, np.ndarray] = {}
  records: list[dict[str, Any]] = []
  num_runs = 1 + len(optimised) + len(practical) + len(config.other_inits) * (1 + len(optimised))
  with context.progress(num_runs, "runs") as bar, partitioner.activate():
    inner = training.on(task, seed, partitioner)
    known = {UNIFORM: inner.uniform(), **optimised}
    for name, weights in known.items():
      placed = inner.place_policy(weights)
      records.append(_measured(context, inner, name, seed, placed, config.adjoint, series))
      bar.update()
    for policy in practical:
      choose = policy.choose(_bench(context, inner))
      records.append(_measured(context, inner, policy.name, seed, choose, False, series))
      bar.update()
    for other in config.other_inits:
      inner = training.on(task, other, partitioner)
      for name, weights in known.items():
        placed = inner.place_policy(weights)
        records.append(_measured(context, inner, name, other, placed, False, series))
        bar.update()
  if config.sampled_batch_size is not None:
    for name, weights in known.items():
      records.append(_sampled(context, config, task, training, seed, partitioner, name, weights,
                              series))
  _compare(records, series)
  write_json(context.directory / RESULTS_FILE, records)
  with (context.directory / SERIES_FILE).open("wb") as file:
    np.savez_compressed(file, **series)


def series_key(record: Mapping[str, Any], name: str) -> str:
  """Where a run's series is in `series.npz`."""
  return f"{record['policy']}/{record['kind']}/{record['init_seed']}/{name}"


def _bench(context, inner: InnerRun) -> Bench:
  def train_on_dev():
    task = inner.task
    swapped = dataclasses.replace(
      task, parts={**task.parts, "train": task.parts["dev"]},
      is_noise=np.zeros(len(next(iter(task.parts["dev"].values()))), bool))
    training = dataclasses.replace(inner.training, micro_batch_size=None)
    other = training.on(swapped, inner.init_seed, inner.partitioner)
    context.flops += other.cost.run_flops
    return control.simulate(other.control).params

  return Bench(inner.task, inner.control, inner.padded, train_on_dev)


def _measured(context, inner: InnerRun, name, seed, policy, adjoint, series) -> dict[str, Any]:
  """Trains under a policy and measures; adds the curves to `series`."""
  task = inner.task
  directions = {part: inner.target_losses[part] for part in ("dev", "test")}
  noise = inner.padded(task.is_noise.astype(np.float32))
  observe = jax.tree_util.Partial(_observed, noise, inner.control.mask)
  result = inner_lib.host(control.simulate(
    inner.control, policy, directions=directions, observe=observe))
  context.flops += inner.cost.run_flops + len(directions) * inner.cost.contribution_flops
  losses = {"dev": result.target_losses, **result.monitors}
  inner_lib.check_finite(losses["dev"], f"training under the policy {name!r} (seed {seed})")
  record = {"policy": name, "kind": "weights", "init_seed": seed, "task": task.name}
  seen = result.statistics
  mine = {f"loss_{part}": values for part, values in losses.items()}
  mine |= {"noise_weight": seen["noise_weight"], "num_active": seen["similarity"]["dev"].num_active}
  for part, values in losses.items():
    record[f"auc_{part}"] = learning_speed.loss_auc(values)
    record[f"compression_ratio_{part}"] = learning_speed.compression_ratio(values, task.vocab_size)
    record[f"final_loss_{part}"] = float(values[-1])
  for part in directions:
    mine[f"similarity_{part}"] = contributions.series(seen["similarity"][part])
    mean, left_out = contributions.mean_similarity(seen["similarity"][part])
    record |= {
      f"similarity_{part}": mean, f"similarity_{part}_left_out": left_out,
      f"excluded_share_{part}": contributions.excluded_share(seen["exclusion"][part]),
    }
  record |= {
    "zero_share": 1 - float(np.mean(mine["num_active"])) / task.num_train,
    "noise_weight": float(np.mean(seen["noise_weight"])) if task.is_noise.any() else None,
    "noise_share": float(task.is_noise.mean()),
    "learned_share_below": contributions.learned_share_below(seen["learned"]),
  }
  if adjoint:
    record |= _adjoint(context, inner, result.weights, mine)
  series |= {series_key(record, key): np.asarray(value, np.float32) for key, value in mine.items()}
  return record


def _observed(noise, mask, signals: control.Signals) -> dict[str, Any]:
  """A step's statistics as single numbers: nothing of size T x N is kept."""
  weights = signals.weights
  return {
    "similarity": {part: contributions.similarity(weights, values)
                   for part, values in signals.contributions.items()},
    "exclusion": {part: contributions.exclusion(weights, values, mask)
                  for part, values in signals.contributions.items()},
    "learned": contributions.learned_histogram(weights, signals.losses, mask),
    "noise_weight": weights @ noise,
  }


def _adjoint(context, inner: InnerRun, weights, mine) -> dict[str, Any]:
  """The exact contributions' similarity and the Frank-Wolfe gap, under `[T,rows]` weights."""
  found = control.policy_gradient(inner.control, jax.numpy.asarray(weights))
  context.flops += inner.cost.epoch_flops
  gap, similar = inner_lib.host(_optimality(weights, found.scores, inner.control.mask))
  mine["gap"], mine["adjoint_similarity"] = gap, contributions.series(similar)
  mean, left_out = contributions.mean_similarity(similar)
  return {
    "gap": float(np.mean(gap)), "adjoint_similarity": mean, "adjoint_similarity_left_out": left_out,
  }


@jax.jit
def _optimality(weights, scores, mask):
  similar = jax.vmap(contributions.similarity)(weights, scores)
  return control.stationarity_gap(weights, scores, mask), similar


def _compare(records: list[dict[str, Any]], series: dict[str, np.ndarray]) -> None:
  """Adds to every record how it compares with uniform weights of the same kind and start."""
  base = {(r["kind"], r["init_seed"]): r for r in records if r["policy"] == UNIFORM}
  for record in records:
    other = base[record["kind"], record["init_seed"]]
    for part in PARTS:
      curves = [series[series_key(r, f"loss_{part}")] for r in (other, record)]
      if record["kind"] == "weights":
        record[f"acceleration_{part}"] = learning_speed.acceleration_ratio(*curves)
      record[f"auc_change_{part}"] = record[f"auc_{part}"] / other[f"auc_{part}"] - 1


# ------------------------------------------------------------------------ batches drawn by a policy


def _sampled(
  context, config: Evaluate, task: Task, training: Training, seed: int, partitioner, name: str,
  weights: np.ndarray, series,
) -> dict[str, Any]:
  """Trains on batches drawn by a policy, with the training loop that every system uses."""
  directory = context.directory / f"sampled-{name}"
  inner = training.on(task, seed, partitioner)
  result = loop.train(
    supervised(
      task.boxed_params, task.example_losses, training.optimizer,
      check_batch=task.example_losses.check_batch, partitioner=partitioner),
    Batches(batches_by(weights, task, config.sampled_batch_size, seed)),
    training.num_steps, seed, directory, partitioner,
    hooks=[loop.Evaluate("loss", config.sampled_every, functools.partial(
      inner_lib.losses_at, inner.target_losses))],
    records=loop.Records(
      description=f"{context.name} ({name}, batches)", progress=context.progress,
      tensorboard=False),
  )
  rows = [r for r in result.history if "loss/dev" in r]
  record = {"policy": name, "kind": "batches", "init_seed": seed, "task": task.name,
            "batch_size": config.sampled_batch_size}
  series[series_key(record, "step")] = np.array([r["step"] for r in rows])
  for part in PARTS:
    losses = np.array([r[f"loss/{part}"] for r in rows])
    series[series_key(record, f"loss_{part}")] = losses
    record[f"auc_{part}"] = float(losses[1:].mean())
    record[f"final_loss_{part}"] = float(losses[-1])
  context.flops += task.forward_flops * 3 * config.sampled_batch_size * training.num_steps
  return record


def batches_by(
  weights: np.ndarray, task: Task, batch_size: int, seed: int
) -> Callable[[int], dict[str, np.ndarray]]:
  """`step -> batch` of training examples drawn by the step's weights, for `training.loop`."""
  train = task.parts["train"]

  def batch_at(step: int) -> dict[str, np.ndarray]:
    rows = sampling.draw(weights[min(step, len(weights) - 1)], batch_size, seed, step)
    return {name: value[rows] for name, value in train.items()} | {
      "example_id": rows.astype(np.int64)}

  return batch_at


def load(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
  """Records and series of a finished stage."""
  with np.load(folder / SERIES_FILE, allow_pickle=False) as arrays:
    series = {key: arrays[key] for key in arrays.files}
  return json.loads((folder / RESULTS_FILE).read_text()), series
