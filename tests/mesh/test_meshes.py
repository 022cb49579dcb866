"""Mesh sizes, where parameters and batches go, and joining other processes."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmops_jax.control.dynamics import init_state
from lmops_jax.mesh.meshes import MeshConfig, Partitioner, initialize_distributed, single_device
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training import optimizers

CONFIG = TransformerConfig(
  vocab_size=32, num_layers=2, width=8, num_heads=4, num_kv_heads=2, mlp_width=12
)


def _abstract(config=CONFIG):
  def init(key):
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  optimizer = optimizers.adamw(0.1)
  return jax.eval_shape(lambda key: init_state(*optimizer, init(key)), jax.random.key(0))


@pytest.mark.parametrize(
  "sizes,shape",
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((4, 2, 1), (4, 2, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 1, -1), (1, 1, 8)),
  ],
)
def test_one_axis_takes_the_devices_left(sizes, shape):
  partitioner = MeshConfig(*sizes).build()
  assert tuple(partitioner.mesh.shape.values()) == shape
  assert partitioner.num_batch_shards == shape[0] * shape[1]


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: MeshConfig(0), "mesh.make.data=0 must be an integer of at least 1 .*, or -1"),
    (lambda: MeshConfig(-1, -1), "at most one may be -1"),
    (lambda: MeshConfig(3).build(), "does not fit 8 devices"),
    (lambda: MeshConfig(-1, 3).build(), "does not fit 8 devices"),
    (lambda: MeshConfig(rules="best"), "rules='best' must be 'default', 'sharded' or 'rep"),
    (lambda: MeshConfig(reduction="often"), "reduction='often' must be 'auto', 'step' or 'layer'"),
    (lambda: MeshConfig(rules=[("mlp", "model")]), r"rules\[0\]\[1\]='model' must be 'data', 'fs"),
  ],
)
def test_impossible_meshes_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_rules_place_parameters_and_optimizer_state():
  state = MeshConfig(2, 2, 2).build().shardings(_abstract())
  layers = state.params["layers"]
  assert layers["mlp"]["gate"]["kernel"].spec == P(None, "fsdp", "tensor")
  assert layers["mlp"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
  assert layers["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)
  assert state.params["embedding"].spec == P("tensor", "fsdp")
  adam = state.opt_state[1][0]
  assert adam.count.spec == P()
  assert adam.mu["layers"]["mlp"]["gate"]["kernel"].spec == P(None, "fsdp", "tensor")
  assert adam.count.spec == P()


def test_other_rules_by_name_and_by_table():
  sharded = MeshConfig(2, 2, 2, rules="sharded").build().shardings(_abstract())
  assert sharded.params["embedding"].spec == P("tensor", ("data", "fsdp"))
  replicated = MeshConfig(2, 2, 2, rules="replicated").build().shardings(_abstract())
  assert all(all(a is None for a in s.spec) for s in jax.tree.leaves(replicated))
  table = MeshConfig(2, 2, 2, rules=[["batch", ["data", "fsdp"]], ["vocab", "tensor"]]).build()
  assert table.shardings(_abstract()).params["unembedding"].spec == P(None, "tensor")


def test_axis_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match=r"\['key'\]\['kernel'\].* axis of 2 .*into 4"):
    MeshConfig(2, 1, 4).build().shardings(_abstract())


@pytest.mark.parametrize("sizes,options,axes", [
  ((8, 1, 1), {}, ("data",)),
  ((8, 1, 1), {"reduction": "layer"}, None),
  ((8, 1, 1), {"rules": "sharded"}, None),
  ((2, 4, 1), {}, None),
  ((2, 4, 1), {"rules": "replicated"}, ("data", "fsdp")),
  ((2, 2, 2), {"reduction": "step"}, ("data", "fsdp")),
  ((1, 1, 8), {"reduction": "step"}, None),
])
def test_devices_sum_their_own_rows_where_they_hold_all_parameters_or_are_told_to(
  sizes, options, axes
):
  rows = MeshConfig(*sizes, **options).build().device_rows
  assert (rows and rows.axes) == axes


@pytest.mark.parametrize("num_devices, num_rows, wanted, size", [
  (8, 256, 64, 64), (256, 512, 128, 256), (256, 256, 64, 256), (12, 48, 16, 12), (12, 48, 4, 12),
  (12, 48, 24, 24), (8, 64, None, None)])
def test_micro_batches_have_a_row_for_each_device(num_devices, num_rows, wanted, size):
  partitioner = MeshConfig(data=1, fsdp=-1).plan(num_devices)
  assert partitioner.micro_batch_size(num_rows, wanted) == size


def test_batches_are_split_over_data_and_fsdp():
  partitioner = MeshConfig(2, 2, 2).build()
  batch = {
    "tokens": np.arange(24, dtype=np.int32).reshape(8, 3),
    "score": np.arange(8, dtype=np.float32),
    "example_id": np.arange(8) + 2**40,
  }
  placed = partitioner.place_batch(batch)
  assert set(placed) == {"tokens", "score"}
  assert placed["tokens"].addressable_shards[0].data.shape == (2, 3)
  assert placed["score"].addressable_shards[0].data.shape == (2,)
  np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
  with pytest.raises(ValueError, match="batch of 6 examples does not split over data x fsdp = 4"):
    partitioner.place_batch({"tokens": np.zeros((6, 3), np.int32)})


def test_partitioners_are_equal_by_value():
  assert MeshConfig(4, 2).build() == MeshConfig(4, 2).build()
  assert hash(MeshConfig(4, 2).build()) == hash(MeshConfig(4, 2).build())
  assert single_device().mesh.size == 1 and isinstance(single_device(), Partitioner)


def test_alone_unless_the_environment_tells_of_others():
  assert not initialize_distributed(environ={})
  assert not initialize_distributed(environ={"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})
  assert not initialize_distributed(environ={"TPU_WORKER_HOSTNAMES": "localhost"})
  with pytest.raises(ValueError, match="only some are given"):
    initialize_distributed(environ={"JAX_COORDINATOR_ADDRESS": "localhost:1"})
  with pytest.raises(ValueError, match="JAX_PROCESS_ID='x' is not an integer"):
    initialize_distributed(environ={"JAX_PROCESS_ID": "x"})


def test_detection_can_be_asked_for(monkeypatch):
  """As on Cloud TPU hosts reached by ssh, whose environment tells nothing."""
  called = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: called.append(arguments))
  assert not initialize_distributed(environ={"LMOPS_DISTRIBUTED": "0"}) and called == []
  assert not initialize_distributed(environ={"LMOPS_DISTRIBUTED": "1"})  # but is alone
  assert called == [()]


def test_joins_as_told_by_the_environment():
  program = (
    "import jax; from lmops_jax.mesh.meshes import initialize_distributed;"
    "assert not initialize_distributed(); assert jax.process_count() == 1;"
    "assert jax.distributed.is_initialized()"
  )
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  environ = os.environ | {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0",
  }
  subprocess.run([sys.executable, "-c", program], env=environ, check=True, timeout=3600)
