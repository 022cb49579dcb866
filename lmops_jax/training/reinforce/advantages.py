"""What a response earned, and by how much it was better than expected: pure functions of arrays.

R is the number of response tokens that a row has room for. A mask `[B,R]` is 1 from a response's
first token to its end slot T and 0 behind it, so every row has at least one 1.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

AT_END = ("add", "overwrite")
_TINY = 1e-8  # inside the root of whitening
_SPREAD = 1e-4  # added to a group's standard deviation


def token_rewards(
  scores, log_probs, reference, mask, coefficient, at_end: Literal[AT_END] = "add"
) -> jax.Array:
  """Rewards of tokens: a penalty for leaving the reference, and the score at the end slot.

  `r_t = -coefficient * (log_probs_t - reference_t)`, and `r_T` is the score plus that penalty
  (Ziegler et al. 2019, arXiv:1909.08593, section 2).

  Args:
    scores: `[B]`.
    log_probs: `[B,R]`, nats, of the policy that wrote the response.
    reference: `[B,R]`, nats, of the policy that it must stay near.
    mask: `[B,R]`.
    coefficient: `[]`.
    at_end: "overwrite" leaves the penalty out of `r_T`, as Promptist's code does; how long a
      response is then costs nothing at its end.

  Returns:
    `[B,R]`, 0 behind the end slot.
  """
  penalties = -coefficient * (log_probs - reference) * mask
  is_end = (mask - _shifted(mask)) > 0
  return jnp.where(is_end, scores[:, None] + (penalties if at_end == "add" else 0), penalties)


def gae(rewards, values, mask, gamma: float = 1.0, lam: float = 0.95):
  """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16).

  `delta_t = r_t + gamma v_{t+1} - v_t` with `v_{T+1} = 0`; `A_t = delta_t + gamma lam A_{t+1}`.

  Args:
    rewards, values, mask: `[B,R]`; what stands behind the end slot does not matter.
    gamma: discount. lam: how much later errors count.

  Returns:
    Advantages and returns `A + v`, both `[B,R]` and 0 behind the end slot.
  """
  values = jnp.where(mask > 0, values, 0)
  errors = jnp.where(mask > 0, rewards + gamma * _shifted(values) - values, 0)

  def back(later, error):
    advantage = error + gamma * lam * later
    return advantage, advantage

  _, advantages = jax.lax.scan(back, jnp.zeros_like(errors[:, 0]), errors.T, reverse=True)
  advantages = jnp.where(mask > 0, advantages.T, 0)
  return advantages, advantages + values


def with_padding(mask) -> jax.Array:
  """1 in all columns that the longest response of the batch reaches, like the mask.

  Promptist's code whitens over these, where values behind a response's end are 0, so that the scale
  of advantages depends on the other lengths of the batch.
  """
  return jnp.broadcast_to(jnp.max(mask, axis=0), mask.shape)


def whiten(values, mask) -> jax.Array:
  """`(x - mean) / sqrt(variance + 1e-8)` over the whole batch where the mask is 1, 0 elsewhere.

  The variance is the unbiased one. A single value becomes 0.
  """
  count = jnp.sum(mask)
  mean = jnp.sum(jnp.where(mask > 0, values, 0)) / jnp.maximum(count, 1)
  centred = jnp.where(mask > 0, values - mean, 0)
  variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
  return centred * jax.lax.rsqrt(variance + _TINY)


def group_advantages(scores, group_size: int, by_spread: bool = True) -> jax.Array:
  """Scores against the mean of their group (GRPO, Shao et al. 2024, arXiv:2402.03300, 4.1.2).

  Args:
    scores: `[B]`; the responses to one prompt stand together.
    group_size: responses of a group, a divisor of B.
    by_spread: divide by the group's standard deviation (unbiased, plus 1e-4), as the paper does.
      Without it groups of like scores weigh no more than others (Dr. GRPO, arXiv:2503.20783).

  Returns:
    `[B]`; 0 in a group of equal scores.
  """
  groups = scores.reshape(-1, group_size)
  centred = groups - jnp.mean(groups, axis=1, keepdims=True)
  if by_spread:
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / max(group_size - 1, 1)
    centred = centred / (jnp.sqrt(variance) + _SPREAD)
  return centred.reshape(-1)


def _shifted(x):
  """`x_{t+1}` at t, 0 at the last place."""
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
