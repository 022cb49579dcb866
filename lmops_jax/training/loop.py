"""The training loop: one for every system, which hand it a loss, an optimizer and batches.

Everything that the result depends on is a function of the seed and the step, so a run that was
killed and continues gives the same bits as one that was not. The state is made on the mesh, donated
from step to step, and checkpointed while training goes on. Step n+1 is dispatched before the
metrics of step n are read.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.host import progress as progress_lib
from lmops_jax.host import seals
from lmops_jax.mesh import processes
from lmops_jax.mesh.checkpoints import CheckpointStore, first_says, load_params, save_params
from lmops_jax.mesh.meshes import Partitioner, single_device
from lmops_jax.training.metrics import MetricsLog
from lmops_jax.training.step import make_train_step
from lmops_jax.training.train_state import TrainState, abstract_state, new_state

Evaluators = Mapping[str, tuple[int, Callable[[Any], Mapping[str, float]]]]
_MAX_IDS_SHOWN = 16


class TrainResult(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: after the last step.
    history: records by step: `loss` and `grad_norm` (means since the record before), `num_tokens`
      (since the start, when the loss is masked), and `<evaluator>/<figure>`.
    flops: operations of the whole run, also of attempts before; 0 without `flops_per_token`.
    seconds: of this attempt.
  """

  state: TrainState
  history: list[dict[str, Any]]
  flops: float = 0.0
  seconds: float = 0.0


class NonFiniteLossError(FloatingPointError):
  """A loss or gradient that is infinite or not a number."""


