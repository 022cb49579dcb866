"""The whole of PDS on a small part of the installed text, as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.data import load_vocabulary
from tests import several_processes

STAGES = [
  "prepare", "proxy", "solve/pds", "scorer/pds", "annotate/pds", "select/pds", "pretrain/pds/seed0",
  "pretrain/pds/seed1", "annotate/random", "select/random", "pretrain/random/seed0",
  "pretrain/random/seed1", "evaluate", "report",
]


def lmops(*arguments, num_devices=1):
  """Runs the command; returns its exit code and all that it printed."""
  done = subprocess.run(
    [sys.executable, "-m", "lmops_jax.cli", *map(str, arguments)], text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    env=several_processes.environment(num_devices),
  )
  return done.returncode, done.stdout


def smoke(workdir, *bindings, **kwargs):
  return lmops("run", "pds/smoke.gin", "--workdir", workdir, *bindings, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("smoke") / "run"
  code, printed = smoke(workdir)
  assert code == 0, printed
  return workdir, printed


def _outcome(workdir):
  """What must not depend on interruptions: selections, curves, scores."""
  selections = {
    name: np.load(workdir / "select" / name / "ids.npy").tolist() for name in ("pds", "random")
  }
  curves = json.loads((workdir / "evaluate" / "evaluations.json").read_text())
  with np.load(workdir / "solve" / "pds" / "proxy_scores.npz") as arrays:
    return selections, curves, arrays["scores"].tolist()


def test_every_stage_finishes_and_the_summary_is_complete(finished):
  workdir, printed = finished
  summary = json.loads((workdir / "report" / "summary.json").read_text())
  assert [stage["name"] for stage in summary["stages"]] == STAGES[:-1]
  for stage in summary["stages"]:
    assert stage["seconds"] > 0 and stage["flops"] >= 0
  for result in summary["methods"].values():
    assert result["seeds"] == [0, 1] and len(result["target_test_loss"]) == 2
  assert summary["methods"]["random"]["steps_to_match_random"] == [20.0, 20.0]
  num = summary["num_instances"]
  assert summary["num_selected"] == {"pds": int(0.4 * num), "random": int(0.4 * num)}
  for shares in [summary["corpus_share_by_kind"], *summary["selected_share_by_kind"].values()]:
    assert abs(sum(shares.values()) - 1) < 1e-9 and len(shares) >= 4
  assert -1 <= summary["scorer"]["validation_spearman"] <= 1
  assert str(workdir / "report" / "index.html") in printed
  page = (workdir / "report" / "index.html").read_text()
  assert "http://" not in page.split("<main")[0] and "data:image/png;base64," in page


@pytest.mark.parity
def test_the_trained_model_is_exported_for_transformers(finished, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  workdir, _ = finished
  stage = workdir / "pretrain" / "pds" / "seed0"
  code, printed = lmops("export", "--checkpoint", stage, "--to", tmp_path / "out")
  assert code == 0, printed
  vocabulary = load_vocabulary(workdir / "prepare" / "vocabulary")
  text = "The class of an object, and its type.\n"
  ids = [vocabulary.bos_id, *vocabulary.encode(text)]
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert theirs(text)["input_ids"] == ids
  source = pretrained.load(stage)
  ours = source.model.apply(
    {"params": source.params()}, np.asarray([ids], np.int32), method="logits"
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  with torch.no_grad():
    wanted = np.asarray(model(torch.tensor([ids])).logits)
  np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_a_finished_run_is_free_and_a_changed_binding_says_why(finished):
  workdir, _ = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("manifest.json")}
  code, printed = smoke(workdir)
  assert code == 0 and "running" not in printed
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("manifest.json")} == before
  code, printed = smoke(workdir, "--gin.RATIO=0.5", '--gin.STAGES=["select/pds"]')
  assert code == 0
  assert "select/pds: running" in printed and "0.4 -> 0.5" in printed
  assert "prepare: running" not in printed
  code, printed = smoke(workdir, '--gin.STAGES=["select/pds"]')
  assert code == 0 and "0.5 -> 0.4" in printed


@pytest.mark.slow
def test_labels_and_test_part_are_opened_by_nothing_before_the_end(tmp_path):
  program = (
    "import sys\n"
    "from lmops_jax import cli\n"
    "from lmops_jax.systems.pds import prepare\n"
    "def refuse(self): raise AssertionError('opened too early')\n"
    "prepare.Prepared.labels = refuse\n"
    "prepare.Prepared.target_test = property(refuse)\n"
    "sys.exit(cli.main(['run', 'pds/smoke.gin', '--workdir', sys.argv[1], '--gin.SEEDS=[0]',\n"
    "  '--gin.STAGES=[' + ','.join(map(repr, sys.argv[2:])) + ']']))\n"
  )
  stages = ["prepare", "proxy", "solve", "scorer", "annotate", "select", "pretrain"]

  def run(*names):
    return subprocess.run(
      [sys.executable, "-c", program, str(tmp_path / "run"), *names], text=True,
      env=several_processes.environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      check=False,
    )

  done = run(*stages)
  assert done.returncode == 0, done.stdout
  assert "opened too early" in run("evaluate").stdout


def test_damaged_output_is_named(finished, tmp_path):
  workdir, _ = finished
  file = workdir / "select" / "pds" / "ids.npy"
  original = file.read_bytes()
  try:
    file.write_bytes(original[:-8])
    code, printed = smoke(
      workdir, '--gin.STAGES=["pretrain/pds/seed0"]', "--gin.TRAIN_STEPS=10"
    )
    assert code == 2 and "select/pds" in printed and "ids.npy" in printed
  finally:
    file.write_bytes(original)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [
  "prepare", "proxy", "solve/pds", "scorer/pds", "annotate/pds", "select/pds", "pretrain/pds/seed0",
  "evaluate"])  # one of each kind
def test_killed_at_a_random_moment_it_ends_the_same(finished, tmp_path, stage):
  undisturbed, _ = finished
  workdir = tmp_path / "run"
  # As a run leaves the folder that comes to this stage, or to the first of the quick ones.
  first = min(STAGES.index(stage), STAGES.index("select/pds"))
  shutil.copytree(undisturbed, workdir)
  for missing in STAGES[first:]:
    shutil.rmtree(workdir / missing)
  rng = np.random.default_rng(STAGES.index(stage))
  command = [sys.executable, "-m", "lmops_jax.cli", "run", "pds/smoke.gin", "--workdir", workdir]
  manifest = json.loads((undisturbed / stage / "manifest.json").read_text())
  process = subprocess.Popen(
    command, env=several_processes.environment(1), stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL, start_new_session=True,
  )
  partial = workdir / f"{stage}.partial"
  while not partial.exists() and process.poll() is None:
    time.sleep(0.002)
  time.sleep(rng.uniform(0, manifest["seconds"]))
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  code, printed = smoke(workdir)
  assert code == 0, printed
  assert _outcome(workdir) == _outcome(undisturbed)


def _assert_like(workdir, undisturbed):
  """The same run on other devices: rounding differs, and nothing else."""
  ours, theirs = _outcome(workdir), _outcome(undisturbed)
  assert ours[0] == theirs[0]
  for a, b in zip(ours[1], theirs[1], strict=True):
    for one, other in zip(a["curve"], b["curve"], strict=True):
      assert one == pytest.approx(other, rel=1e-5)
  _assert_like_scores(workdir, undisturbed)


def _assert_like_scores(workdir, undisturbed):
  ours, theirs = (
    np.load(d / "solve" / "pds" / "proxy_scores.npz") for d in (workdir, undisturbed))
  np.testing.assert_array_equal(ours["ids"], theirs["ids"])
  scale = np.abs(theirs["scores"]).max(axis=1, keepdims=True)
  np.testing.assert_allclose(ours["scores"] / scale, theirs["scores"] / scale, atol=1e-4)


@pytest.mark.slow
def test_eight_devices_select_the_same(finished, tmp_path):
  code, printed = smoke(tmp_path / "run", num_devices=8)
  assert code == 0, printed
  _assert_like(tmp_path / "run", finished[0])


def _job(workdir, *bindings):
  return ["-m", "lmops_jax.cli", "run", "pds/smoke.gin", "--workdir", workdir, *bindings]


UNTIL_SOLVED = '--gin.STAGES=["prepare", "proxy", "solve"]'


@pytest.mark.slow
def test_proxies_are_scored_from_each_run_of_the_proxy(tmp_path):
  found = []
  for name, seed, stages in (("both", 1, ["proxy", "proxy_2"]), ("second", 3, ["proxy"])):
    code, printed = smoke(
      tmp_path / name, f"--gin.pds.Pipeline.proxy_seed={seed}", f"--gin.PROXY_RUNS={len(stages)}",
      "--gin.TARGET_INSTANCES=None", f"--gin.STAGES={['prepare', *stages, 'solve']}")
    assert code == 0, printed
    found.append(np.load(tmp_path / name / "solve" / "pds" / "proxy_scores.npz")["scores"])
  both, second = found
  assert both.shape == (4, 128) and second.shape == (2, 128)
  np.testing.assert_array_equal(both[2:], second)
  assert all(np.corrcoef(a, b)[0, 1] < 0.999 for a, b in zip(both[:2], second))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_select_the_same(finished, tmp_path):
  several_processes.run(_job(tmp_path / "run"), 2, devices=2)
  _assert_like(tmp_path / "run", finished[0])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number, codes", [
  (signal.SIGKILL, [75, -signal.SIGKILL]), (signal.SIGTERM, [143, 143])])
def test_a_solve_that_lost_a_process_goes_on_on_another_mesh(finished, tmp_path, number, codes):
  workdir = tmp_path / "run"
  processes = several_processes.start(_job(workdir, UNTIL_SOLVED), 2, devices=2)
  saved = workdir / "solve" / "pds.partial" / "unfinished" / "proxy" / "10" / "2"
  while not saved.exists() and processes[1].poll() is None:
    time.sleep(0.002)
  processes[1].send_signal(number)
  ended = several_processes.finish(processes)
  assert [code for code, _ in ended] == codes, ended
  word = "another process of this job has ended" if number == signal.SIGKILL else "terminated"
  assert word in ended[0][1]
  code, printed = smoke(workdir, UNTIL_SOLVED, "--gin.mesh.make.fsdp=2", num_devices=4)
  assert code == 0 and "solve/pds: resuming" in printed, printed
  _assert_like_scores(workdir, finished[0])


def test_unknown_names_are_refused_before_any_work(tmp_path):
  workdir = tmp_path / "run"
  for binding, name in [
    ("--gin.TRAIN_STEPZ=3", "TRAIN_STEPS"),
    ("--gin.pds.Select.ration=0.3", "ratio"),
    ('--gin.STAGES=["selekt"]', "select"),
  ]:
    code, printed = smoke(workdir, binding)
    assert code == 2 and name in printed, printed
  assert not list(workdir.glob("prepare*"))
