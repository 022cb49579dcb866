"""One value an example over any number of rows, in fixed-size batches that compile once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lmops_jax.mesh import meshes, processes


def map_examples(
  function: Callable[[Any, Any], jax.Array], params, rows: Mapping[str, np.ndarray],
  batch_size: int, partitioner=None,
) -> np.ndarray:
  """Applies `function(params, batch) -> [B]` to all rows.

  Args:
    function: jitted, so that repeated calls reuse what was compiled.
    params: its first argument.
    rows: a batch of host arrays `[N, ...]`, the same in every process of the mesh.
    batch_size: rows at a time, rounded up to a multiple of what the mesh splits a batch into; the
      last batch is padded by repeating its first row.
    partitioner: places the batches on a mesh; None leaves that to jax.

  Returns:
    `[N] float64`, in the order of the rows.
  """
  num = len(next(iter(rows.values())))
  shards = meshes.shards_of(partitioner)
  batch_size = -(-batch_size // shards) * shards
  values = []
  with meshes.activated(partitioner):
    for start in range(0, num, batch_size):
      batch = {k: v[start : start + batch_size] for k, v in rows.items()}
      size = min(batch_size, num - start)
      if size < batch_size:
        batch = {
          k: np.concatenate([v, np.repeat(v[:1], batch_size - size, axis=0)])
          for k, v in batch.items()
        }
      if partitioner is not None:
        batch = partitioner.place_rows(batch)
      values.append((function(params, batch), size))
  return np.concatenate([
    processes.fetch(v)[:size].astype(np.float64) for v, size in values] or [np.zeros(0)])
