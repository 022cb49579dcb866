"""The loop: the same numbers on every mesh, exact resume, kept parameters, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.control import dynamics
from lmops_jax.mesh import processes
from lmops_jax.mesh.checkpoints import CheckpointStore
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training import optimizers
from lmops_jax.training.learner import supervised
from lmops_jax.training.loop import (
  Evaluate,
  NonFiniteLossError,
  Records,
  load_kept_params,
  train,
)
from lmops_jax.training.losses import lm_example_losses
from lmops_jax.training.metrics import read_records
from lmops_jax.training.sources import Batches

MODEL = Transformer(
  TransformerConfig(
    vocab_size=32, num_layers=2, width=8, num_heads=2, mlp_width=16, max_length=8
  )
)
LM_LOSSES = lm_example_losses(MODEL, chunk=4)
LM_OPTIMIZER = optimizers.adamw(optimizers.warmup_cosine(1e-2, 2, 6))

# A linear model: compiles in no time, which leaves the loop itself under test.
OPTIMIZER = optimizers.sgd(0.05, momentum=0.9)


def _linear_losses(params, batch):
  return jnp.square(batch["x"] @ params["w"] - batch["y"])


def _linear_init(key):
  return {"w": jax.random.normal(key, (3,))}


def _linear_batch(step):
  rng = np.random.default_rng(step)
  x = rng.normal(size=(8, 3)).astype(np.float32)
  return {"x": x, "y": x.sum(1), "example_id": np.arange(8) + 100 * step}


def _train(directory, num_steps, seed, batch_at, init_params, example_losses, optimizer, *,
           accumulate=1, partitioner=None, evaluators=None, initial_params=None, **records):
  learner = supervised(
    init_params, example_losses, optimizer, accumulate=accumulate, partitioner=partitioner,
    check_batch=getattr(example_losses, "check_batch", None))
  hooks = [Evaluate(name, *rest) for name, rest in (evaluators or {}).items()]
  return train(learner, Batches(batch_at), num_steps, seed, directory, partitioner, hooks=hooks,
               records=Records(**records), initial_params=initial_params)


def _linear(directory, num_steps=7, **kwargs):
  return _train(**({
    "init_params": _linear_init, "example_losses": _linear_losses, "optimizer": OPTIMIZER,
    "batch_at": _linear_batch, "num_steps": num_steps, "seed": 3, "directory": directory,
    "log_every": 3, "tensorboard": False,
  } | kwargs))


def _lm_batch(step):
  rows = np.random.default_rng(step).integers(0, 32, (8, 9)).astype(np.int32)
  mask = np.ones((8, 8), np.float32)
  mask[step % 8, 5:] = 0
  return {
    "tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": mask, "example_id": np.arange(8),
  }


def _lm_init(key):
  return MODEL.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _lm(directory, **kwargs):
  return _train(**({
    "init_params": _lm_init, "example_losses": LM_LOSSES, "optimizer": LM_OPTIMIZER,
    "batch_at": _lm_batch, "num_steps": 5, "seed": 0, "directory": directory, "log_every": 2,
    "tensorboard": False, "flops_per_token": 10.0,
  } | kwargs))


def _by_hand():
  """The same run without the loop, the optimizer written out in NumPy."""
  w = np.asarray(_linear_init(jax.random.key(3))["w"], np.float64)
  m, losses, path = np.zeros(3), [], [w]
  for step in range(7):
    batch = _linear_batch(step)
    residual = batch["x"] @ w - batch["y"]
    losses.append(np.mean(residual**2))
    m = 0.9 * m + 2 * batch["x"].T @ residual / 8
    w = w - 0.05 * m
    path.append(w)
  return losses, path


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  return _lm(tmp_path_factory.mktemp("single"))


def test_trains_as_written_out_by_hand(tmp_path):
  losses, path = _by_hand()
  result = _linear(tmp_path, params_at=[0, 4, 7])
  assert result.step == 7
  np.testing.assert_allclose(result.state.params["w"], path[7], rtol=1e-5)
  assert [record["step"] for record in result.history] == [3, 6, 7]
  means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
  np.testing.assert_allclose([record["loss"] for record in result.history], means, rtol=1e-5)
  for step in (0, 4, 7):
    np.testing.assert_allclose(load_kept_params(tmp_path, step)["w"], path[step], rtol=1e-5)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == result.history
  with pytest.raises(FileNotFoundError, match=r"no parameters of step 5, only of \[0, 4, 7\]"):
    load_kept_params(tmp_path, 5)


@pytest.mark.parametrize("sizes,reduction,accumulate", [
  ((8, 1, 1), "auto", 1), ((4, 2, 1), "auto", 1), ((2, 2, 2), "auto", 1), ((4, 2, 1), "step", 2),
  ((2, 2, 2), "step", 1),
])
def test_every_mesh_gives_the_numbers_of_one_device(tmp_path, single, sizes, reduction, accumulate):
  partitioner = MeshConfig(*sizes, reduction=reduction).build()
  result = _lm(tmp_path, partitioner=partitioner, accumulate=accumulate)
  assert len(result.state.params["embedding"].sharding.device_set) == 8
  for got, want in zip(result.history, single.history, strict=True):
    assert got == pytest.approx(want, rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    result.state.params, single.state.params,
  )


def test_accumulation_gives_the_same_run(tmp_path, single):
  result = _lm(tmp_path, accumulate=4)
  for got, want in zip(result.history, single.history, strict=True):
    assert got == pytest.approx(want, rel=1e-5)


def test_tokens_flops_and_rates_are_recorded(single):
  masked = 5 * 3
  assert single.history[-1]["num_tokens"] == 5 * 64 - masked
  assert single.flops == 10.0 * 5 * 64
  assert single.seconds > 0


class _Interrupt(Exception):
  pass


@pytest.mark.parametrize("stop_before", [1, 2, 4, 5, 6])
def test_resume_gives_the_same_bits(tmp_path, stop_before):
  """Stopped between checkpoints, at them, and between records."""
  figures = {"probe": (2, lambda params: {"sum": float(np.sum(params["w"]))})}
  options = {"checkpoint_every": 2, "params_at": (1, 3), "evaluators": figures}
  want = _linear(tmp_path / "whole", **options)

  def interrupted(step):
    if step == stop_before:
      raise _Interrupt
    return _linear_batch(step)

  with pytest.raises(_Interrupt):
    _linear(tmp_path / "cut", batch_at=interrupted, **options)
  resumed_from = []

  def watched(step):
    resumed_from.append(step)
    return _linear_batch(step)

  got = _linear(tmp_path / "cut", batch_at=watched, **options)
  assert resumed_from[1] == (stop_before // 2) * 2 or stop_before < 2
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)
  assert got.history == want.history
  texts = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("cut", "whole")]
  assert texts[0] == texts[1]
  for step in (1, 3):
    np.testing.assert_array_equal(
      load_kept_params(tmp_path / "cut", step)["w"], load_kept_params(tmp_path / "whole", step)["w"]
    )


def test_resume_of_a_model_on_another_mesh_and_of_a_finished_run(tmp_path, single):
  def interrupted(step):
    if step == 4:
      raise _Interrupt
    return _lm_batch(step)

  with pytest.raises(_Interrupt):
    _lm(tmp_path, batch_at=interrupted, checkpoint_every=3)
  result = _lm(tmp_path, partitioner=MeshConfig(2, 2, 2).build())
  for got, want in zip(result.history, single.history, strict=True):
    assert got == pytest.approx(want, rel=1e-5)

  def never(step):
    assert step == 0, "a finished run takes no steps"
    return _lm_batch(step)

  again = _lm(tmp_path, batch_at=never)
  jax.tree.map(np.testing.assert_array_equal, again.state, result.state)
  assert again.history == result.history


@pytest.fixture
def sigterm_saves():
  before = signal.getsignal(signal.SIGTERM)
  processes.handle_sigterm()
  yield
  signal.signal(signal.SIGTERM, before)
  processes._Requests.arrived = False


@pytest.mark.parametrize("at", [1, 3, 6])
def test_sigterm_saves_and_ends_between_steps(tmp_path, sigterm_saves, at):
  """Without periodic checkpoints; the last step is the run's own checkpoint."""
  def terminated(step):
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)
    return _linear_batch(step)

  want = _linear(tmp_path / "whole")
  if at == 6:
    got = _linear(tmp_path / "cut", batch_at=terminated)
  else:
    with pytest.raises(processes.Terminated):
      _linear(tmp_path / "cut", batch_at=terminated)
    assert CheckpointStore(tmp_path / "cut" / "checkpoints").latest_step() == at + 1
    processes._Requests.arrived = False
    got = _linear(tmp_path / "cut")
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)
  assert got.history == want.history


