"""The outer loop: records, selection, resumption, stopping, and what a saved policy holds."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from lmops_jax import control
from lmops_jax.data.sampling import SamplingWeights
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.stages import pipeline
from lmops_jax.systems.learning_law import load_policy, optimise
from lmops_jax.systems.learning_law.inner import InnerRun, Training
from lmops_jax.systems.learning_law.optimise import PolicyOptimizer

OPTIMIZER = PolicyOptimizer(step_size=0.4, num_epochs=7, measure_every=3, checkpoint_every=2)


def _run(context, task, training, optimizer, device, seed=0):
  optimise.run(context, task=task, training=training, optimizer=optimizer, seed=seed,
               partitioner=device, described={"training.num_steps": "8"})
  return load_policy(context.directory)


@pytest.fixture(scope="module")
def finished(task, training, device, tmp_path_factory):
  folder = tmp_path_factory.mktemp("policy")
  context = pipeline.StageContext("policy", folder, {}, lambda text: None)
  return _run(context, task, training, OPTIMIZER, device), context


def _plain_loop(task, training, num_epochs, step_size):
  """The same in NumPy, float64: gradient by differences of the whole run, projection by sorting."""
  train, dev = task.parts["train"], task.parts["dev"]
  x, y = train["inputs"].astype(np.float64), train["labels"].astype(np.float64)
  start = np.asarray(
    InnerRun(training, task, 0, MeshConfig(data=1).build(jax.devices()[:1])).params["theta"],
    np.float64)

  def auc(gamma, part):
    theta, total = start, 0.0
    for row in gamma:
      chance = 1 / (1 + np.exp(-x @ theta))
      theta = theta - 0.3 * x.T @ (row * (chance - y))
      o = part["inputs"] @ theta
      total += np.mean(np.logaddexp(0, o) - part["labels"] * o)
    return total / len(gamma)

  def project(v):
    u = np.sort(v)[::-1]
    tau = (np.cumsum(u) - 1) / np.arange(1, len(u) + 1)
    return np.maximum(v - tau[np.flatnonzero(u > tau)[-1]], 0)

  gamma = np.full((training.num_steps, task.num_train), 1 / task.num_train)
  areas = [auc(gamma, dev)]
  for epoch in range(num_epochs):
    grad = np.zeros_like(gamma)
    for index in np.ndindex(*gamma.shape):
      step = np.zeros_like(gamma)
      step[index] = 1e-6
      grad[index] = (auc(gamma + step, dev) - auc(gamma - step, dev)) / 2e-6
    gamma = np.stack([project(row) for row in gamma - step_size * (1 - epoch / num_epochs) * grad])
    areas.append(auc(gamma, dev))
  return gamma, areas


def test_the_loop_equals_a_plain_one(finished, task, training):
  saved, _ = finished
  gamma, areas = _plain_loop(task, training, 7, 0.4)
  np.testing.assert_allclose([r["auc_dev"] for r in saved.history], areas, rtol=2e-5)
  np.testing.assert_allclose(saved.last, gamma, atol=2e-4)
  assert areas[-1] < areas[0]


def test_records_and_the_best_epoch(finished, task):
  saved, context = finished
  assert [r["epoch"] for r in saved.history] == list(range(8))
  assert saved.history[-1]["rate"] == 0
  measured = [r["epoch"] for r in saved.history if "similarity_dev" in r]
  assert measured == [0, 3, 6, 7]
  best = int(np.argmin([r["auc_select"] for r in saved.history]))
  assert saved.about["best_epoch"] == best == optimise.best_epoch(saved.history)
  if best == 7:
    np.testing.assert_array_equal(saved.weights, saved.last)
  flipped = saved.weights[:, task.is_noise].sum(axis=1).mean()
  np.testing.assert_allclose(saved.history[best]["noise_weight"], flipped, rtol=1e-5)
  np.testing.assert_allclose(saved.history[best]["zero_share"], np.mean(saved.weights == 0))
  assert saved.weights.dtype == np.float32 and saved.task.fingerprint == task.fingerprint
  assert context.flops > 0 and not (context.directory / "state.npz").exists()


def test_objective_on_the_sum_is_the_mean_times_the_steps(
    task, training, device, context_at, tmp_path, finished):
  summed = dataclasses.replace(OPTIMIZER, objective="sum", step_size=0.4 / training.num_steps)
  got = _run(context_at(tmp_path), task, training, summed, device)
  np.testing.assert_allclose(got.last, finished[0].last, atol=1e-7)
  frank_wolfe = PolicyOptimizer(0.5, 4, rule=control.FrankWolfe())
  assert [frank_wolfe.rate(e, 8) for e in range(4)] == [0.5, 0.375, 0.25, 0.125]


class _Stop(BaseException):
  pass


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_loop_continues_with_the_same_bits(
    task, training, device, context_at, tmp_path, finished, monkeypatch, damaged):
  original, calls = control.improve_policy, []

  def improve(*args, **kwargs):
    calls.append(1)
    if len(calls) == 6:
      raise _Stop
    return original(*args, **kwargs)

  monkeypatch.setattr(optimise.control, "improve_policy", improve)
  context = context_at(tmp_path)
  with pytest.raises(_Stop):
    _run(context, task, training, OPTIMIZER, device)
  assert (tmp_path / "state.npz").is_file() and not (tmp_path / "policy.npz").exists()
  if damaged:
    data = bytearray((tmp_path / "state.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "state.npz").write_bytes(data)
  got = _run(context_at(tmp_path), task, training, OPTIMIZER, device)
  # Epochs 4 to 7 again, from the state after 4; or all of them, from none.
  assert len(calls) == 6 + (8 if damaged else 4)
  np.testing.assert_array_equal(got.weights, finished[0].weights)
  np.testing.assert_array_equal(got.last, finished[0].last)
  assert got.history == finished[0].history


def test_a_mesh_gives_the_same_policy(task, training, context_at, tmp_path, finished):
  mesh = MeshConfig(data=4, fsdp=2).build()  # 18 examples over 8 devices: padded to 24
  optimizer = dataclasses.replace(OPTIMIZER, rule=control.ProjectedGradient("bisect"))
  got = _run(context_at(tmp_path), task, training, optimizer, mesh)
  np.testing.assert_allclose(got.last, finished[0].last, atol=2e-6)
  for a, b in zip(got.history, finished[0].history):
    for key in ("auc_dev", "auc_test", "gap", "zero_share", "noise_weight"):
      np.testing.assert_allclose(a[key], b[key], rtol=2e-4, atol=1e-6)


def test_momentum_and_adam_lower_the_area_too(task, device, context_at, tmp_path):
  for i, optimizer in enumerate((optax.sgd(0.1, momentum=0.9), optax.adamw(0.05, eps_root=1e-8))):
    got = _run(context_at(tmp_path / str(i)), task, Training(8, optimizer), OPTIMIZER, device)
    assert got.history[-1]["auc_dev"] < got.history[0]["auc_dev"]


def test_lion_needs_a_surrogate_and_leaves_out_wrong_labels_with_one(
    task, device, context_at, tmp_path):
  lion = Training(8, optax.lion(0.02))
  with pytest.raises(ValueError, match=r"learning_law.Training.optimizer \(scale_by_lion.* set "
                                       r"learning_law.Training.surrogate='clipped"):
    _run(context_at(tmp_path / "none"), task, lion, OPTIMIZER, device)
  lion = dataclasses.replace(lion, surrogate="clipped_straight_through")
  # The area itself is piecewise constant in the weights, and stays where no sign turns.
  optimizer = dataclasses.replace(OPTIMIZER, step_size=4.0)
  got = _run(context_at(tmp_path / "clipped"), task, lion, optimizer, device)
  assert got.history[-1]["noise_weight"] < 0.5 * got.history[0]["noise_weight"]
  with pytest.raises(ValueError, match="learning_law.Training.surrogate='sign' must be 'clipped"):
    Training(8, optax.lion(0.02), surrogate="sign")


def test_scores_that_are_all_zero_end_the_run(task, device, context_at, tmp_path):
  still = Training(8, optax.sgd(lambda step: 0.0 * step))
  with pytest.raises(ValueError, match="Every score is 0.*is the learning rate 0"):
    _run(context_at(tmp_path), task, still, OPTIMIZER, device)


def test_stopping_early(task, training, device, context_at, tmp_path):
  close = dataclasses.replace(OPTIMIZER, gap_tolerance=1e9)
  got = _run(context_at(tmp_path / "gap"), task, training, close, device)
  assert [r["epoch"] for r in got.history] == [0, 1] and got.history[-1]["rate"] == 0
  worse = dataclasses.replace(OPTIMIZER, patience=2, step_size=400.0, schedule="constant")
  got = _run(context_at(tmp_path / "patience"), task, training, worse, device)
  stalled = got.history[-1]["epoch"] - got.about["best_epoch"]
  assert len(got.history) < 8 and stalled >= 2


def test_frozen_steps_stay_uniform(task, training, device, context_at, tmp_path):
  got = _run(context_at(tmp_path), task, training, dataclasses.replace(OPTIMIZER, frozen_steps=3),
             device)
  assert (got.last[:3] == np.float32(1 / 18)).all() and (got.last[3:] != 1 / 18).any()


def test_divergence_names_step_and_epoch_and_keeps_the_best(task, device, context_at, tmp_path):
  blows_up = Training(8, optax.sgd(lambda step: np.inf))
  with pytest.raises(FloatingPointError, match=r"epoch 0 diverged.* after inner step 1 of 8"):
    _run(context_at(tmp_path), task, blows_up, OPTIMIZER, device)
  assert (tmp_path / "state.npz").is_file()


def test_one_step_and_one_example(device, context_at, tmp_path):
  from lmops_jax.systems.learning_law import Perceptron

  single = Perceptron(dim=3, num_train=1, num_desired=5, num_select=2).make(0)
  got = _run(context_at(tmp_path), single, Training(1, optax.sgd(0.1)), OPTIMIZER, device)
  np.testing.assert_array_equal(got.weights, [[1.0]])
  assert got.history[0]["gap"] == 0


@pytest.mark.parametrize("kwargs, match", [
  ({"step_size": -1.0}, "step_size=-1.0"), ({"step_size": float("nan")}, "step_size=nan"),
  ({"num_epochs": 0}, "num_epochs=0"), ({"objective": "max"}, "objective='max' must be 'mean' or"),
  ({"schedule": "cosine"}, "schedule='cosine'"), ({"frozen_steps": -1}, "frozen_steps=-1"),
  ({"rule": "sgd"}, "rule='sgd' must be a component such as @policy.Exp"),
  ({"patience": 0}, "patience=0"),
])
def test_settings_are_checked(kwargs, match):
  with pytest.raises(ValueError, match=match):
    PolicyOptimizer(**{"step_size": 1.0, "num_epochs": 2} | kwargs)


def test_more_frozen_steps_than_steps_are_refused(task, training, device, context_at, tmp_path):
  with pytest.raises(ValueError, match="frozen_steps=9 is more than the 8 steps"):
    _run(context_at(tmp_path), task, training, dataclasses.replace(OPTIMIZER, frozen_steps=9),
         device)
  with pytest.raises(ValueError, match="num_steps=0"):
    Training(0, optax.sgd(0.1))


def test_damaged_policies_are_refused(finished, tmp_path):
  _, context = finished
  with pytest.raises(ValueError, match="holds no policy: policy.npz is missing"):
    load_policy(tmp_path)
  folder = tmp_path / "copy"
  shutil.copytree(context.directory, folder)
  about = json.loads((folder / "policy.json").read_text())
  (folder / "policy.json").write_text(json.dumps(about | {"num_steps": 9}))
  with pytest.raises(ValueError, match=r"has shape \(8, 18\).*expected \[T, N\] = \(9, 18\)"):
    load_policy(folder)
  (folder / "policy.json").write_text(json.dumps(about))
  with np.load(folder / "policy.npz") as arrays:
    weights, last = arrays["weights"].copy(), arrays["last"]
  weights[4, 0] += 0.5
  with (folder / "policy.npz").open("wb") as file:
    np.savez(file, weights=weights, last=last)
  with pytest.raises(ValueError, match="the weights of step 4 in .* are not on the simplex"):
    load_policy(folder)


def test_a_policy_of_a_finished_stage_is_read_as_the_stage_wrote_it(finished, tmp_path):
  def stage(context):
    shutil.copytree(finished[1].directory, context.directory, dirs_exist_ok=True)

  pipeline.run_stages([pipeline.Stage("policy", stage)], tmp_path, system="toy")
  folder = tmp_path / "policy"
  np.testing.assert_array_equal(load_policy(folder).weights, finished[0].weights)
  for name, read in (("history.json", lambda: load_policy(folder)),
                     ("policy.npz", lambda: SamplingWeights(str(folder / "policy.npz")).weights)):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(pipeline.StageError, match=f"{name}, an output of stage 'policy', is corr"):
      read()
