"""Two real processes of two devices each train like one device, and resume each other's run."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

_PROGRAM = """
import json, sys
import jax
from lmops_jax.training.mesh import MeshConfig, initialize_distributed

directory, stop, several = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "several"
assert initialize_distributed() == several
sys.path.insert(0, {folder!r})
import test_loop
from jax.experimental import multihost_utils

rows = 8 // jax.process_count()
mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)

def batch_at(step):
  if step == stop:
    raise SystemExit(0)
  return {{name: value[mine] for name, value in test_loop._lm_batch(step).items()}}

mesh = MeshConfig(fsdp=2).build() if several else None
result = test_loop._lm(directory, batch_at=batch_at, partitioner=mesh, checkpoint_every=2,
                       params_at=(3,))
params = result.state.params
if several:
  params = multihost_utils.process_allgather(params, tiled=True)
if jax.process_index() == 0:
  sums = [float(abs(x).sum()) for x in jax.tree.leaves(params)]
  with open(directory + "/result.json", "w") as f:
    json.dump([result.history, sums], f)
"""


def _run(directory, num_processes, stop=-1):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
  processes = []
  for index in range(num_processes):
    extra = {}
    if num_processes > 1:
      extra = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
      }
    kind = "several" if num_processes > 1 else "one"
    program = _PROGRAM.format(folder=os.path.dirname(__file__))
    processes.append(subprocess.Popen(
      [sys.executable, "-c", program, str(directory), str(stop), kind], env=environ | extra,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ))
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-3000:]


def test_two_processes_equal_one_and_resume(tmp_path):
  for name in ("one", "two", "cut"):
    (tmp_path / name).mkdir()
  _run(tmp_path / "one", 1)
  _run(tmp_path / "two", 2)
  _run(tmp_path / "cut", 2, stop=3)
  _run(tmp_path / "cut", 2)
  one, two, cut = (
    json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two", "cut")
  )
  assert cut == two
  for got, want in zip(two[0], one[0], strict=True):
    assert got == pytest.approx(want, rel=1e-5)
  np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
