"""The training loop of every system: it takes a learner and a source of batches.

Everything that the result depends on is a function of the seed and the step, so a run that was
killed and continues gives the same bits as one that was not. The state is made on the mesh, donated
from step to step, and checkpointed while training goes on. Step n+1 is dispatched before the
figures of step n are read, unless the source needs the parameters.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.host import progress as progress_lib
from lmops_jax.host import seals
from lmops_jax.mesh import processes
from lmops_jax.mesh.checkpoints import CheckpointStore, first_says, load_params, save_params
from lmops_jax.mesh.meshes import Partitioner, single_device
from lmops_jax.training import records as records_lib
from lmops_jax.training.learner import Learner
from lmops_jax.training.metrics import MetricsLog, Rates, Sums
from lmops_jax.training.records import Evaluate, Records
from lmops_jax.training.sources import Source

_MAX_IDS_SHOWN = 16


class TrainResult(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: the learner's, after the last step.
    history: records by step: `loss` and `grad_norm` (means since the record before), `num_tokens`
      (since the start, if the loss is masked), and `<evaluator>/<figure>`; see `Learner.step`.
    flops: operations of the whole run, earlier attempts included; 0 without `flops_per_token`.
    seconds: duration of this attempt.
    step: number of steps done.
  """

  state: Any
  history: list[dict[str, Any]]
  flops: float
  seconds: float
  step: int


class NonFiniteLossError(FloatingPointError):
  """A loss or gradient that is infinite or not a number."""


def train(
  learner: Learner, source: Source, num_steps: int, seed: int, directory: Path,
  partitioner: Partitioner | None = None, *, hooks: Sequence[Evaluate] = (),
  records: Records = Records(), initial_params=None,  # noqa: B008 (frozen)
) -> TrainResult:
  """Trains for `num_steps`, continuing from the newest checkpoint in `directory` if there is one.

  Args:
    learner: made for the same `partitioner`.
    source: makes the batches. `example_id [B]` stays on the host and names examples in errors.
    num_steps: steps in all, counted from step 0.
    seed: seed of the initial state and of the steps' keys.
    directory: gets `checkpoints/`, `params/<step>/`, `metrics.jsonl`, `speed.jsonl`,
      `tensorboard/`.
    partitioner: mesh and rules; None is one device.
    hooks: called between steps.
    records: what is shown, recorded and kept.
    initial_params: a plain tree that replaces the learner's initial values; it is copied. Or a
      function that returns one, called when a run begins and not when it resumes.

  Returns:
    The final state and the records.

  Raises:
    ValueError: for arguments out of range, `initial_params` of other shapes, a batch that cannot
      be learned from, or a directory that holds a run with other settings.
    NonFiniteLossError: if a loss or gradient is not finite; it names the step and the examples of
      its batch.
    processes.Terminated: after a checkpoint, if this process or another of the job got SIGTERM.
  """
  records_lib.check(num_steps, hooks, records)
  directory, began = Path(directory), time.monotonic()
  partitioner = partitioner or single_device()
  abstract = abstract_state(learner)
  uneven = "refuse" if initial_params is None else "whole"
  shardings = partitioner.shardings(abstract, uneven=uneven)
  abstract = nn.unbox(abstract)
  if initial_params is not None and not callable(initial_params):
    _check_initial(initial_params, learner.params(abstract))
  first_batch = None if source.reads_params else source.batch(0)
  store = CheckpointStore(directory / "checkpoints", max_to_keep=2)
  try:
    with partitioner.activate(), processes.saving_on_request():
      _drop_beyond_lost_params(store, directory, sorted(set(records.params_at)))
      found = store.restore_latest(jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings))
      if found is None:
        state = _first_state(learner, seed, initial_params, abstract, shardings)
      else:
        state = found[1]
      done = 0 if found is None else found[0]
      if first_batch is None and done < num_steps:
        first_batch = source.batch(done, learner.params(state))
      settings = {
        "num_steps": num_steps, "seed": seed, **learner.settings, "log_every": records.log_every,
        "batch": found[2]["settings"]["batch"] if first_batch is None else _shapes(first_batch),
      }
      resumed = None if found is None else _checked(found[2], settings, directory)
      run = _Run(
        learner, source, num_steps, seed, directory, partitioner, hooks, records, store, settings,
        step_fn=compiled_step(learner, partitioner, shardings), state=state,
        done=done, resumed=resumed, num_positions=_num_positions(settings["batch"]))
      first_step = done if source.reads_params else 0
      with run.bar:
        if resumed is None:
          run.between_steps()
        while run.done < num_steps:
          run.take_step(first_batch if run.done == first_step else None)
          if run.is_boundary():
            run.between_steps()
            run.note_speed()
          if processes.stop_requested() and run.done < num_steps:
            run.stop()
      run.log.close()
      store.wait()
  finally:
    store.close()
  flops = float(records.flops_per_token or 0) * run.num_positions * num_steps
  return TrainResult(run.state, run.log.history, flops, time.monotonic() - began, run.done)


