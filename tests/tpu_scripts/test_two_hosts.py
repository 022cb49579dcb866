"""The scripts with the real lmops: two hosts are two processes that fine-tune one model."""

import json
import os
import re
import signal
import socket

import pytest

from tests import model_folders
from tests.tpu_scripts.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
POD = {"PROJECT": "p", "ZONE": "z", "NAME": "pod"}


@pytest.fixture
def command(tmp_path):
  """`(workdir, steps) -> arguments` of lmops, to fine-tune a tiny model on 60 rows."""
  (tmp_path / "the model").mkdir()
  model = model_folders.write(tmp_path / "the model", spread=3.0)
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(
    json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i)}) + "\n" for i in range(60)))

  def arguments(workdir, steps):
    return ["run", "train/finetune.gin", "--workdir", str(tmp_path / workdir),
            f"--gin.MODEL='{model}'", f"--gin.TRAIN='{rows}'", f"--gin.STEPS={steps}",
            "--gin.LENGTH=32", "--gin.LEARNING_RATE=3e-3",
            "--gin.finetune.Finetune.validation_fraction=0.2",
            "--gin.finetune.Finetune.checkpoint_every=2"]

  return arguments


def _hosts(cloud, number):
  """As many hosts with the real lmops, whose environment tells of the others as a pod's would."""
  cloud.hosts(number)
  cloud.installed()
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  for index, home in enumerate(cloud.homes()):
    cloud.program(home / "lmops" / "venv" / "bin" / "lmops",
                  "import sys\nfrom lmops_jax import cli\nsys.exit(cli.main())")
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if number > 1:
      environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number),
                      "JAX_PROCESS_ID": str(index)}
    (home / "ENVIRONMENT.json").write_text(json.dumps(environment))


def _launch(cloud, arguments):
  done = cloud("launch.sh", "--assume-shared", "--", *arguments)
  assert done.returncode == 0, done.stderr


def _follow(cloud, pattern):
  """Reads the log of the first host until a line matches; returns the lines of this launch."""
  tail = cloud.start("tail.sh", "--tail-lines=1000", **POD)
  lines = []
  for line in tail.stdout:
    lines = [line] if "launched: " in line else [*lines, line]
    if re.search(pattern, line):
      break
  else:
    pytest.fail("the job ended: " + "".join(lines))
  os.killpg(tail.pid, signal.SIGTERM)  # as Ctrl-C in a terminal
  tail.communicate()
  return "".join(lines)


def _losses(workdir):
  summary = json.loads((workdir / "report" / "summary.json").read_text())
  return [row["loss"] for row in summary["validation_loss"]]


def test_two_hosts_train_what_one_trains(cloud, command):
  for name, number in (("one", 1), ("two", 2)):
    _hosts(cloud, number)
    _launch(cloud, command(name, steps=12))
    cloud.until_ended()
    states = cloud("status.sh").stdout.splitlines()[1:]
    log = cloud("tail.sh").stdout
    assert [line.split(maxsplit=1)[1] for line in states] == ["finished 0"] * number, log
  one, two = _losses(cloud.folder / "one"), _losses(cloud.folder / "two")
  assert one[-1] < one[0] and two == pytest.approx(one, rel=1e-5)
  assert "report: " in log  # of the first host, which alone prints the table


def test_stop_ends_both_with_143_and_the_same_launch_continues(cloud, command):
  arguments = command("run", steps=1_000_000)
  _hosts(cloud, 2)
  _launch(cloud, arguments)
  _follow(cloud, r"train: ([2-9]|\d\d+)/1000000 steps")
  done = cloud("stop.sh", POLL_SECONDS="1")
  assert (done.returncode, done.stdout) == (0, "0-0 stopped 143\n0-1 stopped 143\n"), done.stderr
  _hosts(cloud, 2)  # as after a pre-emption: other machines, the same storage
  _launch(cloud, arguments)
  log = _follow(cloud, r"train: \d+/1000000 steps")
  assert "train: resuming (interrupted earlier)" in log
  assert int(re.search(r"train: (\d+)/1000000 steps", log)[1]) > 2
  assert cloud("stop.sh", POLL_SECONDS="1").returncode == 0
