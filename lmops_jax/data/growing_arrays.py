"""Array files that grow as they are written, so that what they hold need not fit into memory."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def growing(
  path: Path, dtype: str = "<i8", shape: Sequence[int] = ()
) -> Iterator[Callable[[np.ndarray], None]]:
  """An `.npy` file of rows whose count is known only at its end.

  Yields the function that appends an array `[n, *shape]`. The file can be read once the block has
  ended.

  Args:
    dtype: of the numbers, with its order of bytes. shape: of a row.
  """
  count = 0
  with path.open("wb") as file:

    def write_header() -> None:
      file.seek(0)  # NumPy pads the header, so that it has one size for every count
      np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
      )

    def append(values: np.ndarray) -> None:
      nonlocal count
      file.write(np.asarray(values, dtype).tobytes())
      count += len(values)

    write_header()
    yield append
    write_header()