def train(
  *,
  init_params: Callable[[jax.Array], Any],
  example_losses: Callable[[Any, Mapping[str, jax.Array]], jax.Array],
  optimizer: optax.GradientTransformation,
  batch_at: Callable[[int], Mapping[str, np.ndarray]],
  num_steps: int,
  seed: int,
  directory: Path,
  partitioner: Partitioner | None = None,
  checkpoint_every: int | None = None,
  params_at: Sequence[int] = (),
  initial_params=None,
  accumulate: int = 1,
  log_every: int = 10,
  evaluators: Evaluators | None = None,
  flops_per_token: float | None = None,
  description: str = "train",
  progress: Callable | None = None,
  tensorboard: bool = True,
) -> TrainResult:
  """Trains for `num_steps`, continuing from the newest checkpoint in `directory` if there is one.

  Args:
    init_params: `key -> params`, with Linen's boxes where parameters have logical axes.
    example_losses: `(params, batch) -> [B] float32`. Its `check_batch(batch)`, if it has one, sees
      every host batch.
    optimizer: any optax transformation.
    batch_at: `step -> batch` of host arrays, the rows of this process; `example_id [B]` stays on
      the host and names examples in errors.
    num_steps: steps in all, counted from step 0.
    seed: of the initial parameters.
    directory: gets `checkpoints/`, `params/<step>/`, `metrics.jsonl`, `speed.jsonl`,
      `tensorboard/`.
    partitioner: mesh and rules; None is one device.
    checkpoint_every: steps between checkpoints; None writes the last one only, and one when the
      run is asked to stop.
    params_at: steps (0 to num_steps) whose parameters stay in `params/<step>`.
    initial_params: plain tree that replaces the values of `init_params`; it is copied. Or a
      function that returns one, called when a run begins and not when it resumes.
    accumulate: micro-batches a step.
    log_every: steps between records; the last step always makes one.
    evaluators: name to `(every, params -> figures)`, called before the first step, every `every`
      steps and after the last.
    flops_per_token: operations of a training step for each position, for rates and `flops`.
    description: names the run in progress lines and errors.
    progress: makes the progress display from `(total, unit, description, initial=)`; None is
      `lmops_jax.host.progress.Progress`.
    tensorboard: also write event files through clu, which imports TensorFlow.

  Returns:
    The final state and the records.

  Raises:
    ValueError: for arguments out of range, `initial_params` of other shapes, a batch that cannot
      be learned from, or a directory that holds a run with other settings.
    NonFiniteLossError: naming the step and the examples of its batch.
    processes.Terminated: after a checkpoint, where this process or another of the job got SIGTERM.
  """
  evaluators = dict(evaluators or {})
  _check_arguments(num_steps, checkpoint_every, params_at, accumulate, log_every, evaluators)
  directory = Path(directory)
  began = time.monotonic()
  partitioner = partitioner or single_device()
  key = jax.random.key(seed)
  abstract = abstract_state(init_params, optimizer, key)
  uneven = "refuse" if initial_params is None else "whole"
  shardings = partitioner.shardings(abstract, uneven=uneven)
  abstract = nn.unbox(abstract)
  if initial_params is not None and not callable(initial_params):
    _check_initial(initial_params, abstract.params)
  first_batch = batch_at(0)
  settings = {
    "num_steps": num_steps,
    "seed": seed,
    "accumulate": accumulate,
    "log_every": log_every,
    "batch": {name: [np.shape(value)[0] * processes.count(), *np.shape(value)[1:]]
              for name, value in sorted(first_batch.items())},  # of all processes
  }
  positions = _positions(first_batch)
  placed = _hashable(shardings)
  step_fn = compiled_step(example_losses, optimizer, accumulate, partitioner, shardings)
  check_batch = getattr(example_losses, "check_batch", None)
  kept = sorted(set(params_at))

  store = CheckpointStore(directory / "checkpoints", max_to_keep=2)
  try:
    with partitioner.activate(), processes.saving_on_request():
      found = _restore(store, abstract, shardings, settings, directory, kept)
      start, pending, history = None, _Pending(), []
      if found is None:
        if initial_params is None:
          state = _compiled_init(init_params, optimizer, *placed)(key)
        else:
          if callable(initial_params):
            initial_params = initial_params()
            _check_initial(initial_params, abstract.params)
          copy = _compiled_init(_copy_params, optimizer, *placed)
          state = copy(jax.device_put(nn.unbox(initial_params), shardings.params))
          initial_params = None  # free what only this run held
      else:
        start, state, extra = found
        pending, history = _Pending(**extra["pending"]), extra["history"]
      log = MetricsLog(directory, history, tensorboard, resumed=start is not None)

      def boundary(step, state):
        """Everything that happens between steps; on resume it is done already."""
        record = {"step": step}
        last = step == num_steps
        if step > 0 and (step % log_every == 0 or last):
          record |= pending.take()
        for name, (every, evaluate) in evaluators.items():
          if step % every == 0 or last:
            record |= {f"{name}/{k}": float(v) for k, v in evaluate(state.params).items()}
        if len(record) > 1:
          log.write(record)
        if step in kept:
          save_params(_kept(directory, step), state.params)
          if jax.process_index() == 0:
            seals.seal(_kept(directory, step))
        if last or (checkpoint_every and step > 0 and step % checkpoint_every == 0):
          save(step, state)

      def save(step, state):
        store.save(step, state, {
          "settings": settings, "pending": pending._asdict(), "history": list(log.history)})

      bar = _progress(progress, num_steps, description, start or 0)
      speed = _Speed(log, positions, flops_per_token)
      with bar:
        if start is None:
          boundary(0, state)
        in_flight = None

        def settle():
          nonlocal in_flight
          if in_flight is not None:
            step, metrics, ids = in_flight
            in_flight = None
            metrics = jax.device_get(metrics)
            _check_finite(metrics, step, ids, description)
            pending.add(metrics)
            bar.update(1, loss=float(metrics["loss_sum"]) / int(metrics["num_examples"]))

        for step in range(start or 0, num_steps):
          batch = first_batch if step == 0 else batch_at(step)
          if check_batch is not None:
            check_batch(batch)
          state, metrics = step_fn(state, partitioner.place_batch(batch))
          settle()
          in_flight = (step, metrics, batch.get("example_id"))
          done = step + 1
          if _is_boundary(done, num_steps, log_every, checkpoint_every, kept, evaluators):
            settle()
            boundary(done, state)
            if done % log_every == 0 or done == num_steps:
              speed.record(done)
          if processes.stop_requested() and done < num_steps:
            settle()
            if store.latest_step() != done:
              save(done, state)
            store.wait()
            raise processes.Terminated
      log.close()
      store.wait()
  finally:
    store.close()
  flops = float(flops_per_token or 0) * positions * num_steps
  return TrainResult(state, log.history, flops, time.monotonic() - began)


