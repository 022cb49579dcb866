"""A gcloud that records its calls and plays a queued resource whose hosts are folders here.

Everything lies in the folder $STAND_IN:
  calls.jsonl    one list of arguments a call
  lives.json     lists of states: the queued resource runs through the first, each create begins the
                 next; the last state of a list stays. A state is "NAME", or ["NAME", "message"];
                 DENIED fails as without credentials.
  hosts/0-1/     the home of host 1 of slice 0, with ENVIRONMENT.json of its own where there is one
  silent.json    hosts that cannot be reached, until a create
  node_state     READY where there is none, until a create
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
LIVES, HOSTS = HERE / "lives.json", HERE / "hosts"
SILENT, NODE_STATE = HERE / "silent.json", HERE / "node_state"


def _flag(arguments, name, default=None):
  values = [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]
  return values[-1] if values else default


def _chosen(arguments):
  node, worker = _flag(arguments, "node", "0"), _flag(arguments, "worker", "0")
  silent = json.loads(SILENT.read_text()) if SILENT.exists() else []
  for home in sorted(HOSTS.glob("*-*")):
    if node in ("all", home.name[0]) and worker in ("all", home.name[2:]):
      if home.name in silent:
        print(f"ssh: connect to host {home.name} port 22: Connection timed out", file=sys.stderr)
      else:
        yield home


def _pre_empt():
  """The hosts are gone, with their processes and disks."""
  for home in HOSTS.glob("*-*"):
    group = home / "lmops" / "job" / "pid"
    if group.exists():
      try:
        os.killpg(os.getpgid(int(group.read_text())), signal.SIGKILL)
      except ProcessLookupError:
        pass
    shutil.rmtree(home)
    home.mkdir()


def describe(arguments):
  lives = json.loads(LIVES.read_text())
  state, *message = [lives[0][0]] if isinstance(lives[0][0], str) else lives[0][0]
  if len(lives[0]) > 1:
    lives[0].pop(0)
    LIVES.write_text(json.dumps(lives))
  if state == "ABSENT":
    print("ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found", file=sys.stderr)
    return 1
  if state == "DENIED":
    print("ERROR: (gcloud) You do not have an active\naccount selected.", file=sys.stderr)
    return 1
  if state == "SUSPENDED":
    _pre_empt()
  print("\t".join([state, *message]))
  return 0


def create(arguments):
  LIVES.write_text(json.dumps(json.loads(LIVES.read_text())[1:]))
  SILENT.unlink(missing_ok=True)
  NODE_STATE.unlink(missing_ok=True)
  return 0


def delete(arguments):
  _pre_empt()
  lives = json.loads(LIVES.read_text())
  LIVES.write_text(json.dumps([["DELETING", "ABSENT"], *lives[1:]]))
  return 0


def ssh(arguments):
  code = 0
  for home in _chosen(arguments):
    own = home / "ENVIRONMENT.json"
    environment = {
      "HOME": str(home), "HOST": home.name, "STAND_IN": str(HERE),
      "PATH": f"{HERE / 'host_bin'}:/usr/bin:/bin",
    } | (json.loads(own.read_text()) if own.exists() else {})
    # As sshd: the user's shell reads one string.
    done = subprocess.run(["bash", "-c", _flag(arguments, "command")], cwd=home, env=environment,
                          stdin=subprocess.DEVNULL)
    code = code or done.returncode
  return code


def scp(arguments):
  source, destination = (a for a in arguments[1:] if not a.startswith("--"))
  for home in _chosen(arguments):
    paths = [home / p.partition(":")[2] if ":" in p else Path(p) for p in (source, destination)]
    if not paths[1].parent.is_dir():
      print(f"scp: {paths[1]}: No such file or directory", file=sys.stderr)
      return 1
    shutil.copy(*paths)
  return 0


def main(arguments):
  with open(HERE / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\n")
  kind, rest = arguments[:3], arguments[3:]
  if arguments[:2] == ["storage", "cp"]:
    return 0
  if kind == ["compute", "tpus", "tpu-vm"] and rest[0] == "describe":
    slice_ = rest[1].removeprefix("pod").removeprefix("-") or "0"
    state = NODE_STATE.read_text() if NODE_STATE.exists() else "READY"
    print(len(list(HOSTS.glob(f"{slice_}-*"))), state, sep="\t")
    return 0
  assert kind == ["compute", "tpus", "queued-resources"], arguments
  action = {"describe": describe, "create": create, "ssh": ssh, "scp": scp,
            "delete": delete}[rest[0]]
  return action(rest)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
