"""`lmops learning-law` as a user runs it, at small sizes."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from lmops_jax import cli, control
from lmops_jax.config import gin_files, resolve
from lmops_jax.models.transformer import Transformer
from lmops_jax.sizing import flops
from lmops_jax.systems.learning_law import evaluate, load_policy, report, system
from lmops_jax.systems.learning_law.inner import cost_of
from lmops_jax.training.losses import lm_example_losses

SMALL = [
  "--gin.STEPS=30", "--gin.DIM=4", "--gin.TRAIN_EXAMPLES=24", "--gin.DESIRED_EXAMPLES=60",
  "--gin.EPOCHS=12", "--gin.SEEDS=[0, 1]", "--gin.OTHER_INITS=[100]", "--gin.MESH=None",
]


def lmops(capsys, *arguments):
  code = cli.main([str(a) for a in arguments])
  printed = capsys.readouterr()
  return code, printed.out + printed.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("learning_law") / "run"
  assert cli.main(["learning-law", "--workdir", str(workdir), *SMALL]) == 0
  return workdir, json.loads((workdir / "report" / "summary.json").read_text())


def test_the_summary_is_complete(finished):
  workdir, summary = finished
  assert set(summary["tasks"]) == {"clean", "noisy"}
  for task in summary["tasks"].values():
    assert task["seeds"] == [0, 1]
    assert set(task["policies"]) == {
      "uniform", "projected", "mirror", "frank-wolfe", "loss", "alignment", "curriculum", "rho"}
    for name in ("projected", "mirror", "frank-wolfe"):
      for run, change in zip(task["optimisation"][name], task["policies"][name]["auc_change_dev"]):
        assert run["rising_epochs"] == 0 and run["num_epochs"] == 12 and change < 0
    assert [len(found["projected"]) for found in task["other_inits"]] == [1, 1]
    for laws in task["power_laws"]:
      assert {"L0", "t0", "is_ill_conditioned", "profile", "laws"} == set(laws)
  assert summary["tasks"]["clean"]["policies"]["uniform"]["noise_weight"] == [None, None]
  assert all(w > 0 for w in summary["tasks"]["noisy"]["policies"]["uniform"]["noise_weight"])
  assert {stage["name"].split("/")[0] for stage in summary["stages"]} == {
    "data", "policy", "evaluate"}


@pytest.mark.parametrize("file", ["learning_law/default.gin", "learning_law/transformer.gin"])
def test_an_optimizer_without_derivative_is_refused_before_a_stage(file, capsys, tmp_path):
  code, printed = lmops(
    capsys, "run", file, "--workdir", tmp_path / "run", "--gin.OPTIMIZER=@optim.lion()",
    "--gin.MESH=None")
  assert code == 2 and "the update of learning_law.Training.optimizer (scale_by_lion" in printed
  assert not [path for path in (tmp_path / "run").glob("*") if path.is_dir()]


def test_the_report_is_one_page_with_its_figures(finished):
  workdir, _ = finished
  page = (workdir / "report" / "index.html").read_text()
  assert page.count("data:image/png;base64,") >= 14
  for text in ("Task clean", "Task noisy", "The learning law", "Power laws", "Other init"):
    assert text in page
  names = {path.stem for path in (workdir / "report").glob("*.png")}
  assert {"clean_loss", "clean_auc_dev", "clean_gap", "clean_similarity", "clean_weights",
          "noisy_noise", "noisy_laws"} <= names


def test_running_again_is_free_and_a_changed_step_size_runs_the_policies_again(finished, capsys):
  workdir, _ = finished
  code, printed = lmops(capsys, "learning-law", "--workdir", workdir, *SMALL)
  assert code == 0 and "ran " not in printed.split("stage ")[-1].split("total")[0]
  code, printed = lmops(capsys, "learning-law", "--workdir", workdir, *SMALL,
                        "--gin.MIRROR_STEP_SIZE=100.0", "--gin.STAGES=['policy/clean/mirror']")
  assert code == 0
  reason, = [line for line in printed.splitlines()
             if line.startswith("policy/clean/mirror/seed0: running")]
  assert "optimizer.step_size" in reason


def test_a_saved_policy_is_evaluated_again(finished, tmp_path, capsys):
  workdir, _ = finished
  folder = workdir / "policy" / "noisy" / "projected" / "seed1"
  code, printed = lmops(
    capsys, "learning-law", "evaluate", "--policy", folder, "--workdir", tmp_path / "e",
    "--gin.STEPS=30", "--gin.OTHER_INITS=[5, 6]", "--gin.BATCH_SIZE=8", "--gin.MESH=None")
  assert code == 0, printed
  summary = json.loads((tmp_path / "e" / "report" / "summary.json").read_text())
  task = summary["tasks"]["noisy"]
  assert task["seeds"] == [1] and set(task["optimisation"]) == {"projected"}
  assert [row["init_seed"] for row in task["other_inits"][0]["projected"]] == [5, 6]
  assert [(r["policy"], r["batch_size"]) for r in task["batches"][0]] == [
    ("uniform", 8), ("projected", 8)]
  with (workdir / "evaluate" / "noisy" / "seed1" / "results.json").open() as file:
    before = next(r for r in json.load(file) if r["policy"] == "projected")
  np.testing.assert_allclose(
    task["policies"]["projected"]["auc_test"][0], before["auc_test"], rtol=1e-6)


@pytest.mark.parametrize("arguments, match", [
  (["evaluate"], "POLICY must be given"),
  (["evaluate", "--policy"], "--policy has no value; write --policy VALUE."),
  (["evaluate", "--polici", "x"], "there is no option '--polici'; the nearest valid name is"),
  (["evaluate", "--policy", "nowhere"], "nowhere holds no policy"),
  (["evalute"], "has no action 'evalute'; the nearest valid name is 'evaluate'."),
  (["--gin.SEEDS=[]"], "seeds=[] must be a list of one or more different"),
  (["--gin.TASKS=[]"], "tasks=[] must be a list of one or more"),
  (["--gin.TASKS=[@learning_law.Perceptron(), @learning_law.Perceptron()]"], "taken twice"),
  (["--gin.DESIRED_EXAMPLES=0"], "num_desired=0 must be an integer of at least 1"),
  (["--gin.TRAIN_EXAMPLES=0"], "num_train=0 must be an integer of at least 1"),
  (["--gin.STEPS=0"], "num_steps=0 must be an integer of at least 1"),
  (["--gin.STEP_SIZE=-1.0"], "step_size=-1.0 must be a number of at least 0"),
  (["--gin.optim.sgd.learning_rate=0.0"], "learning_rate"),
  (["--gin.learning_law.Report.fit_from=199"], "leaves fewer than 3 of the 200 steps"),
  (["--gin.learning_law.PolicyOptimizer.frozen_steps=201"], "more than the 200 steps"),
])
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, match):
  code, printed = lmops(capsys, "learning-law", *arguments, "--workdir", tmp_path / "w")
  assert code == 2 and match in printed and printed.count("lmops: error:") == 1
  assert not (tmp_path / "w").exists()


def test_policies_under_other_training_or_steps_are_refused(finished, tmp_path, capsys):
  workdir, _ = finished
  folder = workdir / "policy" / "clean" / "projected" / "seed0"
  arguments = ["learning-law", "evaluate", "--policy", folder, "--workdir", tmp_path / "w",
               "--gin.MESH=None"]
  code, printed = lmops(capsys, *arguments)
  assert code == 2 and "has 30 steps" in printed and "--gin.STEPS=30" in printed
  other = "--gin.optim.sgd.learning_rate=0.2"
  code, printed = lmops(capsys, *arguments, "--gin.STEPS=30", other)
  assert code == 2 and "training.optimizer.learning_rate = 0.1, this run has 0.2" in printed
  with pytest.raises(ValueError, match="weight different examples"):
    system.Evaluation(
      [str(folder), str(workdir / "policy" / "noisy" / "projected" / "seed0")],
      system.Training(30, optax.sgd(0.1)), [], evaluate.Evaluate(), report.Report())


def test_a_diverging_inner_run_names_step_and_epoch(tmp_path, capsys):
  code, printed = lmops(
    capsys, "learning-law", "--workdir", tmp_path / "w", *SMALL, "--gin.SEEDS=[0]",
    "--gin.optim.sgd.learning_rate=1e38")
  assert code == 2
  assert "stage policy/clean/projected/seed0: Training under the policy of epoch 0 diverged" in (
    printed) and "after inner step" in printed


@pytest.mark.slow
def test_one_step_runs_to_the_end(tmp_path, capsys):
  code, printed = lmops(capsys, "learning-law", "--workdir", tmp_path / "w", *SMALL,
                        "--gin.STEPS=1", "--gin.SEEDS=[0]")
  assert code == 0, printed
  summary = json.loads((tmp_path / "w" / "report" / "summary.json").read_text())
  assert summary["tasks"]["clean"]["power_laws"] == [None]  # too few steps for a fit


@pytest.mark.slow
def test_text_runs_to_the_end(tmp_path, capsys):
  rng = np.random.default_rng(0)
  words = "the cat sat on a mat and saw one big red dog run home to its old blue house".split()
  with (tmp_path / "stories.jsonl").open("w") as file:
    for i in range(80):
      text = " ".join(rng.choice(words, size=int(rng.integers(8, 30)))) + f" number {i}."
      file.write(json.dumps({"text": text}) + "\n")
  (tmp_path / "own.gin").write_text(
    "include 'learning_law/transformer.gin'\ninclude 'data/jsonl.gin'\n"
    f"CORPUS_PATH = '{tmp_path}/stories.jsonl'\nVOCAB_SIZE = 300\nLENGTH = 12\nWIDTH = 16\n"
    "HEADS = 2\nLAYERS = 1\nTRAIN_EXAMPLES = 24\nDESIRED_EXAMPLES = 8\nPIECES = 1\nSTEPS = 6\n"
    "EPOCHS = 3\nMESH = None\n")
  code, printed = lmops(capsys, "run", tmp_path / "own.gin", "--workdir", tmp_path / "w")
  assert code == 0, printed
  saved = load_policy(tmp_path / "w" / "policy" / "language" / "projected" / "seed0")
  assert saved.weights.shape == (6, 24) and saved.task.is_noise.sum() == 12
  assert saved.history[-1]["auc_dev"] < saved.history[0]["auc_dev"]


# ----------------------------------------------------------------------------- the paper's settings


def _resolved(name, **bindings):
  return resolve.load([name], [f"{k} = {v!r}" for k, v in bindings.items()])


def test_the_perceptron_of_the_paper():
  job = _resolved("learning_law/perceptron_paper.gin").run()
  task, = job.system.tasks
  assert (task.dim, task.num_train, task.num_desired, task.train_variance, task.shift) == (
    128, 4096, 512, 3.0, 0.5)
  optimizer, = job.system.optimizers
  assert (job.system.training.num_steps, optimizer.num_epochs) == (2000, 500)
  assert optimizer.rate(0, 2000) == pytest.approx(5e-7) and not optimizer.line_search


def test_the_transformer_of_the_paper_is_built_and_costed_abstractly(tmp_path):
  """Shapes, parameters, memory and operations of the published size; nothing is allocated."""
  (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
  (tmp_path / "tokenizer.json").write_text("{}")
  job = _resolved("learning_law/transformer_paper.gin", CORPUS_PATH=str(tmp_path / "x.jsonl"),
                  VOCABULARY_PATH=str(tmp_path / "tokenizer.json")).run()
  task, training = job.system.tasks[0], job.system.training
  optimizer, = job.system.optimizers
  assert (task.num_train, task.num_desired, task.length) == (16384, 512, 64)
  assert task.num_frequent == 5000
  assert (optimizer.num_epochs, optimizer.step_size, optimizer.objective) == (20, 0.4, "mean")
  model = Transformer(dataclasses.replace(task.model, vocab_size=task.num_frequent))
  tokens = jax.ShapeDtypeStruct((task.num_train, 64), np.int32)
  mask = jax.ShapeDtypeStruct((task.num_train, 64), np.float32)
  train = {"tokens": tokens, "targets": tokens, "loss_mask": mask}
  dev = {k: jax.ShapeDtypeStruct((512, 64), v.dtype) for k, v in train.items()}
  params = nn.unbox(jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 64), np.int32))["params"]))
  losses = lm_example_losses(model)

  def epoch(params, train, dev, gamma):
    run = control.controlled_run(
      losses, control.mean_target_loss(losses, dev), training.optimizer, params, train,
      training.num_steps, options=training.options)
    return control.improve_policy(run, gamma, optimizer.rule, 1e-4)

  gamma = jax.ShapeDtypeStruct((4000, 16384), np.float32)
  out = jax.eval_shape(epoch, params, train, dev, gamma)
  assert out.gamma.shape == out.scores.shape == (4000, 16384) and out.gap.shape == (4000,)

  per_example = 64 * flops.forward_flops_per_token(model.config, 64)
  sizes = {"train": 16384, "dev": 512, "select": 512, "test": 512}
  cost = cost_of(training, params, per_example, sizes)
  assert cost.num_params == 1_682_688
  assert cost.policy_bytes == 4 * 4000 * 16384
  whole = cost_of(dataclasses.replace(training, trajectory="all"), params, per_example, sizes)
  np.testing.assert_allclose(whole.trajectory_bytes / 1e9, 26.9, rtol=0.01)  # states of 4 bytes
  assert cost.trajectory_bytes == math.ceil(math.sqrt(8000)) * 4 * 1_682_688
  # The specification: about 6.5 TFLOP a step and 26 PFLOP a forward sweep.
  step = 3 * per_example * 16384
  np.testing.assert_allclose(step / 1e12, 6.5, rtol=0.1)
  np.testing.assert_allclose(whole.run_flops / 1e15, 26, rtol=0.1)
  assert 3 < whole.epoch_flops / whole.run_flops < 5
  assert whole.epoch_flops < cost.epoch_flops < 1.5 * whole.epoch_flops


def test_the_command_lists_its_required_macros(capsys):
  assert gin_files.required(gin_files.find("learning_law/evaluate.gin")) == ["POLICY"]
  code, printed = lmops(capsys, "list")
  assert code == 0 and "learning-law" in printed and "learning_law/evaluate.gin" in printed


@pytest.mark.slow
def test_the_default_run_accelerates_learning_on_every_seed(tmp_path, capsys, full_compile):
  """The small case of the specification, on examples that no policy has seen."""
  with full_compile():
    code, printed = lmops(capsys, "learning-law", "--workdir", tmp_path / "w", "--gin.MESH=None")
  assert code == 0, printed
  summary = json.loads((tmp_path / "w" / "report" / "summary.json").read_text())
  for name, task in summary["tasks"].items():
    for optimizer, courses in task["optimisation"].items():
      policy = task["policies"][optimizer]
      assert all(change <= -0.15 for change in policy["auc_change_test"]), (name, optimizer)
      assert all(ratio > 1.5 for ratio in policy["acceleration_test"]), (name, optimizer)
      assert all(course["rising_epochs"] == 0 for course in courses), (name, optimizer)
      assert all(course["gap"][-1] < 0.1 * course["gap"][0] for course in courses)
  noisy = summary["tasks"]["noisy"]["policies"]
  assert all(weight <= 0.03 for weight in noisy["projected"]["noise_weight"])
  assert all(share >= 0.8 for share in noisy["projected"]["excluded_share_dev"])