def test_a_truncated_checkpoint_is_dropped_for_the_one_before(tmp_path, capfd):
  want = _linear(tmp_path / "whole", checkpoint_every=2)

  def interrupted(step):
    if step == 5:
      raise _Interrupt
    return _linear_batch(step)

  with pytest.raises(_Interrupt):
    _linear(tmp_path / "cut", batch_at=interrupted, checkpoint_every=2)
  folder = tmp_path / "cut" / "checkpoints" / "4"
  largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
  started = []

  def watched(step):
    started.append(step)
    return _linear_batch(step)

  got = _linear(tmp_path / "cut", batch_at=watched, checkpoint_every=2)
  assert started[1] == 2
  said = capfd.readouterr().err
  assert f"checkpoint {folder} is dropped (its file" in said and "going on from step 2" in said
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)
  assert got.history == want.history


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _flip_in(pattern):
  def flip(folder):
    for path in folder.glob(pattern):
      if path.is_file():
        _flip_a_bit(path)

  return flip


@pytest.mark.parametrize("damage, resumed_at, word", [
  (_flip_in("checkpoints/4/state/d/*"), 2, "checkpoints/4 is dropped (its file state/d/"),
  (_flip_in("checkpoints/*/state/d/*"), 0, "there is none before it"),
  (_flip_in("params/3/d/*"), 2, "parameters of step 3 are not what was written"),
  (_flip_in("params/.3.lmops-seal"), 2, "parameters of step 3 are not what was written"),
  (lambda folder: shutil.rmtree(folder / "params" / "3"), 2, "parameters of step 3"),
  (_flip_in("params/0/d/*"), 0, "parameters of step 0 are not what was written"),
  (_flip_in("metrics.jsonl"), 4, ""),
  (lambda folder: (folder / "metrics.jsonl").write_text('[]\n{"step": "x"}\n5\n'), 4, ""),
  (lambda folder: (folder / "metrics.jsonl").unlink(), 4, ""),
], ids=["state", "all states", "params", "seal", "no params", "first params", "metrics",
        "other metrics", "no metrics"])
