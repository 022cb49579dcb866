"""Array files that grow as they are written, so that what they hold need not fit into memory."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
  """An `.npy` file of int64 numbers whose count is known only at its end.

  Yields the function that appends an array `[n]`. The file can be read once the block has ended.
  """
  count = 0
  with path.open("wb") as file:

    def write_header() -> None:
      file.seek(0)  # NumPy pads the header, so that it has one size for every count
      np.lib.format.write_array_header_1_0(
        file, {"descr": "<i8", "fortran_order": False, "shape": (count,)}
      )

    def append(values: np.ndarray) -> None:
      nonlocal count
      file.write(np.asarray(values, "<i8").tobytes())
      count += len(values)

    write_header()
    yield append
    write_header()
