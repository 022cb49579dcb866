"""`lmops plan` and `lmops aot` as a person meets them."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from lmops_jax import cli
from lmops_jax.commands import plans as plan_commands
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.sizing import aot, chips, hlo

NO_LIBTPU = importlib.util.find_spec("libtpu") is None
NEEDS_LIBTPU = pytest.mark.skipif(
  NO_LIBTPU, reason="needs libtpu: pip install 'lmops_jax[tpu]'")


@pytest.fixture
def lmops(capsys):
  def run(*arguments):
    code = cli.main(list(arguments))
    return code, *capsys.readouterr()
  return run


def test_plan_of_the_default_run(lmops):
  code, out, _ = lmops("plan", "pds", "--topology", "v5e:1x1", "--corpus-instances", "5000")
  assert code == 0
  lines = out.splitlines()
  assert lines[0].startswith("v5e:1x1, 1 chips (15.75 GiB a device); mesh data=1")
  phases = [line.split(":")[0] for line in lines if line[0] != " "][1:-1]
  assert phases == ["proxy", "solve pds, forward", "solve pds, reverse",
                    "solve pds, off-batch scores", "scorer", "annotate", "pretrain"]
  assert "5,000 instances" in out and lines[-1] == "everything fits"
  assert "trajectory 'all': 10 states of 3.4 MiB" in out


def test_plan_says_what_does_not_fit_and_what_helps(lmops):
  code, out, err = lmops("plan", "gin/pds/paper_1.7b.gin", "--topology", "v5e:1x1")
  assert code == 2 and err.count("\n") == 1
  assert "pds.PMP" in err or "mesh.make.fsdp" in err
  code, out, err = lmops(
    "plan", "gin/pds/paper_1.7b.gin", "--topology", "v5e:2x2",
    "--gin.control.SolveOptions.trajectory='all'")
  assert code == 2 and "does not fit; what helps is" in err
  assert "mesh.make.fsdp (now 4)" in err
  assert "proxy: 1.74G parameters" in out  # the table is printed all the same


def test_plan_on_this_machine_knows_no_memory(lmops):
  code, out, _ = lmops("plan", "--gin_file", "pds/default.gin", "--gin.MESH=None")
  assert code == 0 and "(memory unknown)" in out and "everything fits" not in out


@pytest.mark.parametrize("arguments, words", [
  (["plan", "pds", "--topology", "v9:2x2"], "nearest valid name"),
  (["plan", "pds", "--topology", "v5e"], "CHIP:AxB"),
  (["plan", "pdz"], "there is no gin file 'pdz'"),
  (["plan", "pds", "--corpus-instances", "0"], "0 is less than 1"),
  (["plan", "learning-law"], "does not say what it takes"),
  (["plan", "pds", "--gin.STEPZ=1"], "nothing refers to"),
  (["plan", "gin/pds/paper_1.7b.gin", "--topology", "v5p:1x1x1"],
   "raise control.SolveOptions.segment_steps"),
  (["plan", "gin/pds/paper.gin"], "--gin.models.TransformerConfig.vocab_size=32000"),
  (["plan", "pds", "--topology", "v5e:16x16"], "do not split over the mesh's 256 data shards"),
  (["aot", "pds"], "--topology"),
  (["plan", "--topology", "v5e:2x2"], "was given no gin file"),
  (["aot", "--topology", "h100:8", "pds"], "lmops plan knows GPUs"),
])
def test_refused(lmops, arguments, words):
  code, _, err = lmops(*arguments)
  assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.skipif(not NO_LIBTPU, reason="libtpu is installed")
def test_without_libtpu(lmops):
  code, _, err = lmops("aot", "--topology", "v5e:2x2", "pds")
  assert code == 2 and "pip install 'lmops_jax[tpu]'" in err and err.count("\n") == 1


def test_help_loads_nothing_heavy():
  for command in plan_commands.COMMANDS:
    code = (f"import sys; from lmops_jax import cli\ntry: cli.main(['{command}', '--help'])\n"
            "except SystemExit: pass\nassert not {'jax', 'gin', 'tensorflow'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--topology" in done.stdout, done.stderr


def test_text_of_a_compiled_program():
  program = aot.Program("step", None, flops=16 * 197e12, steps=2, bytes_beside=2**30)
  counts = hlo.Counts(
    product_flops=1.5 * 197e12, collectives={"all-gather": hlo.Collective(8, 2**21)},
    num_kernels=4)
  compiled = aot.Compiled(program, 2**30, 0, 2**31, 0, 2**20, counts, 3.0, 4 * 2**30)
  text = plan_commands.compiled_text(compiled, chips.topology("v5e:4x4"))
  assert text.splitlines() == [
    "step: 1.58PFLOP a step, at peak 500.0 ms; compiled in 3.0s",
    "  a device: 4.00 GiB = arguments 1.00 GiB, temporaries 2.00 GiB, held beside 1.00 GiB; "
    "of the host 1.0 MiB",
    "  matrix products as compiled: 1.50 of the analytic FLOPs, beside 4 kernels that are not "
    "counted",
    "  all-gather: 4 a step, 1.0 MiB a device",
  ]


def test_a_program_that_the_compiler_fails_on():
  def lower():
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: layout of 2\nmore")

  program = aot.Program("step", lower, flops=1.0, remedies=("less",))
  with pytest.raises(aot.CompilerError) as error:
    aot.compile_program(program, MeshConfig().build())
  assert str(error.value) == (
    "the compiler failed on step: INVALID_ARGUMENT: layout of 2; what may help is less, or another "
    "slice.")


def test_a_program_that_the_compiler_refuses():
  message = ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G "
             "hbm. Exceeded hbm capacity by 1.75G.")
  assert aot._out_of_memory(message) == 17.5 * 2**30
  assert aot._out_of_memory(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(15.94G) exceeds available HBM (15.75G).") == 15.94 * 2**30
  assert aot._out_of_memory("INTERNAL: something else") is None
  program = aot.Program("step", None, flops=1.0, remedies=("less",))
  refused = aot.Compiled(program, 0, 0, 0, 0, 0, None, 1.0, 17.5 * 2**30)
  assert not refused.fits(2**40)
  with pytest.raises(ValueError, match="step needs 17.50 GiB .* what helps is less"):
    plan_commands._verdict([("step", 17.5 * 2**30, ("less",), True)], 2**40)


def _with_tpu(program, *arguments):
  done = subprocess.run(
    [sys.executable, "-c", program, *arguments], capture_output=True, text=True,
    env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"})
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.tpu
@NEEDS_LIBTPU
@pytest.mark.parametrize("name", [
  "v4:1x1x1", "v4:2x2x1", "v4:2x2x2", "v5e:1x1", "v5e:2x4", "v5p:1x1x1", "v5p:2x2x1", "v6e:2x2"])
def test_a_chip_is_one_device(name):
  """A v4 chip has two cores, which programs use as one device."""
  _with_tpu(
    "import sys; from lmops_jax.sizing import aot, chips; from lmops_jax.mesh.meshes import "
    "MeshConfig; t = chips.topology(sys.argv[1]); "
    "assert MeshConfig().build(aot.tpu_devices(t)).mesh.size == t.num_devices", name)


HOST_TRAJECTORY = """
import sys
import jax, jax.numpy as jnp
from lmops_jax.control import trajectory
from lmops_jax.sizing import aot, chips