def test_what_was_damaged_in_an_unfinished_run_is_not_read(
    tmp_path, capfd, damage, resumed_at, word):
  """One flipped bit at the same size; the continued run is the undisturbed one in all it leaves."""
  options = {"checkpoint_every": 2, "params_at": (0, 3, 7)}
  want = _linear(tmp_path / "whole", **options)
  steps = []

  def interrupted(step):
    if step == 5:
      raise _Interrupt
    return _linear_batch(step)

  def watched(step):
    steps.append(step)
    return _linear_batch(step)

  with pytest.raises(_Interrupt):
    _linear(tmp_path / "cut", batch_at=interrupted, **options)
  damage(tmp_path / "cut")
  got = _linear(tmp_path / "cut", batch_at=watched, **options)
  assert steps[1:][0 if resumed_at else slice(None)] == (resumed_at or [1, 2, 3, 4, 5, 6])
  assert word in capfd.readouterr().err
  np.testing.assert_array_equal(got.state.params["w"], want.state.params["w"])
  assert got.history == want.history
  assert read_records(tmp_path / "cut" / "metrics.jsonl") == want.history
  for step in options["params_at"]:
    kept = [load_kept_params(tmp_path / run, step)["w"] for run in ("cut", "whole")]
    np.testing.assert_array_equal(*kept)


