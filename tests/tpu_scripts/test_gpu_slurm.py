"""The SLURM counterpart: what is submitted, and what the submitted script does when it ends."""

import shlex
import subprocess

import pytest

SETTINGS = ("--partition=gpu", "--time=24:00:00", "--nodes=2", "--gpus-per-node=8")
COMMAND = ("--", "run", "train/finetune.gin", "--workdir", "/shared/run", "--gin.A='it is $HOME'")
# Records its arguments; srun also the standing of the job, and ends as it is told.
_TOOL = """\
import json, os, signal, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["STAND_IN"] + "/slurm.jsonl", "a") as file:
  file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "srun":
  if os.environ.get("SCANCEL"):
    os.kill(os.getppid(), signal.SIGTERM)
  sys.exit(int(os.environ["SRUN_CODE"]))
"""


@pytest.fixture
def slurm(cloud):
  for name in ("sbatch", "srun", "scontrol"):
    cloud.program(cloud.folder / "bin" / name, _TOOL)
  return cloud


def _submit(slurm, *options):
  return slurm("gpu_slurm.sh", *SETTINGS, *options, *COMMAND, PROJECT="", NAME="tune")


def _run(slurm, code, **environment):
  """The submitted script, as SLURM starts it."""
  return subprocess.run(
    ["bash", slurm.folder / "lmops_slurm" / "tune.sbatch"], capture_output=True, text=True,
    timeout=3600, env={"PATH": f"{slurm.folder / 'bin'}:/usr/bin:/bin", "HOME": "/home",
                     "STAND_IN": str(slurm.folder), "SLURM_JOB_ID": "7", "SRUN_CODE": str(code),
                     **environment})


def test_what_is_submitted(slurm):
  done = _submit(slurm, "--venv=/shared/venv", "--account", "a", "--cpus-per-task=12",
                 "--sbatch-flags=--qos=high --exclusive", "--job-env=XLA_FLAGS=--a --b")
  assert done.returncode == 0, done.stderr
  file = slurm.folder / "lmops_slurm" / "tune.sbatch"
  assert slurm.records("slurm.jsonl") == [["sbatch", "--qos=high", "--exclusive", str(file)]]
  lines = file.read_text().splitlines()
  assert lines[0].startswith("#!")
  directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
  assert directives == {
    "--job-name=tune", "--partition=gpu", "--time=24:00:00", "--nodes=2", "--ntasks-per-node=8",
    "--gpus-per-node=8", f"--output={slurm.folder}/lmops_slurm/%x-%j.log", "--open-mode=append",
    "--signal=TERM@120", "--requeue", "--account=a", "--cpus-per-task=12"}
  first = next(i for i, line in enumerate(lines) if i and not line.startswith("#SBATCH"))
  assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch stops at the first
  subprocess.run(["bash", "-n", file], check=True)
  assert _run(slurm, 0).returncode == 0
  assert slurm.records("slurm.jsonl")[1:] == [[
    "srun", "--kill-on-bad-exit=1", "--gpu-bind=none", "env", "XLA_FLAGS=--a --b",
    "/shared/venv/bin/lmops", *COMMAND[1:]]]


@pytest.mark.parametrize("options,words", [
  (["--container=/images/a.sif", "--container-mounts=/shared:/shared"],
   ["env", "apptainer", "exec", "--nv", "--bind=/shared:/shared", "/images/a.sif", "lmops"]),
  (["--container=registry#image:1", "--container-mounts=/s:/s"],
   ["--container-image=registry#image:1", "--container-mounts=/s:/s", "env", "lmops"]),
])
def test_containers(slurm, options, words):
  assert _submit(slurm, *options).returncode == 0
  _run(slurm, 0)
  assert slurm.records("slurm.jsonl")[-1] == [
    "srun", "--kill-on-bad-exit=1", "--gpu-bind=none", *words, *COMMAND[1:]]


@pytest.mark.parametrize("code,environment,requeued", [
  (143, {}, True), (0, {}, False), (2, {}, False), (143, {"SCANCEL": "1"}, False),
])
def test_a_job_that_was_told_to_save_goes_back_into_the_queue(slurm, code, environment, requeued):
  assert _submit(slurm, "--venv=/shared/venv").returncode == 0
  assert _run(slurm, code, **environment).returncode == code
  assert (slurm.records("slurm.jsonl")[-1] == ["scontrol", "requeue", "7"]) == requeued


def test_a_dry_run_prints_the_script_and_submits_nothing(slurm):
  dry = _submit(slurm, "--venv=/shared/venv", "--dry-run")
  assert dry.returncode == 0 and slurm.records("slurm.jsonl") == []
  assert not (slurm.folder / "lmops_slurm").exists()
  script, _, submission = dry.stdout.rstrip().rpartition("\n")
  _submit(slurm, "--venv=/shared/venv")
  assert script + "\n" == (slurm.folder / "lmops_slurm" / "tune.sbatch").read_text()
  assert slurm.records("slurm.jsonl") == [shlex.split(submission)]


@pytest.mark.parametrize("options,message", [
  ((), "missing: --venv (VENV) or --container (CONTAINER)"),
  (("--venv=a", "--container=b"), "both --venv (VENV) and --container (CONTAINER) are set"),
  (("--venv=a", "--name=a b"), "--name (NAME) is 'a b'; use letters"),
  (("--venv=a", "--nodes=x"), "--nodes (NODES) is 'x', not a whole number"),
])
def test_bad_settings_are_refused(slurm, options, message):
  done = _submit(slurm, *options)
  assert done.returncode == 2 and slurm.records("slurm.jsonl") == []
  line, = done.stderr.splitlines()
  assert line.startswith(f"gpu_slurm.sh: {message}")