class _Run:
  """A run under way: its state, the step in flight, and its records."""

  def __init__(self, learner, source, num_steps, seed, directory, partitioner, hooks, records,
               store, settings, *, step_fn, state, done, resumed, num_positions):
    self._learner, self._source, self._num_steps = learner, source, num_steps
    self._directory, self._partitioner, self._hooks = directory, partitioner, hooks
    self._records, self._store, self._settings = records, store, settings
    self._step_fn, self._key, self._in_flight = step_fn, jax.random.key(seed), None
    self.state, self.done, self.num_positions = state, done, num_positions
    extra = {"pending": {}, "history": []} if resumed is None else resumed
    self._pending = Sums(**extra["pending"])
    self.log = MetricsLog(
      directory, extra["history"], records.tensorboard, resumed=resumed is not None)
    self._rates = Rates(self.log, num_positions, records.flops_per_token)
    self.bar = _progress(records.progress, num_steps, records.description, done)

  def take_step(self, batch) -> None:
    """Dispatches the next step, on `batch` if it is there already, and reads the one before."""
    if batch is None and self._source.reads_params:
      self._settle()  # parameters that are not finite make no batch
      batch = self._source.batch(self.done, self._learner.params(self.state))
    elif batch is None:
      batch = self._source.batch(self.done)
    self._learner.check(batch)
    self.state, sums = self._step_fn(
      self.state, self._partitioner.place_batch(batch), self._key, np.int32(self.done))
    self._settle()
    self._in_flight = self.done, sums, batch.get("example_id")
    self.done += 1

  def is_boundary(self) -> bool:
    """Whether something is to be recorded or kept after the last step that was dispatched."""
    periods = [self._records.log_every, self._records.checkpoint_every,
               *(hook.every for hook in self._hooks)]
    return (self.done == self._num_steps or self.done in self._records.params_at
            or any(p and self.done % p == 0 for p in periods))

  def between_steps(self) -> None:
    """Records and keeps what is due; not called right after a resume, when that is done already."""
    self._settle()
    record = {"step": self.done}
    if self.done > 0 and self._is_due(self._records.log_every):
      record |= self._pending.take()
    params = self._learner.params(self.state)
    for name, every, figures in self._hooks:
      if self._is_due(every):
        record |= {f"{name}/{k}": float(v) for k, v in figures(params).items()}
    if len(record) > 1:
      self.log.write(record)
    if self.done in self._records.params_at:
      kept = _kept(self._directory, self.done)
      save_params(kept, params)
      if jax.process_index() == 0:
        seals.seal(kept)
    every = self._records.checkpoint_every
    if self.done == self._num_steps or (every and self.done > 0 and self.done % every == 0):
      self._save()

  def note_speed(self) -> None:
    """Records the rates since the record before."""
    if self._is_due(self._records.log_every):
      self._rates.record(self.done)

  def stop(self) -> None:
    """Ends the run after writing a checkpoint to go on from."""
    self._settle()
    if self._store.latest_step() != self.done:
      self._save()
    self._store.wait()
    raise processes.Terminated

  def _is_due(self, every: int) -> bool:
    return self.done % every == 0 or self.done == self._num_steps

  def _save(self) -> None:
    self._store.save(self.done, self.state, {
      "settings": self._settings, "pending": self._pending.as_json(),
      "history": list(self.log.history)})

  def _settle(self) -> None:
    """Reads the sums of the step in flight."""
    if self._in_flight is None:
      return
    step, sums, ids = self._in_flight
    self._in_flight = None
    sums = jax.device_get(sums)
    _check_finite(sums, step, ids, self._records.description)
    self._pending.add(sums)
    self.bar.update(1, loss=float(sums["loss_sum"]) / int(sums["num_examples"]))


