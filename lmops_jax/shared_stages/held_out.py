"""The loss of rows that are held out, by source, while a model is trained on groups of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lmops_jax.data.mixture import Rows
from lmops_jax.evaluation import lm
from lmops_jax.shared_stages.grouped_rows import VALIDATION, Opened
from lmops_jax.training import loop
from lmops_jax.training.group_losses import GroupLosses

_TOGETHER = 32  # rows


def validation(
  losses_of: Callable[[str], GroupLosses], opened: Opened, num_rows: int, every: int, partitioner,
) -> loop.Evaluate:
  """A hook: nats a learned token of each source, as `validation/<part>/<source>`.

  Args:
    losses_of: makes those of a part.
    opened: what is held out.
    num_rows: the most of a source, its first ones.
    every: steps between two evaluations.
    partitioner: the run's.
  """
  losses = {part: losses_of(part) for part in opened}

  def figures(params):
    return {
      f"{part}/{name}": lm.mean_loss(
        losses[part], params, batches(part, of_source, num_rows), place=partitioner.place_batch,
        multiple_of=partitioner.num_batch_shards)
      for part, of_part in opened.items() for name, of_source in of_part.items()}

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
