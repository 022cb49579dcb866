"""Memory of training on a CPU: freed memory is kept and used again.

XLA on a CPU takes the temporary memory of every step from malloc and gives it back after the step.
glibc returns such large pieces to the kernel, so each step of a small model faults in some 20,000
fresh pages, which costs a third of its processor time and more of its wall time (figures in
tests/benchmarks/train_step.py). Nothing here imports jax.
"""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
  """Tells malloc to keep what is freed, in one heap. The process then stays at its largest size.

  Call it once, before jax is imported: threads that already have a heap of their own keep it. The
  environment variable GLIBC_TUNABLES=glibc.malloc.hugetlb=1 has a like effect from outside.

  Returns:
    Whether it took effect; False if the C library is not glibc.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    libc = ctypes.CDLL(None)
    libc.gnu_get_libc_version  # noqa: B018  AttributeError on another C library
    # A trim threshold of -1 is none: one of 2 GiB, the largest number, would give back a step that
    # takes as much.
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
  except (AttributeError, OSError):
    return False
