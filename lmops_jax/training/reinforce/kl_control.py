"""How much leaving the reference costs, and how that changes from batch to batch."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import NonNegative, Positive, component

FOLLOWS = ("reference", "updates")
_MOST = 0.2  # of the relative error that a change follows


class KLControl(Protocol):
  """Chooses the coefficient of the penalty: a frozen dataclass of JSON values, which runs record.

  Attributes:
    coefficient: the one of the first batch.
    follows: what `after` is told of: "reference", once for each batch, the policy's divergence from
      the reference; "updates", once for each optimizer step, how far the policy has moved since the
      batch was written.
  """

  coefficient: float
  follows: str

  def after(self, coefficient: jax.Array, kl: jax.Array, num_sequences: int) -> jax.Array:
    """The coefficient of the next batch, `[]`.

    Args:
      coefficient: that of this batch.
      kl: `[]`, nats a response: the batch's mean of `log_probs - reference` summed over tokens, or
        of a step the mean of what log-probabilities have gained, summed over all places of a row.
      num_sequences: responses of the batch, or the step.

    Raises:
      ValueError: if the coefficient could not follow in so large a batch.
    """


@component(module="reinforce")
@dataclasses.dataclass(frozen=True)
class FixedKL:
  """The same coefficient always.

  Attributes:
    coefficient: of the penalty.
  """

  coefficient: NonNegative = 0.2
  follows = FOLLOWS[0]

  def after(self, coefficient: jax.Array, kl: jax.Array, num_sequences: int) -> jax.Array:
    """See `KLControl`."""
    return coefficient


@component(module="reinforce")
@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
  """`beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)` (arXiv:1909.08593, 2.2).

  Attributes:
    coefficient: of the first batch.
    target: the nats a response that it holds.
    horizon: responses in which the coefficient may change by a fifth or so; more than a fifth of a
      batch.
    follows: see `KLControl`; "updates" is what Promptist's code does. Steps are small, so that the
      coefficient then falls by a fifth of n / horizon in nearly every one.
  """

  coefficient: Positive = 0.2
  target: Positive = 6.0
  horizon: Positive = 10_000.0
  follows: Literal[FOLLOWS] = FOLLOWS[0]

  def after(self, coefficient: jax.Array, kl: jax.Array, num_sequences: int) -> jax.Array:
    """See `KLControl`."""
    if _MOST * num_sequences >= self.horizon:
      raise ValueError(
        f"reinforce.AdaptiveKL.horizon={self.horizon} is at most a fifth of a batch of "
        f"{num_sequences} responses, so that one batch could end all penalty; raise it."
      )
    error = jnp.clip(kl / self.target - 1, -_MOST, _MOST)
    return coefficient * (1 + error * num_sequences / self.horizon)
