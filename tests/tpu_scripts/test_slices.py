"""Making, installing on, looking at and deleting TPU slices."""

import json
import subprocess
import tarfile
import tomllib

import pytest

from tests.tpu_scripts.conftest import ROOT, SCRIPTS

QUEUED = ["compute", "tpus", "queued-resources"]
WHERE = ["--project=p", "--zone=z"]
DESCRIBE = [*QUEUED, "describe", "pod",
            "--format=value(state.state,state.failedData.error.message)", *WHERE]
CREATE = ("--accelerator-type=v4-8", "--runtime-version=base")


def _create_call(*flags):
  return [*QUEUED, "create", "pod", *CREATE, *flags, "--quiet", *WHERE]


@pytest.mark.parametrize("options,flags", [
  ((), ("--node-id=pod",)),
  (("--spot", "--valid-until", "6h"), ("--node-id=pod", "--spot", "--valid-until-duration=6h")),
  (("--reserved", "--num-slices=2"), ("--node-count=2", "--node-prefix=pod", "--reserved")),
  (("--create-flags", "--network=n --tags=a", "--", "--labels=x=y z"),
   ("--node-id=pod", "--network=n", "--tags=a", "--labels=x=y z")),
])
def test_create_asks_and_waits_until_active(cloud, options, flags):
  cloud.lives(["ABSENT"], ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING",
                           "ACTIVE"])
  done = cloud("create.sh", *CREATE, *options)
  assert done.returncode == 0, done.stderr
  assert cloud.calls == [DESCRIBE, _create_call(*flags), *[DESCRIBE] * 4]
  assert done.stderr.splitlines() == [
    "create.sh: pod is WAITING_FOR_RESOURCES", "create.sh: pod is PROVISIONING",
    "create.sh: pod is ACTIVE", "create.sh: pod is ready; next, install.sh"]


def test_create_waits_for_one_that_is_there(cloud):
  cloud.lives(["PROVISIONING", "ACTIVE"])
  assert cloud("create.sh", *CREATE).returncode == 0
  assert cloud.calls == [DESCRIBE, DESCRIBE]


@pytest.mark.parametrize("life,message", [
  (["PROVISIONING", ["FAILED", "no more capacity in z"]],
   "pod is FAILED: no more capacity in z; run delete.sh, then create.sh again."),
  (["ACCEPTED", "SUSPENDED"], "pod is SUSPENDED; run delete.sh, then create.sh again."),
  (["DENIED"], "gcloud cannot describe pod: ERROR: (gcloud) You do not have an active account"),
])
def test_create_says_why_there_will_be_no_slice(cloud, life, message):
  cloud.lives(["ABSENT"], life)
  done = cloud("create.sh", *CREATE)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("create.sh: " + message)


def test_without_credentials_nothing_is_created(cloud):
  cloud.lives(["DENIED"])
  done = cloud("create.sh", *CREATE)
  assert done.returncode == 1 and cloud.calls == [DESCRIBE]
  assert "You do not have an active account selected." in done.stderr


# --------------------------------------------------------------------------------------- install


@pytest.fixture
def checkout(tmp_path):
  """A small repository: a committed file, a new one, one that git ignores, one that is deleted."""
  folder = tmp_path / "repository"
  folder.mkdir()
  git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", folder]
  for name in ("pyproject.toml", "a b.gin", "gone.py"):
    (folder / name).write_text(name)
  (folder / ".gitignore").write_text("*.log\n")
  subprocess.run([*git, "init", "--quiet"], check=True)
  subprocess.run([*git, "add", "."], check=True)
  subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
  (folder / "gone.py").unlink()
  (folder / "new.gin").write_text("new")
  (folder / "big.log").write_text("not to be copied")
  return folder


