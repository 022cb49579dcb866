"""The loss of rows that are held out, by source, while a docked model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lmops_jax.data.mixture import Rows
from lmops_jax.evaluation import lm
from lmops_jax.models.docked import DockedLM
from lmops_jax.systems.kosmos.training import VALIDATION, GroupLosses
from lmops_jax.training import loop

_TOGETHER = 32  # rows


def validation(
  docked: DockedLM, rows: Mapping[tuple[str, str], Rows], num_rows: int, every: int, partitioner,
) -> loop.Evaluate:
  """A hook: nats a learned token of each source, as `validation/<part>/<source>`.

  Args:
    docked: the model.
    rows: what is held out, by part and name of the source.
    num_rows: the most of a source, its first ones.
    every: steps between two evaluations.
    partitioner: the run's.
  """
  losses = {part: GroupLosses(docked, (part,)) for part, _ in rows}

  def figures(params):
    return {
      f"{part}/{name}": lm.mean_loss(
        losses[part], params, batches(part, of_source, num_rows), place=partitioner.place_batch,
        multiple_of=partitioner.num_batch_shards)
      for (part, name), of_source in rows.items()}

  return loop.Evaluate(VALIDATION, every, figures)


def batches(part: str, rows: Rows, num_rows: int) -> Iterator[dict[str, np.ndarray]]:
  """The first rows as batches of groups of one row.

  With their `weight [B]`, the mean over all groups of all batches is one over learned tokens.
  """
  num = min(num_rows, len(rows))
  total = int(rows.num_learned(np.arange(num)).sum())
  for start in range(0, num, _TOGETHER):
    indices = np.arange(start, min(start + _TOGETHER, num))
    batch = dict(rows.batch(indices))
    batch.pop("weight", None)  # it is for a batch of one source
    ids = batch.pop("example_id")
    weight = rows.num_learned(indices) * num / total
    yield {
      **{f"{part}/{field}": value[:, None] for field, value in batch.items()},
      "weight": weight.astype(np.float32), "example_id": ids,
    }