@functools.lru_cache
def initializer(model) -> Callable[[jax.Array], Any]:
  """`key -> parameters` (with their logical axes); one object a model, so that it compiles once."""
  tokens = np.zeros((1, 1), np.int32)
  return lambda key: model.init(key, tokens)["params"]


def load_kept_params(directory: Path, step: int, abstract=None):
  """Parameters that `train(..., params_at=[step])` kept in the same `directory`.

  Args:
    directory: as given to `train`.
    step: one of `params_at`.
    abstract: see `checkpoints.load_params`.

  Raises:
    FileNotFoundError: naming the steps that were kept.
  """
  path = _kept(directory, step)
  if not path.is_dir():
    there = sorted(int(p.name) for p in path.parent.glob("*") if p.name.isdigit())
    raise FileNotFoundError(
      f"{directory} keeps no parameters of step {step}, only of {there}; add it to params_at."
    )
  return load_params(path, abstract)


def _kept(directory: Path, step: int) -> Path:
  return Path(directory) / "params" / str(step)


class _Pending:
  """Sums since the last record, in JSON values so that a checkpoint carries them exactly."""

  def __init__(self, steps=0, loss_sum=0.0, num_examples=0, grad_norm=0.0, num_tokens=None):
    self.steps, self.loss_sum, self.num_examples = steps, loss_sum, num_examples
    self.grad_norm, self.num_tokens = grad_norm, num_tokens

  def _asdict(self):
    return dict(vars(self))

  def add(self, metrics):
    self.steps += 1
    self.loss_sum += float(metrics["loss_sum"])
    self.num_examples += int(metrics["num_examples"])
    self.grad_norm += float(metrics["grad_norm"])
    if "num_tokens" in metrics:
      self.num_tokens = (self.num_tokens or 0) + int(metrics["num_tokens"])

  def take(self):
    record = {"loss": self.loss_sum / self.num_examples, "grad_norm": self.grad_norm / self.steps}
    if self.num_tokens is not None:
      record["num_tokens"] = self.num_tokens
    self.__init__(num_tokens=self.num_tokens)
    return record


class _Speed:
  """Rates between records. The first interval compiles and is left out."""

  def __init__(self, log, positions, flops_per_token):
    self._log, self._positions, self._flops = log, positions, flops_per_token
    self._last = None

  def record(self, step):
    now = time.monotonic()
    if self._last is not None and now > self._last[1]:
      rate = (step - self._last[0]) / (now - self._last[1])
      record = {"step": step, "steps_per_sec": rate}
      if self._positions:
        record["tokens_per_sec"] = rate * self._positions
        if self._flops:
          record["flops_per_sec"] = rate * self._positions * self._flops
      self._log.write_speed(record)
    self._last = (step, now)


def compiled_step(example_losses, optimizer, accumulate, partitioner, shardings):
  """The jitted step that `train` runs, with its states in `shardings`."""
  return _compiled_step(example_losses, optimizer, accumulate, partitioner, *_hashable(shardings))


@functools.lru_cache(maxsize=16)
def _compiled_step(example_losses, optimizer, accumulate, partitioner, leaves, treedef):
  """The jitted step; runs that share loss, optimizer and mesh share what was compiled."""
  shardings = jax.tree.unflatten(treedef, leaves)
  return jax.jit(
    make_train_step(
      example_losses, optimizer, accumulate=accumulate, num_shards=partitioner.num_batch_shards,
      device_rows=partitioner.device_rows),
    out_shardings=(shardings, partitioner.replicated),
    donate_argnums=0,
  )


