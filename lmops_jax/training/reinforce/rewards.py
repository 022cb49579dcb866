"""What a response is worth: the contract of rewards, and its check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lmops_jax.host.words import shortened

_SHOWN = 120  # characters of a prompt


class Rollout(NamedTuple):
  """One response to be judged.

  Attributes:
    prompt: the text as the prompts' file has it.
    response: the new text alone; may be empty.
    ids: the response's tokens, without an end token.
    is_cut: whether it had no room for more.
  """

  prompt: str
  response: str
  ids: Sequence[int]
  is_cut: bool


class Reward(Protocol):
  """A function of rollouts, on the host."""

  def __call__(self, rollouts: list[Rollout]) -> np.ndarray | Mapping[str, np.ndarray]:
    """Scores `[n] float64`; or by name the parts that add up to them, which are written down."""


class RewardError(ValueError):
  """A reward that failed, or gave something else than a finite number for each rollout."""


def judged(reward: Reward, rollouts: list[Rollout]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The scores `[n] float64`, and their parts if the reward tells them.

  Raises:
    RewardError: if the reward fails, or a score is missing or not finite; it names a prompt.
  """
  try:
    found = reward(rollouts)
  except Exception as error:
    raise RewardError(
      f"the reward failed on {_named(rollouts, _failing(reward, rollouts))} "
      f"({type(error).__name__}: {error}); make it give every response a number."
    ) from error
  parts = {name: _checked(values, rollouts, f"part {name!r} of the reward")
           for name, values in found.items()} if isinstance(found, Mapping) else {}
  if isinstance(found, Mapping):
    found = np.sum(list(parts.values()), axis=0)
  return _checked(found, rollouts, "the reward"), parts


def _checked(values, rollouts, name: str) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.shape != (len(rollouts),):
    raise RewardError(
      f"{name} has the shape {values.shape} for {len(rollouts)} rollouts, the first of which is "
      f"{_named(rollouts, 0)}; give one number for each."
    )
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    raise RewardError(
      f"{name} is {values[bad[0]]} for {_named(rollouts, bad[0])}; make it a finite number."
    )
  return values


def _failing(reward, rollouts) -> int:
  """The first rollout that the reward fails on alone, else the first."""
  for i, rollout in enumerate(rollouts):
    try:
      reward([rollout])
    except Exception:  # the same that is told of
      return i
  return 0


def _named(rollouts, i: int) -> str:
  rollout = rollouts[i]
  return (f"the response {shortened(rollout.response, _SHOWN)!r} to the prompt "
          f"{shortened(rollout.prompt, _SHOWN)!r}")