_FULL = """
import resource, sys
sys.path.insert(0, {folder!r})
import jax, test_loop

def init(key):
  return {{"w": jax.random.normal(key, (3,)), "rest": jax.random.normal(key, (100_000,))}}

def batch_at(step):
  if step == 4 and len(sys.argv) > 2:  # as a full disk does, from here on
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
  return test_loop._linear_batch(step)

try:
  test_loop._linear(sys.argv[1], init_params=init, batch_at=batch_at, checkpoint_every=2)
except Exception as error:
  from lmops_jax.host.manifests import is_disk_full
  print("disk full", is_disk_full(error))
"""


def test_a_full_disk_during_a_checkpoint_leaves_the_one_before(tmp_path):
  command = [sys.executable, "-c", _FULL.format(folder=os.path.dirname(__file__)), tmp_path / "run"]
  ended = subprocess.run([*command, "full"], capture_output=True, text=True, check=False)
  assert "disk full True" in ended.stdout, ended
  store = CheckpointStore(tmp_path / "run" / "checkpoints")
  assert store.latest_step() in (2, 4)  # step 4's may still have been under way
  store.close()
  ended = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "disk full" not in ended.stdout
  assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 7


_KILLED = """
import sys
sys.path.insert(0, {folder!r})
import test_loop
test_loop._linear(sys.argv[1], num_steps=400, checkpoint_every=5, params_at=(50, 200))
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(tmp_path):
  want = _linear(tmp_path / "whole", num_steps=400, checkpoint_every=5, params_at=(50, 200))
  program = _KILLED.format(folder=os.path.dirname(__file__))
  kills = 0
  for delay in (0.0, 0.3, 0.7, 1.1, 1.6):
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "cut")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "metrics.jsonl").exists() and time.monotonic() < deadline:
      time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
  got = _linear(tmp_path / "cut", num_steps=400, checkpoint_every=5, params_at=(50, 200))
  assert kills > 0
  np.testing.assert_array_equal(got.state.params["w"], want.state.params["w"])
  assert got.history == want.history
  np.testing.assert_array_equal(
    load_kept_params(tmp_path / "cut", 200)["w"], load_kept_params(tmp_path / "whole", 200)["w"]
  )


def test_evaluators_run_before_during_and_after(tmp_path):
  seen = []

  def probe(params):
    seen.append(np.asarray(params["w"]).copy())
    return {"norm": np.linalg.norm(seen[-1])}

  result = _linear(tmp_path, evaluators={"probe": (4, probe)})
  points = {r["step"]: r["probe/norm"] for r in result.history if "probe/norm" in r}
  assert sorted(points) == [0, 4, 7] and len(seen) == 3
  _, path = _by_hand()
  np.testing.assert_allclose([points[s] for s in (0, 4, 7)],
                             [np.linalg.norm(path[s]) for s in (0, 4, 7)], rtol=1e-5)


def test_initial_params_replace_the_initialiser_and_stay_the_callers(tmp_path):
  start = {"w": jnp.array([1.0, 2.0, 3.0])}
  result = _linear(tmp_path, num_steps=1, initial_params=start, params_at=[0])
  np.testing.assert_array_equal(load_kept_params(tmp_path, 0)["w"], [1, 2, 3])
  np.testing.assert_array_equal(start["w"], [1, 2, 3])  # not donated away
  assert np.abs(np.asarray(result.state.params["w"]) - [1, 2, 3]).max() > 1e-4
  with pytest.raises(ValueError, match=r"initial_params has \(4,\) at \['w'\] .* wants \(3,\)"):
    _linear(tmp_path / "b", initial_params={"w": jnp.zeros(4)})
  with pytest.raises(ValueError, match=r"has nothing at \['w'\]"):
    _linear(tmp_path / "c", initial_params={})


def test_nonfinite_loss_names_step_and_examples(tmp_path):
  def poisoned(step):
    batch = _linear_batch(step)
    if step == 4:
      batch["y"][3] = np.nan
    return batch

  with pytest.raises(
    NonFiniteLossError, match="proxy: step 4 has loss nan .*example_id 400, 401, 402"
  ):
    _linear(tmp_path, batch_at=poisoned, description="proxy", checkpoint_every=5)
  records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in records] == [3]
  # Nothing of the broken state was kept: with the cause gone, the run is the undisturbed one.
  got, want = _linear(tmp_path, checkpoint_every=5), _linear(tmp_path / "whole")
  np.testing.assert_array_equal(got.state.params["w"], want.state.params["w"])


def test_fully_masked_example_ends_the_run_before_its_step(tmp_path):
  def masked(step):
    batch = _lm_batch(step)
    batch["loss_mask"][5] = 0
    return batch

  with pytest.raises(ValueError, match="loss_mask is 0 at every position of example 5"):
    _lm(tmp_path, batch_at=masked)


def test_directory_of_another_run_is_refused(tmp_path):
  _linear(tmp_path)
  with pytest.raises(ValueError, match="holds a run with num_steps=7 and this one has num_steps=9"):
    _linear(tmp_path, num_steps=9)
  with pytest.raises(ValueError, match="holds a run with seed=3 and this one has seed=4"):
    _linear(tmp_path, seed=4)


@pytest.mark.parametrize(
  "options,message",
  [
    ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ({"log_every": 0}, "log_every=0 must be at least 1"),
    ({"accumulate": 0}, "accumulate=0 must be at least 1"),
    ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
    ({"evaluators": {"dev": (0, dict)}}, r"evaluators\['dev'\]=0 must be at least 1"),
    ({"params_at": [8]}, "params_at names step 8, outside the run's 0 to num_steps=7"),
  ],
)
def test_arguments_out_of_range_are_refused(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    _linear(tmp_path, **options)
  assert not list(tmp_path.iterdir())


def test_runs_with_equal_parts_compile_once(tmp_path):
  traces = {"loss": 0, "init": 0}

  def losses(params, batch):
    traces["loss"] += 1
    return _linear_losses(params, batch)

  def init(key):
    traces["init"] += 1
    return _linear_init(key)

  runs = [
    _linear(tmp_path / str(seed), example_losses=losses, init_params=init, seed=seed)
    for seed in (1, 2)
  ]
  assert traces == {"loss": 1, "init": 3}  # the shapes of each run, and one program
  assert np.any(runs[0].state.params["w"] != runs[1].state.params["w"])


def test_tensorboard_files_hold_the_records(tmp_path):
  pytest.importorskip("clu", reason="needs clu")
  pytest.importorskip("tensorboard", reason="needs tensorboard")
  result = _linear(tmp_path, tensorboard=True)
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
  events.Reload()
  from tensorboard.util import tensor_util

  points = [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")]
  assert [step for step, _ in points] == [3, 6, 7]
  np.testing.assert_allclose(
    [float(v) for _, v in points], [r["loss"] for r in result.history], rtol=1e-6
  )


def test_parameters_of_the_state_are_plain_arrays(single):
  fresh = jax.eval_shape(
    lambda key: dynamics.init_state(*LM_OPTIMIZER, nn.unbox(_lm_init(key))), jax.random.key(0))
  assert jax.tree.structure(single.state) == jax.tree.structure(fresh)
