"""Stage `policy`: the outer loop, which improves a policy epoch by epoch.

arXiv 2402.17759, section 3.1 and the appendix's algorithm: from uniform weights, each epoch trains
under the policy, runs the costate back, and moves and projects all rows at once. Index e of the
history belongs to the policy after e updates, so a run of E epochs has E + 1 records.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax import control
from lmops_jax.config.setting_types import Count, Name, NonNegative, PositiveInt, component
from lmops_jax.data import sampling
from lmops_jax.evaluation import contributions
from lmops_jax.host import seals
from lmops_jax.host.manifests import verify_read
from lmops_jax.host.whole_files import write_arrays, write_json
from lmops_jax.stages import pipeline
from lmops_jax.systems.learning_law.inner import InnerRun, Training
from lmops_jax.systems.learning_law.tasks import Task, load_task

POLICY_FILE, ABOUT_FILE, HISTORY_FILE = "policy.npz", "policy.json", "history.json"
TASK_FOLDER = "task"
_STATE_FILE = "state.npz"
OBJECTIVES, SCHEDULES = ("mean", "sum"), ("linear", "constant")


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class PolicyOptimizer:
  """How a policy is improved.

  Attributes:
    step_size: that of the first epoch, on the objective that `objective` names.
    objective: "mean", the desired loss averaged over the T steps (a step of 0.1 on it is one of
      0.1 / T on the sum), or "sum", the loss summed over them.
    num_epochs: E, the most epochs.
    rule: `@policy.ProjectedGradient()`, `@policy.ExponentiatedGradient()`,
      `@policy.SignGradient()`, whose steps are all of one size, or `@policy.FrankWolfe()`, whose
      step sizes are shares between 0 and 1 of the way to the best vertex, both whatever the
      objective.
    schedule: "linear" decay to 0 after E epochs, or "constant".
    line_search: halve the step until the objective falls enough (Armijo).
    frozen_steps: rows before this step stay uniform.
    patience: stop after so many epochs without a lower loss on `select`; None: never.
    gap_tolerance: stop when the Frank-Wolfe gap, a mean over steps, falls below it; None: never.
    measure_every: epochs between two measurements of the contributions' similarity; None: only at
      both ends.
    checkpoint_every: epochs between two states to resume from.
    name: the policy's name in stages and reports.

  Raises:
    ValueError: for values out of range.
  """

  step_size: NonNegative
  num_epochs: PositiveInt
  objective: Literal[OBJECTIVES] = "mean"
  rule: control.Rule = control.ProjectedGradient()
  schedule: Literal[SCHEDULES] = "linear"
  line_search: bool = False
  frozen_steps: Count = 0
  patience: PositiveInt | None = None
  gap_tolerance: NonNegative | None = None
  measure_every: PositiveInt | None = 20
  checkpoint_every: PositiveInt = 50
  name: Name = "projected"

  def check_steps(self, num_steps: int) -> None:
    """Refuses what does not fit an inner run of T steps."""
    if self.frozen_steps > num_steps:
      raise ValueError(
        f"learning_law.PolicyOptimizer.frozen_steps={self.frozen_steps} is more than the "
        f"{num_steps} steps of the run; lower it."
      )

  def rate(self, epoch: int, num_steps: int) -> float:
    """The step size of an epoch, on the loss summed over steps."""
    share = 1 - epoch / self.num_epochs if self.schedule == "linear" else 1.0
    is_share = isinstance(self.rule, control.FrankWolfe)
    scale = num_steps if self.objective == "mean" and not is_share else 1
    return self.step_size * share / scale


class _State(NamedTuple):
  """What the loop carries; policies are `[T,N]` arrays on the host."""

  epoch: int
  gamma: np.ndarray
  best: np.ndarray
  history: list[dict[str, Any]]


def run(
  context: pipeline.StageContext, *, task: Task, training: Training, optimizer: PolicyOptimizer,
  seed: int, partitioner, described: dict[str, str],
) -> None:
  """Improves a policy and writes it with the task and what it was made with.

  Args:
    seed: seed of the initialisation.
    described: resolved settings of the training and the optimizer, kept beside the policy.

  Raises:
    FloatingPointError: if a run diverged; it names the inner step and the epoch. The last policy
      that trained well is in the stage's folder.
  """
  optimizer.check_steps(training.num_steps)
  inner = training.on(task, seed, partitioner)
  state = _read_state(context, inner)
  cost = inner.cost
  context.log(
    f"{cost.num_params:,} parameters; an epoch takes {cost.epoch_flops:.3g} operations, the "
    f"trajectory {cost.trajectory_bytes / 2**20:,.1f} MiB, the policy "
    f"{cost.policy_bytes / 2**20:,.1f} MiB"
  )
  with partitioner.activate():
    state = _optimise(context, inner, optimizer, state)
  records = state.history
  best = best_epoch(records)
  sampling.write(context.directory / POLICY_FILE, state.best, last=state.gamma)
  task.save(context.directory / TASK_FOLDER)
  write_json(context.directory / HISTORY_FILE, records)
  write_json(context.directory / ABOUT_FILE, {
    "name": optimizer.name, "task": task.name, "data_seed": task.seed, "init_seed": seed,
    "num_steps": training.num_steps, "num_examples": task.num_train, "best_epoch": best,
    "num_epochs": len(records) - 1, "task_fingerprint": task.fingerprint, "settings": described,
  })
  (context.directory / _STATE_FILE).unlink(missing_ok=True)
  first, last = records[0], records[best]
  context.log(
    f"best of {len(records) - 1} epochs is {best}: AUC {first['auc_dev']:.4f} to "
    f"{last['auc_dev']:.4f} on dev, {first['auc_test']:.4f} to {last['auc_test']:.4f} on test"
  )


def best_epoch(records: list[dict[str, Any]]) -> int:
  """The epoch with the least area under the loss on `select`, the first of equals."""
  return min(records, key=lambda record: record["auc_select"])["epoch"]


def _optimise(context, inner: InnerRun, optimizer: PolicyOptimizer, state: _State) -> _State:
  num_steps = inner.training.num_steps
  gamma = inner.place_policy(state.gamma)
  epoch, best, history = state.epoch, state.best, list(state.history)
  with context.progress(optimizer.num_epochs, "epochs", initial=epoch) as bar:
    while len(history) <= epoch:
      is_last = epoch == optimizer.num_epochs or _may_stop(optimizer, history)
      rate = 0.0 if is_last else optimizer.rate(epoch, num_steps)
      step = control.improve_policy(
        inner.control, gamma, optimizer.rule, rate, frozen_steps=optimizer.frozen_steps,
        line_search=optimizer.line_search and not is_last,
      )
      try:
        _check(step, epoch, num_steps)
      except FloatingPointError as error:
        _write_state(context.directory, _State(epoch, inner.policy_of(gamma), best, history))
        raise FloatingPointError(
          f"{error} The best policy so far (epoch {best_epoch(history) if history else 0}) is in "
          f"{context.directory / _STATE_FILE}."
        ) from error
      record = _record(step, epoch, gamma, inner)
      context.flops += inner.cost.epoch_flops
      if is_last or _is_measured(optimizer, epoch):
        record |= _similarities(inner, gamma)
        context.flops += inner.cost.run_flops + 2 * inner.cost.contribution_flops
      history.append(record)
      if best_epoch(history) == epoch:
        best = inner.policy_of(gamma)
      if is_last:
        break
      gamma = step.gamma
      epoch += 1
      bar.update()
      if epoch % optimizer.checkpoint_every == 0:
        _write_state(context.directory, _State(epoch, inner.policy_of(gamma), best, history))
  return _State(epoch, inner.policy_of(gamma), best, history)


def _may_stop(optimizer: PolicyOptimizer, history: list[dict[str, Any]]) -> bool:
  if not history:
    return False
  if optimizer.gap_tolerance is not None and history[-1]["gap"] <= optimizer.gap_tolerance:
    return True
  stalled = history[-1]["epoch"] - best_epoch(history)
  return optimizer.patience is not None and stalled >= optimizer.patience


def _is_measured(optimizer: PolicyOptimizer, epoch: int) -> bool:
  return epoch == 0 or (
    optimizer.measure_every is not None and epoch % optimizer.measure_every == 0)


def _check(step: control.Improvement, epoch: int, num_steps: int) -> None:
  losses = np.asarray(step.target_losses, np.float64)
  bad = np.flatnonzero(~np.isfinite(losses))
  if bad.size:
    raise FloatingPointError(
      f"Training under the policy of epoch {epoch} diverged: the desired loss is "
      f"{losses[bad[0]]} after inner step {bad[0]} of {num_steps}; lower the inner learning rate."
    )
  norms = np.asarray(step.costate_norms)
  bad = np.flatnonzero(~np.isfinite(norms))
  if bad.size:
    raise FloatingPointError(
      f"The costate diverged at inner step {bad[-1] + 1} of {num_steps} in epoch {epoch}; lower "
      "the inner learning rate below 2 / (largest Hessian eigenvalue)."
    )
  control.check_not_all_zero(step.scores, step.target_grad_norms)


def _record(step, epoch: int, gamma, inner: InnerRun) -> dict[str, Any]:
  noise = inner.task.is_noise
  found, num_zeros, noise_weight = _statistics(
    gamma, step.scores, inner.padded(noise.astype(np.float32)))
  num_padded = inner.num_rows - inner.task.num_train
  auc = {part: float(np.mean(np.asarray(losses, np.float64)[1:]))
         for part, losses in (("dev", step.target_losses), *step.monitors.items())}
  return {
    "epoch": epoch,
    **{f"auc_{part}": value for part, value in auc.items()},
    "gap": float(np.mean(np.asarray(step.gap, np.float64))),
    "zero_share": float(np.mean(np.asarray(num_zeros) - num_padded)) / inner.task.num_train,
    "noise_weight": float(noise_weight) if noise.any() else None,
    "adjoint_similarity": contributions.mean_similarity(found)[0],
    "rate": float(step.rate),
  }


@jax.jit
def _statistics(gamma, scores, is_noise):
  similar = jax.vmap(contributions.similarity)(gamma, scores)
  return similar, jnp.sum(gamma == 0, axis=1), jnp.mean(gamma @ is_noise)


def _similarities(inner: InnerRun, gamma) -> dict[str, float | None]:
  """SIM of the contributions to the dev and the test loss."""
  directions = {part: inner.target_losses[part] for part in ("dev", "test")}
  result = control.simulate(
    inner.control, gamma, directions=directions, observe=jax.tree_util.Partial(_similarity))
  return {
    f"similarity_{part}": contributions.mean_similarity(found)[0]
    for part, found in result.statistics.items()
  }


def _similarity(signals: control.Signals):
  return {part: contributions.similarity(signals.weights, values)
          for part, values in signals.contributions.items()}


# ---------------------------------------------------------------------------------------- on disk


def _write_state(folder: Path, state: _State) -> None:
  with seals.replacing(folder / _STATE_FILE) as partial:
    write_arrays(partial, {
      "epoch": state.epoch, "gamma": state.gamma, "best": state.best,
      "history": json.dumps(state.history)})


def _read_state(context, inner: InnerRun) -> _State:
  path = context.directory / _STATE_FILE
  if not seals.is_whole(path):
    if path.exists():
      context.log(f"{path} is not what was written; starting from the first epoch")
    return _State(0, inner.uniform(), inner.uniform(), [])
  with np.load(path, allow_pickle=False) as arrays:
    return _State(int(arrays["epoch"]), arrays["gamma"], arrays["best"],
                  json.loads(str(arrays["history"])))


class SavedPolicy(NamedTuple):
  """A policy with the task that it belongs to.

  Attributes:
    weights: `[T,N]`, the best epoch's. last: those after the last update.
    about: what the policy was made with: `num_steps`, `best_epoch`, `settings` and more.
    history: a record an epoch.
  """

  weights: np.ndarray
  last: np.ndarray
  about: dict[str, Any]
  history: list[dict[str, Any]]
  task: Task

  def fingerprint(self) -> str:
    """What the policy was made with, as text."""
    return json.dumps(self.about, sort_keys=True)


def load_policy(folder: Path | str, task: Task | None = None) -> SavedPolicy:
  """Reads a finished `policy` stage.

  Args:
    task: the policy's task, if at hand; None reads the policy's own copy.

  Raises:
    ValueError: if the folder holds no policy, or one that does not fit its task.
    StageError: if a file is not what the stage wrote.
  """
  folder = Path(folder).expanduser()
  for file in (POLICY_FILE, ABOUT_FILE, HISTORY_FILE):
    if not (folder / file).is_file():
      raise ValueError(
        f"{folder} holds no policy: {file} is missing; give the folder of a stage such as "
        "WORKDIR/policy/clean/projected/seed0."
      )
  verify_read(folder)
  about = json.loads((folder / ABOUT_FILE).read_text())
  task = load_task(folder / TASK_FOLDER) if task is None else task
  weights = sampling.SamplingWeights(str(folder / POLICY_FILE)).weights
  wanted = (about["num_steps"], task.num_train)
  if weights.shape != wanted or about["task_fingerprint"] != task.fingerprint:
    raise ValueError(
      f"the policy in {folder} has shape {weights.shape} and belongs to task "
      f"{about['task_fingerprint']}; expected [T, N] = {wanted} of task {task.fingerprint}."
    )
  with np.load(folder / POLICY_FILE, allow_pickle=False) as arrays:
    last = arrays["last"]
  return SavedPolicy(weights, last, about, json.loads((folder / HISTORY_FILE).read_text()), task)
