"""A stand-in for Google Cloud on PATH: recorded calls, hosts that are folders, a played lmops."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu_scripts"
STAND_IN = Path(__file__).with_name("stand_in_gcloud.py")

# Writes down how it was called; then ends with `code`, or waits for SIGTERM where that is "wait".
_LMOPS = """\
import json, os, signal, sys
if sys.argv[1:] == ["--version"]:
  sys.exit(print("lmops_jax 0"))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
run = {"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
with open(os.environ["STAND_IN"] + "/runs.jsonl", "a") as file:
  file.write(json.dumps(run) + "\\n")
print("lmops says hello", flush=True)
with open(os.environ["STAND_IN"] + "/codes.json") as file:
  codes = json.load(file)
with open(os.environ["STAND_IN"] + "/runs.jsonl") as file:
  mine = sum(json.loads(line)["env"]["HOST"] == os.environ["HOST"] for line in file)
code = codes[min(mine, len(codes)) - 1]
code = code[os.environ["HOST"]] if isinstance(code, dict) else code
if code == "wait":
  signal.sigwait([signal.SIGTERM])
  code = 143
sys.exit(code)
"""
# A Python that records what pip is asked for, and "installs" the lmops above.
_PYTHON = """\
import json, os, shutil, sys
args = sys.argv[1:]
with open(os.environ["STAND_IN"] + "/python.jsonl", "a") as file:
  file.write(json.dumps([os.environ["HOST"], *args]) + "\\n")
if args[0] == "-c":
  class Version(tuple):
    pass
  sys.version_info = Version(json.loads(os.environ.get("STAND_IN_PYTHON", "[3, 12]")))
  exec(args[1])
elif args[:2] == ["-m", "venv"]:
  os.makedirs("venv/bin", exist_ok=True)
  shutil.copy(sys.argv[0], "venv/bin/python")
elif args[:3] == ["-m", "pip", "install"]:
  if "broken" in args[-1]:
    sys.exit("ERROR: No matching distribution found")
  shutil.copy(os.environ["STAND_IN"] + "/lmops", "venv/bin/lmops")
"""


class Cloud:
  """Runs the scripts against the stand-in, in `folder`; slices of `hosts` hosts."""

  def __init__(self, folder: Path):
    self.folder = folder
    (folder / "bin").mkdir()
    (folder / "host_bin").mkdir()
    self.program(folder / "bin" / "gcloud", STAND_IN.read_text())
    self.program(folder / "host_bin" / "hostname", "import os\nprint(os.environ['HOST'])")
    self.program(folder / "host_bin" / "python3", _PYTHON)
    self.program(folder / "lmops", _LMOPS)
    self.hosts(1)
    self.lives(["ACTIVE"])
    self.codes(0)

  def program(self, path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def hosts(self, workers: int, slices: int = 1) -> None:
    shutil.rmtree(self.folder / "hosts", ignore_errors=True)
    for index in range(slices):
      for worker in range(workers):
        (self.folder / "hosts" / f"{index}-{worker}").mkdir(parents=True)

  def homes(self) -> list[Path]:
    return sorted((self.folder / "hosts").iterdir())

  def installed(self) -> None:
    for home in self.homes():
      (home / "lmops" / "venv" / "bin").mkdir(parents=True)
      shutil.copy(SCRIPTS / "host.sh", home / "lmops")
      shutil.copy(self.folder / "lmops", home / "lmops" / "venv" / "bin")

  def lives(self, *lives) -> None:
    (self.folder / "lives.json").write_text(json.dumps(lives))

  def codes(self, *codes) -> None:
    """Exit codes of lmops, run by run, for all hosts or by host; "wait" is for SIGTERM, and 143."""
    (self.folder / "codes.json").write_text(json.dumps(codes))

  def records(self, name: str) -> list:
    path = self.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  @property
  def calls(self) -> list[list[str]]:
    return self.records("calls.jsonl")

  @property
  def actions(self) -> list[str]:
    """The calls in short: describe, create, ssh start, scp, hosts."""
    short = []
    for call in self.calls:
      if call[2] == "tpu-vm":
        short.append("hosts")
        continue
      command = next((a for a in call if a.startswith("--command=")), "")
      _, _, action = command.partition("host.sh ")
      short.append(" ".join(call[3:4] + action.split()[:1]))
    return short

  @property
  def runs(self) -> list[dict]:
    return self.records("runs.jsonl")

  def until_ended(self) -> None:
    """Waits for the jobs of all hosts, by their locks."""
    for home in self.homes():
      subprocess.run(["flock", home / "lmops" / "job" / "lock", "true"], check=True, timeout=3600)

  def __call__(self, script: str, *arguments, settings=True, stdin=None, **environment):
    """Runs a script with the three settings that all have; returns the finished process."""
    variables = {"PROJECT": "p", "ZONE": "z", "NAME": "pod"} if settings else {}
    process = self.start(script, *arguments, **variables | environment)
    out, err = process.communicate(stdin, timeout=3600)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)

  def start(self, script: str, *arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
      [SCRIPTS / script, *arguments], cwd=self.folder, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      start_new_session=True,
      env={"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(self.folder),
           "HOME": str(self.folder), "POLL_SECONDS": "0", "GRACE_POLLS": "1",
           **environment})

  def end_all(self) -> None:
    for home in self.homes():
      pid = home / "lmops" / "job" / "pid"
      if pid.exists() and pid.read_text().strip():
        try:
          os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        except ProcessLookupError:
          pass


@pytest.fixture
def cloud(tmp_path):
  stand_in = Cloud(tmp_path)
  yield stand_in
  stand_in.end_all()
