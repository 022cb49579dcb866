"""The losses of PPO and GRPO token by token, pure functions; a batch's loss is a weighted sum.

`mean_weights` says which mean over tokens is meant, before a batch is cut into micro-batches, so
that cutting it changes nothing.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

MEANS = ("token", "sequence")


def mean_weights(mask, over: Literal[MEANS] = "token") -> jax.Array:
  """Weights `[B,R]` of tokens that sum to 1.

  Args:
    mask: `[B,R]`, 1 at tokens that count.
    over: "token" weighs all tokens alike (PPO; DAPO, arXiv:2503.14476, 3.3); "sequence" weighs all
      rows alike, and the tokens of a row alike (GRPO, arXiv:2402.03300, equation 3). A row without
      tokens then counts as one of loss 0.
  """
  if over == "token":
    return mask / jnp.maximum(jnp.sum(mask), 1)
  return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) / mask.shape[0]


def clipped_policy_loss(log_probs, old, advantages, low: float = 0.2, high: float = 0.2):
  """`max(-A rho, -A clip(rho, 1 - low, 1 + high))`, rho being the ratio of probabilities.

  PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7); a `high` above `low` is DAPO's
  (arXiv:2503.14476, 3.1).

  Args:
    log_probs: nats under the policy that learns; the gradient flows through them alone.
    old: nats under the policy that wrote the tokens.
    advantages: of the tokens, of the same shape.

  Returns:
    The losses, of the same shape.
  """
  ratio = jnp.exp(log_probs - old)
  clipped = jnp.clip(ratio, 1 - low, 1 + high)
  return jnp.maximum(-advantages * ratio, -advantages * clipped)


def clipped_share(log_probs, old, advantages, low: float = 0.2, high: float = 0.2) -> jax.Array:
  """1 for each token whose gradient `clipped_policy_loss` cuts off, else 0."""
  ratio = jnp.exp(log_probs - old)
  cut = jnp.where(advantages > 0, ratio > 1 + high, (advantages < 0) & (ratio < 1 - low))
  return cut.astype(log_probs.dtype)


def clipped_value_loss(values, old, returns, clip: float | None = 0.2) -> jax.Array:
  """`max((v - ret)^2, (clip(v, old - clip, old + clip) - ret)^2) / 2` of each token.

  Args:
    values: what the value model says now.
    old: what it said before the updates.
    returns: of the tokens, of the same shape.
    clip: None leaves the plain squared error.
  """
  plain = jnp.square(values - returns)
  if clip is None:
    return plain / 2
  near = jnp.clip(values, old - clip, old + clip)
  return jnp.maximum(plain, jnp.square(near - returns)) / 2


def reference_penalty(log_probs, reference) -> jax.Array:
  """The estimator k3 of a token's divergence from the reference, `q - log(q) - 1`, at least 0.

  q is the reference's probability over the policy's (Schulman, "Approximating KL divergence";
  arXiv:2402.03300, equation 4). On tokens of the policy itself its mean is KL(policy||reference),
  but the mean of its gradient is that of KL(reference||policy): a policy that GRPO brings to rest
  is `reference * beta / (constant - reward)`, not `reference * exp(reward / beta)`.
  """
  difference = reference - log_probs
  return jnp.exp(difference) - difference - 1


def entropy(logits) -> jax.Array:
  """Nats of `softmax(logits)`, `[...,V]` to `[...]`."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
