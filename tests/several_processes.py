"""Starts the processes of one job on this machine: gloo between them, some virtual devices each."""

import os
import socket
import subprocess
import sys


def environment(devices):
  """This one with another number of virtual CPU devices; the flags for quick compilation stay."""
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  flags.append(f"--xla_force_host_platform_device_count={devices}")
  return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def start(command, num_processes, *, devices=1, environ=None, cwd=None, own=None):
  """The running processes, the coordinator first.

  Args:
    command: arguments after the interpreter's.
    num_processes: of the job; 1 is an ordinary run.
    devices: virtual CPU devices a process.
    environ: further environment variables.
    own: further arguments of each process.
  """
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  base = environment(devices) | (environ or {})
  processes = []
  for index in range(num_processes):
    place = {}
    if num_processes > 1:
      place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
               "JAX_NUM_PROCESSES": str(num_processes), "JAX_PROCESS_ID": str(index)}
    processes.append(subprocess.Popen(
      [sys.executable, *map(str, command), *(own[index] if own else ())], env=base | place,
      cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
  return processes


def finish(processes):
  """`[(exit code, output)]`; output is read from all at once, so that none waits for its reader."""
  import concurrent.futures

  with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
    outputs = list(pool.map(lambda process: process.communicate()[0], processes))
  return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def run(command, num_processes, **kw):
  """Runs to the end; all must succeed. Returns their outputs."""
  ended = finish(start(command, num_processes, **kw))
  for code, output in ended:
    assert code == 0, output[-3000:]
  return [output for _, output in ended]
