"""A reward to begin with; users bring their own, see the README."""

from __future__ import annotations

import dataclasses

import numpy as np

from lmops_jax.config.setting_types import Text, component
from lmops_jax.training.reinforce.rewards import Rollout


@component(module="reinforce")
@dataclasses.dataclass(frozen=True)
class ShareOf:
  """The share of a response's characters that are among some; 0 for an empty response.

  Attributes:
    characters: those that are liked.
  """

  characters: Text = "e"

  def __call__(self, rollouts: list[Rollout]) -> np.ndarray:
    """See `rewards.Reward`."""
    liked = set(self.characters)
    return np.array([
      sum(character in liked for character in rollout.response) / max(len(rollout.response), 1)
      for rollout in rollouts], np.float64)
