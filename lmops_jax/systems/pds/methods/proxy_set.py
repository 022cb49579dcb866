"""The random part of a corpus that gradient methods score."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from lmops_jax.config.setting_types import (
  Seed,
  at_least,
  component,
)
from lmops_jax.control.options import AUTO
from lmops_jax.host import hashing


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class ProxySet:
  """The random part of the corpus that gradient methods score, the same for every method.

  Attributes:
    num_proxies: its instances, M; "auto" takes `max_proxies`, or all of a smaller corpus.
    seed: seed of the draw: uniform without replacement, a function of (seed, instance id).
    max_proxies: the most that "auto" takes.
  """

  num_proxies: at_least(4) | Literal[AUTO] = AUTO
  seed: Seed = 1234
  max_proxies: at_least(4) = 3072

  @property
  def most(self) -> int:
    """M, for a corpus that is large enough."""
    return self.max_proxies if self.num_proxies == AUTO else self.num_proxies

  def count(self, num_examples: int) -> int:
    """M, for a corpus of `num_examples` instances.

    Raises:
      ValueError: if the corpus has fewer than are asked for, or hardly any.
    """
    if self.num_proxies != AUTO and self.num_proxies > num_examples:
      raise ValueError(
        f"pds.ProxySet.num_proxies={self.num_proxies} (PROXIES) exceeds the corpus's "
        f"{num_examples} instances; lower it or enlarge the corpus."
      )
    if num_examples < 4:
      raise ValueError(
        f"the corpus has {num_examples} instances, too few to learn scores from; enlarge it."
      )
    return min(self.most, num_examples)

  def indices(self, ids: np.ndarray) -> np.ndarray:
    """Rows of the corpus, `[M] int64`, ascending, by the ids `[N]` of all its instances."""
    return hashing.draw_indices(ids, self.count(len(ids)), self.seed)