@functools.lru_cache(maxsize=16)
def _compiled_init(make_params, optimizer, leaves, treedef):
  """Makes a new state in place on its mesh; its values do not depend on the mesh."""
  return jax.jit(
    lambda source: new_state(nn.unbox(make_params(source)), optimizer),
    out_shardings=jax.tree.unflatten(treedef, leaves),
  )


def _copy_params(params):
  # The step donates its state, and the caller keeps what it gave.
  return jax.tree.map(jnp.copy, params)


def _hashable(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return tuple(leaves), treedef


def _restore(store, abstract, shardings, settings, directory, kept):
  wanted = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
  )
  _drop_beyond_lost_params(store, directory, kept)
  found = store.restore_latest(wanted)
  if found is None:
    return None
  _, _, extra = found
  for name, value in settings.items():
    if extra["settings"].get(name) != value:
      raise ValueError(
        f"{directory} holds a run with {name}={extra['settings'].get(name)} and this one has "
        f"{name}={value}; use an empty directory or the old setting."
      )
  return found


def _drop_beyond_lost_params(store, directory, kept):
  """Goes back to before the first step whose kept parameters are not as they were written."""
  newest = store.latest_step()
  if newest is None:
    return
  lost = -1
  if jax.process_index() == 0:
    lost = next((step for step in kept
                 if step <= newest and not seals.is_whole(_kept(directory, step))), -1)
  lost = first_says(lost)
  if lost >= 0:
    store.drop_from(lost, f"the parameters of step {lost} are not what was written")


def _is_boundary(done, num_steps, log_every, checkpoint_every, kept, evaluators):
  periods = [log_every, checkpoint_every, *(every for every, _ in evaluators.values())]
  return done == num_steps or done in kept or any(p and done % p == 0 for p in periods)


def _check_finite(metrics, step, ids, description):
  if not metrics["nonfinite"]:
    return
  if ids is None:
    examples = "without example_id in its batch"
  else:
    ids = [int(i) for i in ids]
    more = f" and {len(ids) - _MAX_IDS_SHOWN} more" if len(ids) > _MAX_IDS_SHOWN else ""
    examples = f"example_id {', '.join(map(str, ids[:_MAX_IDS_SHOWN]))}{more}"
  loss = float(metrics["loss_sum"]) / int(metrics["num_examples"])
  raise NonFiniteLossError(
    f"{description}: step {step} has loss {loss} and gradient norm {float(metrics['grad_norm'])} "
    f"({examples}); lower the learning rate, clip gradients, or look at these examples."
  )


def _positions(batch) -> int:
  """Token positions of the global batch."""
  return int(np.size(batch["tokens"])) * jax.process_count() if "tokens" in batch else 0


def _progress(factory, total, description, initial):
  if factory is None:
    quiet = jax.process_index() > 0
    return progress_lib.Progress(total, "steps", description, initial=initial, quiet=quiet)
  return factory(total, "steps", description, initial=initial)


def _check_arguments(num_steps, checkpoint_every, params_at, accumulate, log_every, evaluators):
  periods = {"num_steps": num_steps, "log_every": log_every, "accumulate": accumulate}
  if checkpoint_every is not None:
    periods["checkpoint_every"] = checkpoint_every
  for name, (every, _) in evaluators.items():
    periods[f"evaluators[{name!r}]"] = every
  for name, value in periods.items():
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  outside = [step for step in params_at if not 0 <= step <= num_steps]
  if outside:
    raise ValueError(
      f"params_at names step {outside[0]}, outside the run's 0 to num_steps={num_steps}."
    )


def _check_initial(params, abstract):
  have, want = (
    {jax.tree_util.keystr(path): np.shape(leaf)
     for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(tree))}
    for tree in (params, jax.tree.map(lambda a: np.broadcast_to(np.zeros(()), a.shape), abstract))
  )
  for name in sorted(have.keys() | want.keys()):
    if have.get(name) != want.get(name):
      raise ValueError(
        f"initial_params has {have.get(name, 'nothing')} at {name} and the model wants "
        f"{want.get(name, 'nothing')}; take them from a model of the same config."
      )