def test_install_copies_the_checkout_to_all_hosts_of_all_slices(cloud, checkout):
  cloud.hosts(2, slices=2)
  done = cloud("install.sh", "--num-slices=2", "--source", checkout, "--ssh-flags=--internal-ip")
  assert done.returncode == 0, done.stderr
  assert cloud.actions == ["hosts", "hosts", "ssh", "scp", "scp", "ssh install"]
  everywhere = ["--node=all", "--worker=all", "--quiet", "--internal-ip", *WHERE]
  assert [call[4] for call in cloud.calls[:2]] == ["pod-0", "pod-1"]
  assert cloud.calls[3] == [*QUEUED, "scp", str(SCRIPTS / "host.sh"), "pod:lmops/host.sh",
                            *everywhere]
  assert cloud.calls[4][5:] == ["pod:lmops/upload/", *everywhere]
  assert [line.split(" installed")[0] for line in done.stdout.splitlines()] == [
    "0-0", "0-1", "1-0", "1-1"]
  for home in cloud.homes():
    copied = home / "lmops" / "checkout"
    assert {p.name for p in copied.iterdir()} == {".gitignore", "pyproject.toml", "a b.gin",
                                                  "new.gin"}
    assert (home / "lmops" / "venv" / "bin" / "lmops").exists()
  pip = [call[1:] for call in cloud.records("python.jsonl") if "pip" in call]
  assert pip == [["-m", "pip", "install", "--quiet", "--editable",
                  f"{home / 'lmops' / 'checkout'}[tpu]"] for home in cloud.homes()]


def test_install_of_a_wheel_and_of_a_requirement(cloud, tmp_path):
  wheel = tmp_path / "lmops_jax-1-py3-none-any.whl"
  wheel.write_text("wheel")
  upload = cloud.homes()[0] / "lmops" / "upload" / wheel.name
  assert cloud("install.sh", "--wheel", wheel).returncode == 0
  assert upload.read_text() == "wheel"
  assert cloud("install.sh", "--requirement", "lmops_jax[tpu] @ git+https://h/r@v1").returncode == 0
  pip = [call[5:] for call in cloud.records("python.jsonl") if "pip" in call]
  assert pip == [[f"{upload}[tpu]"], ["--force-reinstall", "--no-deps", f"{upload}[tpu]"],
                 ["--upgrade", "lmops_jax[tpu] @ git+https://h/r@v1"]]


def test_install_refuses_an_old_python_and_says_on_which_host(cloud):
  cloud.hosts(2)
  (cloud.homes()[1] / "ENVIRONMENT.json").write_text(json.dumps({"STAND_IN_PYTHON": "[3, 10]"}))
  done = cloud("install.sh", "--requirement", "lmops_jax")
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith(
    "install.sh: 1 of 2 hosts refused: 0-1: python3 is Python 3.10, but lmops_jax needs 3.11 or ")
  done = cloud("install.sh", "--requirement", "lmops_jax", "--python", "python9")
  assert "0-0: there is no python9; install one and name it with --python" in done.stderr


def test_the_python_that_is_asked_for_is_the_one_of_the_package():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert project["requires-python"] == ">=3.11"
  assert "sys.version_info < (3, 11)" in (SCRIPTS / "host.sh").read_text()


def test_install_says_what_pip_said(cloud):
  done = cloud("install.sh", "--requirement", "broken")
  assert done.returncode == 1
  assert "pip failed (~/lmops/install.log): ERROR: No matching distribution found" in done.stderr


def test_install_refuses_while_a_job_runs(cloud):
  cloud.installed()
  cloud.codes("wait")
  assert cloud("launch.sh", "--", "run", "a.gin", "--workdir", str(cloud.folder)).returncode == 0
  done = cloud("install.sh", "--requirement", "lmops_jax")
  assert done.returncode == 1 and "0-0: a job is running; stop it first" in done.stderr


# ------------------------------------------------------------------------- status, delete, collect


