"""Losses of batches of groups of rows, see `training.sources.Groups`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.training.losses import LMExampleLosses, check_batch
from lmops_jax.training.sources import part_of


@dataclasses.dataclass(frozen=True)
class GroupLosses:
  """Nats a learned token of each group, times its weight.

  Attributes:
    of_rows: losses of rows, whatever else than words they read.
    parts: of a group.
  """

  of_rows: LMExampleLosses
  parts: tuple[str, ...]

  def __call__(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    nats, learned = jnp.float32(0), jnp.float32(0)
    for number, part in enumerate(self.parts):
      rows = part_of(batch, part)
      groups, per_group = rows["tokens"].shape[:2]
      rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
      if "key" in batch:
        keys = jax.vmap(functools.partial(_keys_of_rows, number=number, num=per_group))
        rows["key"] = keys(batch["key"]).reshape(-1)
      found = self.of_rows.token_losses(params, rows) * rows["loss_mask"]
      nats += found.reshape(groups, -1).sum(axis=1)
      learned += rows["loss_mask"].reshape(groups, -1).sum(axis=1)
    return nats / jnp.maximum(learned, 1) * batch["weight"]

  def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses ids outside of the vocabulary, and rows of which nothing is learned."""
    for part in self.parts:
      rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in part_of(batch, part).items()}
      check_batch(rows, vocab_size=self.of_rows.model.config.vocab_size)


def _keys_of_rows(key: jax.Array, number: int, num: int) -> jax.Array:
  return jax.random.split(jax.random.fold_in(key, number), num)
