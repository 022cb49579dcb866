"""Two real processes of two devices each train like one device, stop together, see a peer go."""

import json
import os

import numpy as np
import pytest

from tests import several_processes

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

_PROGRAM = """
import json, os, signal, sys, time
import jax
from lmops_jax.mesh import processes
from lmops_jax.mesh.meshes import MeshConfig, initialize_distributed

directory, num_steps, fault, at = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
processes.handle_sigterm()
several = initialize_distributed()
sys.path.insert(0, {folder!r})
import test_loop
from jax.experimental import multihost_utils

rows = 8 // jax.process_count()
mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)

if fault == "killed reading" and jax.process_index() == jax.process_count() - 1:
  from lmops_jax.mesh import checkpoints
  checkpoints.CheckpointStore.restore = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def batch_at(step):
  if step == at and fault == "exit":
    raise SystemExit(0)
  if step == at and fault != "none" and jax.process_index() == jax.process_count() - 1:
    os.kill(os.getpid(), getattr(signal, fault))
  if step >= at and fault == "SIGTERM":
    time.sleep(0.2)  # jax looks for the signal once a second, and steps must be left then
  return {{name: value[mine] for name, value in test_loop._lm_batch(step).items()}}

try:
  result = test_loop._lm(
    directory, batch_at=batch_at, partitioner=MeshConfig(fsdp=2).build() if several else None,
    checkpoint_every=2 if num_steps < 10 else None, params_at=(3,), num_steps=num_steps)
except processes.Terminated:
  raise SystemExit(143)
except Exception as error:
  print("lost a peer" if processes.is_lost_peer(error) else repr(error))
  processes.leave_others(2)
params = result.state.params
if several:
  params = multihost_utils.process_allgather(params, tiled=True)
if jax.process_index() == 0:
  sums = [float(abs(x).sum()) for x in jax.tree.leaves(params)]
  with open(directory + "/result.json", "w") as f:
    json.dump([result.history, sums], f)
"""


def _command(directory, num_steps=5, fault="none", at=-1):
  directory.mkdir(exist_ok=True)
  program = _PROGRAM.format(folder=os.path.dirname(__file__))
  return ["-c", program, directory, num_steps, fault, at]


def _run(directory, num_processes, devices=2, **kw):
  return several_processes.run(_command(directory, **kw), num_processes, devices=devices)


def _result(directory):
  return json.loads((directory / "result.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """What two processes write that nothing disturbs."""
  directory = tmp_path_factory.mktemp("two") / "whole"
  _run(directory, 2)
  return _result(directory)


def test_processes_equal_one_and_resume(tmp_path, whole):
  _run(tmp_path / "one", 1)
  _run(tmp_path / "four", 4, devices=1)
  _run(tmp_path / "cut", 2, fault="exit", at=3)
  _run(tmp_path / "cut", 2)
  _run(tmp_path / "other", 2, fault="exit", at=3)
  _run(tmp_path / "other", 1)  # on another mesh
  one, four, cut, other = (
    _result(tmp_path / name) for name in ("one", "four", "cut", "other"))
  assert cut == whole
  for found in (whole, four, other):
    for got, want in zip(found[0], one[0], strict=True):
      assert got == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(found[1], one[1], rtol=1e-5)


def test_sigterm_to_one_stops_all_at_the_same_step(tmp_path):
  command = _command(tmp_path / "cut", num_steps=100, fault="SIGTERM", at=4)
  ended = several_processes.finish(several_processes.start(command, 2, devices=2))
  assert [code for code, _ in ended] == [143, 143], ended
  step, = (int(path.name) for path in (tmp_path / "cut" / "checkpoints").glob("[0-9]*"))
  assert 4 < step < 100
  _run(tmp_path / "cut", 2, num_steps=100)
  _run(tmp_path / "whole", 2, num_steps=100)
  assert _result(tmp_path / "cut") == _result(tmp_path / "whole")


def test_a_killed_process_ends_the_other_with_a_word(tmp_path, whole):
  command = _command(tmp_path / "cut", fault="SIGKILL", at=3)
  ended = several_processes.finish(several_processes.start(command, 2, devices=2))
  assert [code for code, _ in ended] == [2, -9], ended
  assert "lost a peer" in ended[0][1]
  _run(tmp_path / "cut", 2)
  assert _result(tmp_path / "cut") == whole


def test_a_process_killed_while_a_checkpoint_is_read_is_not_blamed_on_it(tmp_path):
  _run(tmp_path / "cut", 2, fault="exit", at=4)
  command = _command(tmp_path / "cut", fault="killed reading")
  ended = several_processes.finish(several_processes.start(command, 2, devices=2))
  assert [code for code, _ in ended] == [2, -9], ended
  assert "lost a peer" in ended[0][1] and "dropped" not in ended[0][1]
  assert {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()} >= {"2", "4"}


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit])
def test_a_damaged_checkpoint_is_dropped_for_the_one_before(tmp_path, whole, damage):
  _run(tmp_path / "cut", 2, fault="exit", at=4)
  folder = tmp_path / "cut" / "checkpoints" / "4"
  damage(max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
  said, of_other = _run(tmp_path / "cut", 2)
  assert f"checkpoint {folder} is dropped (its file" in said and "going on from step 2" in said
  assert "dropped" not in of_other
  assert _result(tmp_path / "cut") == whole