def test_status_of_slices_in_any_state(cloud):
  cloud.lives([["FAILED", "quota"]])
  done = cloud("status.sh")
  assert (done.returncode, done.stdout) == (3, "pod FAILED: quota\n")
  cloud.lives(["ABSENT"])
  done = cloud("status.sh")
  assert (done.returncode, done.stdout) == (3, "pod ABSENT\n")
  cloud.lives(["ACTIVE"])
  cloud.hosts(2)
  done = cloud("status.sh")
  assert done.returncode == 1 and "0 of 2 hosts answered" in done.stderr
  assert "run install.sh" in done.stderr
  cloud.installed()
  done = cloud("status.sh")
  assert (done.returncode, done.stdout) == (0, "pod ACTIVE\n0-0 idle\n0-1 idle\n")


def test_a_host_that_does_not_answer_is_noticed(cloud):
  """gcloud goes on with the others and does not fail."""
  cloud.hosts(2)
  cloud.installed()
  (cloud.folder / "silent.json").write_text('["0-1"]')
  done = cloud("status.sh")
  assert done.returncode == 1 and done.stdout == "pod ACTIVE\n0-0 idle\n"
  assert done.stderr == ("status.sh: 1 of 2 hosts answered (ssh: connect to host 0-1 port 22: "
                         "Connection timed out).\n")


def test_delete_asks_for_the_name(cloud):
  assert cloud("delete.sh").returncode == 1  # nobody there to answer
  done = cloud("delete.sh", stdin="other\n")
  assert done.returncode == 1 and "'other' is not 'pod'; nothing is deleted" in done.stderr
  assert cloud.calls == []
  assert cloud("delete.sh", stdin="pod\n").returncode == 0
  assert cloud("delete.sh", "--yes").returncode == 0
  assert cloud.calls == [[*QUEUED, "delete", "pod", "--force", "--quiet", *WHERE]] * 2


def test_collect_takes_the_report_and_every_log(cloud, tmp_path):
  cloud.hosts(2, slices=2)
  cloud.installed()
  run = tmp_path / "shared run"
  for name in ("report/index.html", "report/loss.png", "log.txt", "config.gin", "lmops.json",
               "train/manifest.json", "train/metrics.jsonl", "train/params/1/array",
               "data/log.txt"):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(name)
  assert cloud("launch.sh", "--num-slices=2", "--assume-shared", "--", "run", "a.gin", "--workdir",
               str(run)).returncode == 0
  cloud.until_ended()
  there = tmp_path / "here"
  done = cloud("collect.sh", "--num-slices=2", "--workdir", run, "--destination", there)
  assert done.returncode == 0, done.stderr
  found = {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()}
  assert found == {
    "report/index.html", "report/loss.png", "log.txt", "config.gin", "lmops.json",
    "train/manifest.json", "train/metrics.jsonl",
    *(f"logs/slice{s}-worker{w}.log" for s in (0, 1) for w in (0, 1))}
  assert "lmops says hello" in (there / "logs" / "slice1-worker1.log").read_text()
  done = cloud("collect.sh", "--num-slices=2", "--workdir", run, "--destination", "gs://b/c/")
  assert done.returncode == 0
  *copy, source, destination, project = cloud.calls[-1]
  assert copy == ["storage", "cp", "--recursive"] and source.endswith("/run/*")
  assert (destination, project) == ("gs://b/c/", "--project=p")


def test_collect_of_a_run_that_is_not_there(cloud):
  cloud.installed()
  done = cloud("collect.sh", "--workdir", "/absent", "--destination", "x")
  assert done.returncode == 1 and "0-0: there is no folder /absent" in done.stderr


@pytest.mark.slow
def test_the_source_distribution_has_the_scripts(tmp_path):
  pytest.importorskip("hatchling")
  from hatchling.builders.sdist import SdistBuilder
  archive, = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
  with tarfile.open(archive) as file:
    names = {name.partition("/")[2] for name in file.getnames()}
  assert {path.relative_to(ROOT).as_posix() for path in SCRIPTS.glob("*.sh")} <= names
