"""What the devices of a job may give."""

import jax
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.sizing.budget import Memory, memory_of, memory_of_mesh
from tests import several_processes


def test_memory_of_a_device():
  device = jax.devices()[0]
  assert memory_of(device, 5.0) == Memory(5.0, 0.0) and memory_of(device) == Memory(None, 0.0)

  class Accelerator:
    platform = "gpu"
    def memory_stats(self):
      return {"bytes_limit": 7}

  found = memory_of(Accelerator(), 5.0)
  assert found.device_bytes == 7 and found.host_bytes > 0


def test_memory_of_a_mesh_in_one_process():
  assert memory_of_mesh(MeshConfig().build(), 5.0) == Memory(5.0, 0.0)


_PROGRAM = """
import jax
from lmops_jax.mesh.meshes import MeshConfig, initialize_distributed
from lmops_jax.sizing import budget

initialize_distributed()
own = jax.process_index()
def memory_of(device, device_bytes):
  assert device.process_index == own  # no other's device tells its memory
  return budget.Memory(device_bytes, 1024.0 + own)
budget.memory_of = memory_of
mesh = MeshConfig().build()
print(budget.memory_of_mesh(mesh, 4096.0 - 1024 * own), budget.memory_of_mesh(mesh, own or None))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_agree_on_the_least():
  for output in several_processes.run(["-c", _PROGRAM], 2):
    assert output.strip().endswith(f"{Memory(3072.0, 1024.0)} {Memory(None, 1024.0)}")
