"""Freed memory is used again without new pages."""

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource, sys
from lmops_jax.sizing.memory import keep_freed_memory

assert "jax" not in sys.modules
if sys.argv[1] == "keep":
  assert keep_freed_memory()

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 40 << 20  # above 32 MiB glibc always maps anew

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(3):
    pointer = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(pointer, 1, size)
    libc.free(pointer)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())

libc.sbrk.restype = ctypes.c_void_p
libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(3 << 30))))  # no page of it is touched
above = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(1)))
print(libc.sbrk(0) - above.value)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults():
  def found(mode):
    environ = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    out = subprocess.run(
      [sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True,
      env=environ, timeout=3600,
    )
    return map(int, out.stdout.split())

  pages = 3 * (40 << 20) // 4096
  (plain, given_back), (keep, kept) = found("plain"), found("keep")
  assert plain > pages / 2 and keep < pages / 100
  assert given_back < 1 << 30 and kept > 2 << 30  # also what is larger than 2 GiB stays
