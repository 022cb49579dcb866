"""PPO and GRPO, two ways to learn from rollouts, chosen by gin.

Both are frozen values with the methods of `updates.Updating`. What a batch holds is told in
`rollouts`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import (
  NonNegative,
  Positive,
  PositiveInt,
  Probability,
  at_least,
  component,
)
from lmops_jax.training.reinforce import advantages as advantages_lib
from lmops_jax.training.reinforce import objectives
from lmops_jax.training.reinforce.kl_control import FixedKL, KLControl


@component(module="reinforce")
@dataclasses.dataclass(frozen=True)
class PPO:
  """Proximal policy optimisation (arXiv:1707.06347) of a language model, as in Promptist.

  A response's score comes at its end; on the way every token pays for leaving the reference. The
  defaults are those of Promptist (arXiv:2212.09611).

  Attributes:
    num_epochs, num_minibatches, accumulate, num_unfrozen_blocks, live_trunk: see
      `updates.Updating`; the last is what Promptist's code does.
    clip: how far a ratio of probabilities may leave 1.
    value_clip: how far a value may leave the old one; None for any distance.
    gamma, lam: of `advantages.gae`.
    value_weight: factor of the values' loss.
    entropy_weight: factor of the entropy, which is rewarded.
    whiten: whiten the advantages over the batch.
    whiten_padding: count places behind a response's end as advantages of 0 in that, see
      `advantages.with_padding`.
    kl: chooses the coefficient of the penalty.
    kl_at_end: see `advantages.token_rewards`.
    learn_cut_ends: whether the end of a response that was cut, which the policy did not choose,
      counts in the policy's loss.
    shared_trunk: let the values be a head on the policy's trunk, not a model of their own.
    late_values: let the loss read values of the text up to a token, where returns are of the text
      in front of it, as Promptist's code does; they are then learned one token late.
  """

  num_epochs: PositiveInt = 4
  num_minibatches: PositiveInt = 1
  accumulate: PositiveInt = 1
  clip: Positive = 0.2
  value_clip: Positive | None = 0.2
  gamma: Probability = 1.0
  lam: Probability = 0.95
  value_weight: NonNegative = 2.3
  entropy_weight: NonNegative = 0.0
  whiten: bool = True
  whiten_padding: bool = False
  kl: KLControl = FixedKL()
  kl_at_end: Literal[advantages_lib.AT_END] = "add"
  learn_cut_ends: bool = True
  shared_trunk: bool = False
  late_values: bool = False
  num_unfrozen_blocks: PositiveInt | None = None
  live_trunk: bool = False
  group_size = 1

  @property
  def values(self) -> str:
    """See `networks.Networks`."""
    return "shared" if self.shared_trunk else "separate"

  def prepare(self, networks, params, batch, coefficient):
    """See `updates.Updating`: old values, advantages, returns, and the tokens that count."""
    mask = batch["loss_mask"]
    values = jax.lax.stop_gradient(networks.value(params, batch))
    rewards = advantages_lib.token_rewards(
      batch["score"], batch["log_probs"], batch["reference"], mask, coefficient, self.kl_at_end)
    advantages, returns = advantages_lib.gae(rewards, values, mask, self.gamma, self.lam)
    policy_mask = mask if self.learn_cut_ends else _chosen_tokens(mask, batch["is_cut"])
    if self.whiten:
      over = advantages_lib.with_padding(policy_mask) if self.whiten_padding else policy_mask
      advantages = advantages_lib.whiten(jnp.where(policy_mask > 0, advantages, 0), over)
    errors = jnp.sum(jnp.square(returns - values) * mask) / jnp.sum(mask)
    return {
      **batch, "policy_mask": policy_mask, "old_values": values, "advantages": advantages,
      "returns": returns,
    }, {"value_error": errors}

  def weigh(self, rows):
    """See `updates.Updating`."""
    return {
      **rows, "policy_weights": objectives.mean_weights(rows["policy_mask"]),
      "value_weights": objectives.mean_weights(rows["loss_mask"]),
    }

  def objective(self, networks, params, rows, coefficient):
    """See `updates.Updating`: policy loss + `value_weight` value loss - `entropy_weight` entropy.
    """
    found = networks.evaluate(params, rows, self.late_values)
    policy, sums = _policy_loss(found, rows, self.clip, self.clip)
    value = jnp.sum(rows["value_weights"] * objectives.clipped_value_loss(
      found.values, rows["old_values"], rows["returns"], self.value_clip))
    loss = policy + self.value_weight * value - self.entropy_weight * sums["entropy"]
    return loss, {**sums, "value_loss": value}


@component(module="reinforce")
@dataclasses.dataclass(frozen=True)
class GRPO:
  """Group relative policy optimisation (arXiv:2402.03300): groups of responses, no value model.

  A response's advantage is its score against its group's. The penalty for leaving the reference
  stands in the loss; see `objectives.reference_penalty` for where it leads.

  Attributes:
    group_size: responses to each prompt.
    num_epochs, num_minibatches, accumulate, num_unfrozen_blocks, live_trunk: see
      `updates.Updating`.
    clip_low, clip_high: how far a ratio of probabilities may leave 1 downwards and upwards.
    by_spread: divide advantages by their group's standard deviation.
    mean: the mean of the loss over a batch, see `objectives.mean_weights`.
    kl: chooses the factor of the penalty; a fixed 0 leaves it out.
    entropy_weight, learn_cut_ends: as of `PPO`.
  """

  group_size: at_least(2) = 8
  num_epochs: PositiveInt = 1
  num_minibatches: PositiveInt = 1
  accumulate: PositiveInt = 1
  clip_low: Positive = 0.2
  clip_high: Positive = 0.2
  by_spread: bool = True
  mean: Literal[objectives.MEANS] = "sequence"
  kl: KLControl = FixedKL(0.04)
  entropy_weight: NonNegative = 0.0
  learn_cut_ends: bool = True
  num_unfrozen_blocks: PositiveInt | None = None
  live_trunk: bool = False
  values = "none"

  def prepare(self, networks, params, batch, coefficient):
    """See `updates.Updating`: advantages, and the tokens that count."""
    scores, mask = batch["score"], batch["loss_mask"]
    advantages = advantages_lib.group_advantages(scores, self.group_size, self.by_spread)
    groups = scores.reshape(-1, self.group_size)
    is_level = jnp.all(groups == groups[:, :1], axis=1)
    return {
      **batch, "advantages": advantages[:, None],
      "policy_mask": mask if self.learn_cut_ends else _chosen_tokens(mask, batch["is_cut"]),
    }, {"level_groups": jnp.mean(is_level.astype(jnp.float32))}

  def weigh(self, rows):
    """See `updates.Updating`."""
    return {
      **rows, "policy_weights": objectives.mean_weights(rows["policy_mask"], self.mean)}

  def objective(self, networks, params, rows, coefficient):
    """See `updates.Updating`: policy loss + coefficient k3 - `entropy_weight` entropy."""
    found = networks.evaluate(params, rows)
    policy, sums = _policy_loss(found, rows, self.clip_low, self.clip_high)
    penalty = jnp.sum(rows["policy_weights"] * objectives.reference_penalty(
      found.log_probs, rows["reference"]))
    loss = policy + coefficient * penalty - self.entropy_weight * sums["entropy"]
    return loss, {**sums, "penalty": penalty}


def _chosen_tokens(mask, is_cut):
  """The mask without the end slots of responses that were cut."""
  is_end = mask - jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  return mask - is_end * is_cut[:, None]


def _policy_loss(found, rows, low, high):
  """The clipped loss, and what is recorded of the policy."""
  weights, old = rows["policy_weights"], rows["log_probs"]
  ratio_parts = found.log_probs, old, rows["advantages"]
  loss = jnp.sum(weights * objectives.clipped_policy_loss(*ratio_parts, low, high))
  return loss, {
    "policy_loss": loss,
    "entropy": jnp.sum(weights * found.entropy),
    "clipped": jnp.sum(weights * objectives.clipped_share(*ratio_parts, low, high)),
    "drift": jnp.sum(weights * objectives.reference_penalty(old, found.log_probs)),
    "gain": jnp.sum(found.log_probs - old),
  }