def abstract_state(learner: Learner):
  """Shapes of a learner's state, with Linen's boxes around arrays that have logical axes."""
  return jax.eval_shape(lambda key: learner.init(key), jax.random.key(0))


def compiled_step(learner: Learner, partitioner: Partitioner, shardings) -> Callable:
  """`(state, batch, key of the run, step [] int32) -> (state, sums)` as `train` runs it, jitted.

  Args:
    learner: its `step` is traced.
    partitioner: the partitioner that it runs on.
    shardings: the state's.
  """
  return _compiled_step(learner.step, partitioner, *_hashable(shardings))


@functools.lru_cache(maxsize=16)
def _compiled_step(learn, partitioner, leaves, treedef):
  """The jitted step; runs that share a learner's step and the mesh share the compiled program."""
  def step_fn(state, batch, key, step):
    return learn(state, batch, jax.random.fold_in(key, step))

  return jax.jit(
    step_fn, donate_argnums=0,
    out_shardings=(jax.tree.unflatten(treedef, leaves), partitioner.replicated))


def _first_state(learner, seed, initial_params, abstract, shardings):
  """The state before step 0, made in place on its mesh; its values do not depend on the mesh."""
  make, key = _compiled_init(learner.init, *_hashable(shardings)), jax.random.key(seed)
  if initial_params is None:
    return make(key, None)
  if callable(initial_params):
    initial_params = initial_params()
    _check_initial(initial_params, learner.params(abstract))
  return make(key, jax.device_put(nn.unbox(initial_params), learner.params(shardings)))


@functools.lru_cache(maxsize=16)
def _compiled_init(init, leaves, treedef):
  def make(key, params):
    # Copied, because the step donates its state, and the caller keeps the given arrays.
    return nn.unbox(init(key, jax.tree.map(jnp.copy, params)))

  return jax.jit(make, out_shardings=jax.tree.unflatten(treedef, leaves))


@functools.lru_cache
def initializer(model) -> Callable[[jax.Array], Any]:
  """`key -> parameters` (with their logical axes); one object a model, so that it compiles once."""
  tokens = np.zeros((1, 1), np.int32)
  return lambda key: model.init(key, tokens)["params"]


def load_kept_params(directory: Path, step: int, abstract=None):
  """Parameters that `train` kept in the same `directory`.

  Args:
    directory: as given to `train`.
    step: one of `Records.params_at`.
    abstract: see `checkpoints.load_params`.

  Raises:
    FileNotFoundError: if that step was not kept; it names the steps that were.
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


def _hashable(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return tuple(leaves), treedef


def _checked(extra, settings, directory):
  """A checkpoint's content besides the state; refuses one of a run with other settings."""
  for name, value in settings.items():
    if extra["settings"].get(name) != value:
      raise ValueError(
        f"{directory} holds a run with {name}={extra['settings'].get(name)} and this one has "
        f"{name}={value}; use an empty directory or the old setting."
      )
  return extra


def _drop_beyond_lost_params(store, directory, kept):
  """Drops checkpoints from a step on: the first whose kept parameters are not as they were written.
  """
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


def _check_finite(sums, step, ids, description):
  if not sums["nonfinite"]:
    return
  if ids is None:
    examples = "without example_id in its batch"
  else:
    ids = [int(i) for i in ids]
    more = f" and {len(ids) - _MAX_IDS_SHOWN} more" if len(ids) > _MAX_IDS_SHOWN else ""
    examples = f"example_id {', '.join(map(str, ids[:_MAX_IDS_SHOWN]))}{more}"
  loss = float(sums["loss_sum"]) / int(sums["num_examples"])
  raise NonFiniteLossError(
    f"{description}: step {step} has loss {loss} and gradient norm {float(sums['grad_norm'])} "
    f"({examples}); lower the learning rate, clip gradients, or look at these examples."
  )


def _shapes(batch) -> dict[str, list[int]]:
  """Shapes of the arrays that all processes have together."""
  return {name: [np.shape(value)[0] * processes.count(), *np.shape(value)[1:]]
          for name, value in sorted(batch.items())}


def _num_positions(shapes) -> int:
  """Token positions of the global batch."""
  return math.prod(shapes["tokens"]) if "tokens" in shapes else 0


def _progress(factory, total, description, initial):
  if factory is None:
    quiet = jax.process_index() > 0
    return progress_lib.Progress(total, "steps", description, initial=initial, quiet=quiet)
  return factory(total, "steps", description, initial=initial)


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
