"""Resident memory of this process, from /proc (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from pathlib import Path


def settled_bytes() -> int:
  """Resident bytes now, after what is free has gone back to the kernel."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
  """Largest resident bytes since the start, or since `restart_peak`."""
  line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
  return int(line.group(1)) * 1024


def restart_peak() -> None:
  """Lets the peak start again from what is resident now."""
  Path("/proc/self/clear_refs").write_text("5")