device = aot.tpu_devices(chips.topology(sys.argv[1]))[0]
place = jax.sharding.SingleDeviceSharding(device)
state = {str(shape): jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
         for shape in ((), (24,), (256,), (12, 768), (2, 3, 5), (12, 64, 4, 128))}

def solve(state):
  forward = lambda s, t: jax.tree.map(lambda x: jnp.sin(x) + t, s)
  reverse = lambda c, s, t: (jax.tree.map(lambda a, b: a * b + t, c, s), None)
  return trajectory.run(forward, reverse, lambda s: (s, None), state, jnp.arange(10), "host")

compiled = jax.jit(solve, out_shardings=place).lower(state).compile()
assert compiled.memory_analysis().host_temp_size_in_bytes >= 10 * 4 * 12 * 64 * 4 * 128
"""


@pytest.mark.tpu
@NEEDS_LIBTPU
@pytest.mark.parametrize("name", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_every_chip_keeps_states_of_any_shape_in_host_memory(name):
  """libtpu crashed on v4, which cannot copy a row of a stack of scalars or vectors."""
  _with_tpu(HOST_TRAJECTORY, name)


@pytest.mark.tpu
@pytest.mark.slow
@NEEDS_LIBTPU
@pytest.mark.parametrize("size, topology", [("160m", "v5e:2x2"), ("470m", "v5p:2x2x1")])
def test_the_two_smallest_sizes_compile_for_a_tpu(size, topology):
  """Pre-training's step and both passes of the solve, as users start it; takes minutes."""
  done = subprocess.run(
    [sys.executable, "-m", "lmops_jax.cli", "aot", "--topology", topology,
     f"gin/pds/paper_{size}.gin"],
    capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr[-2000:]
  lines = done.stdout.splitlines()
  assert [line.split(":")[0] for line in lines if line[0] != " "][1:] == [
    "solve, forward", "solve, reverse", "pretrain", "everything fits"]
  ratios = [float(line.split("compiled: ")[1].split()[0]) for line in lines
            if line.startswith("  matrix products")]
  # Blocks and logits are computed again in a backward pass: 4 forward passes for 3, 12 for 8. The
  # slopes of the proxies, most of a reverse pass, take no backward pass.
  forward, reverse, pretrain = ratios
  assert 1.1 < forward < 1.6 and 1.1 < pretrain < 1.6 and 1.0 < reverse < 1.6, ratios
  assert "all-gather" in done.stdout  # parameters are split over the devices
