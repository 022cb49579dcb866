"""What a method may be asked for: Protocols, so that a user's own method is a plain class.

A `bench` is a `bench.Bench`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lmops_jax.systems.pds import pretrain


@runtime_checkable
class ProxyMethod(Protocol):
  """A setting with a `name` that scores the proxy set."""

  def score_proxies(self, bench: Any) -> np.ndarray:
    """`[runs, M]` scores, one row a proxy checkpoint; large is good."""


@runtime_checkable
class CorpusMethod(Protocol):
  """A setting with a `name` that scores every instance of the corpus."""

  def score_corpus(self, bench: Any) -> Iterator[np.ndarray]:
    """Scores of consecutive instances, in blocks; large is good."""


@runtime_checkable
class ScorerMethod(Protocol):
  """A setting with a `name` that fits the scorer itself, and so has no scores to learn from."""

  def fit_scorer(self, bench: Any, config: Any) -> None:
    """Leaves a fitted scorer in the stage's folder, as `scorer.fit` does.

    Args:
      config: `scorer.Scorer`, whose model and start it is to have.
    """


@runtime_checkable
class ForwardMethod(Protocol):
  """A method that differentiates the proxy's losses along a direction (see `control`)."""

  def needs_forward_mode(self) -> bool:
    """Whether it does so with its settings."""


@runtime_checkable
class CheckpointsMethod(Protocol):
  """A method that starts from kept checkpoints of the proxy, its `checkpoints`."""

  checkpoints: Sequence[int] | None


@runtime_checkable
class SolvingMethod(ProxyMethod, Protocol):
  """A proxy method that solves the control problem of a training run, as `PMP` does."""

  def check_optimizer(self, proxy: pretrain.Pretrain, length: int, partitioner) -> None:
    """Refuses, from shapes alone, an inner optimizer under which every score would be 0."""

  def decided(self, bench: Any) -> SolvingMethod:
    """The method with all settled that the devices' memory decides; called before scoring."""
