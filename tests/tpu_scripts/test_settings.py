"""What all scripts share: syntax, help, settings that are refused in one sentence, dry runs."""

import re
import shlex
import shutil
import subprocess

import pytest

from tests.tpu_scripts.conftest import SCRIPTS

ACTIONS = sorted(p.name for p in SCRIPTS.glob("*.sh") if p.name not in ("settings.sh", "host.sh"))
CREATE = ("--accelerator-type", "v4-8", "--runtime-version=tpu-ubuntu2204-base")
COMMAND = ("--", "run", "train/finetune.gin", "--workdir", "/shared/run")


def test_there_is_a_script_for_every_action():
  assert ACTIONS == ["collect.sh", "create.sh", "delete.sh", "gpu_slurm.sh", "install.sh",
                     "launch.sh", "status.sh", "stop.sh", "tail.sh"]


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_syntax_and_shellcheck(path):
  subprocess.run(["bash", "-n", path], check=True)
  if shutil.which("shellcheck") is None:
    pytest.skip("needs shellcheck")
  done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ACTIONS)
def test_help_lists_every_setting_that_the_script_reads(cloud, script):
  done = cloud(script, "--help", settings=False)
  assert done.returncode == 0 and done.stderr == ""
  assert done.stdout.startswith(f"usage: {script} ")
  for line in done.stdout.split("variable of the environment:\n")[1].splitlines():
    option, variable, about = line.split(maxsplit=2)
    assert option == "--" + variable.lower().replace("_", "-") and len(about) > 8, line
  assert cloud.calls == []


@pytest.mark.parametrize("script", ACTIONS)
def test_missing_settings_are_named_before_anything_is_called(cloud, script):
  done = cloud(script, *COMMAND, settings=False)
  assert done.returncode == 2 and cloud.calls == []
  message, = done.stderr.splitlines()
  assert message.startswith(f"{script}: missing: ") and "--name (NAME)" in message
  required = re.findall(r"^  (--\S+)\s+(\S+) .*\(required\)", cloud(script, "--help").stdout, re.M)
  assert [f"{option} ({variable})" for option, variable in required] == re.findall(
    r"--\S+ \(\w+\)", message)


@pytest.mark.parametrize("script,arguments,message", [
  ("status.sh", ["--colour"], "there is no option --colour"),
  ("status.sh", ["pod"], "'pod' is not an option"),
  ("status.sh", ["--zone"], "--zone has no value"),
  ("status.sh", ["--num-slices", "two"], "--num-slices (NUM_SLICES) is 'two', not a whole number"),
  ("status.sh", ["--num-slices=0"], "--num-slices (NUM_SLICES) is 0; it must be at least 1"),
  ("create.sh", [*CREATE, "--spot", "--reserved"], "both --spot (SPOT) and --reserved (RESERVED)"),
  ("install.sh", ["--wheel", "absent.whl"], "--wheel (WHEEL) is 'absent.whl', which is not a file"),
  ("install.sh", ["--source", "/"], "--source (SOURCE) is '/', which holds no pyproject.toml"),
  ("install.sh", ["--wheel", "a", "--requirement", "b"], "both --wheel (WHEEL) and --requirement"),
  ("launch.sh", [], "no command; write it after --"),
  ("launch.sh", ["--", "run", "a.gin"], "the command has no --workdir"),
  ("launch.sh", ["--", "run", "a.gin", "--workdir"], "the command has no --workdir"),
  ("launch.sh", ["--", "run", "a.gin", "--workdir=gs://b/c"], "but lmops needs a path"),
  ("launch.sh", ["--", "run", "a.gin", "--workdir", "runs"], "each host would look for in a"),
  ("launch.sh", ["--job-env", "A", *COMMAND], "--job-env (JOB_ENV) is 'A', not NAME=VALUE"),
  ("launch.sh", ["--keep-alive", *COMMAND], "missing: --accelerator-type (ACCELERATOR_TYPE), "),
  ("collect.sh", ["--workdir", "run", "--destination", "."], "--workdir (WORKDIR) is 'run'; give"),
])
def test_bad_settings_are_refused_before_anything_is_called(cloud, script, arguments, message):
  done = cloud(script, *arguments)
  assert done.returncode == 2 and cloud.calls == [] and done.stdout == ""
  line, = done.stderr.splitlines()
  assert line.startswith(f"{script}: {message}") or message in line, line


def test_an_option_wins_over_the_variable(cloud):
  cloud("status.sh", "--name", "other", "--zone=there", NAME="pod", ZONE="here")
  assert cloud.calls[0][4] == "other" and "--zone=there" in cloud.calls[0]


@pytest.mark.parametrize("script,arguments", [
  ("create.sh", CREATE), ("install.sh", ()), ("launch.sh", COMMAND),
  ("launch.sh", ("--keep-alive", *CREATE, *COMMAND)), ("status.sh", ()), ("tail.sh", ()),
  ("stop.sh", ()), ("collect.sh", ("--workdir", "/shared/run", "--destination", "gs://b/c")),
  ("delete.sh", ()),
])
def test_a_dry_run_prints_commands_and_calls_none(cloud, script, arguments):
  before = sorted(cloud.folder.rglob("*"))
  done = cloud(script, "--dry-run", *arguments)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  assert cloud.calls == [] and sorted(cloud.folder.rglob("*")) == before
  printed = [shlex.split(line) for line in done.stdout.splitlines()]
  assert printed and {words[0] for words in printed} <= {"gcloud", "tar"}


@pytest.mark.parametrize("script,arguments", [
  ("create.sh", (*CREATE, "--spot")), ("launch.sh", (*COMMAND, "--gin.A='it is'")),
  ("status.sh", ()), ("stop.sh", ()), ("delete.sh", ("--yes",)), ("tail.sh", ()),
])
def test_a_dry_run_prints_what_a_run_calls(cloud, script, arguments):
  cloud.hosts(2)
  cloud.installed()
  cloud.lives(["ABSENT"], ["ACTIVE"]) if script == "create.sh" else None
  dry = cloud(script, "--dry-run", *arguments)
  printed = [shlex.split(line)[1:] for line in dry.stdout.splitlines()]
  arguments = ("--assume-shared", *arguments) if script == "launch.sh" else arguments
  cloud(script, *arguments)
  called = [[a.replace("check any", "check shared") for a in call] for call in cloud.calls]
  assert printed == called
