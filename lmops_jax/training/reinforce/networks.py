"""What PPO and GRPO ask of the networks: log-probabilities, entropy and values of responses.

A batch is that of `rollouts.Rollouts`: prompts end in the same column, so the response's tokens are
predicted in the last R of S columns. Logits exist there alone, and a chunk of them at a time.

Parameters: `policy`, those of a `Transformer`; and with values, `value`, those of a `TokenValues`,
or with a shared trunk those of a `TokenHead`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmops_jax.models.heads import TokenHead, TokenValues, trunk_of
from lmops_jax.models.transformer import Transformer
from lmops_jax.training import loop, losses
from lmops_jax.training.reinforce import objectives


class Evaluated(NamedTuple):
  """What the networks say of a batch's responses.

  Attributes:
    log_probs: `[B,R] float32`, nats of each token.
    entropy: `[B,R] float32`, nats of the distribution that it was taken from.
    values: `[B,R] float32`, of the text in front of it; None without a value model.
  """

  log_probs: jax.Array
  entropy: jax.Array
  values: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Networks:
  """The policy and, if there is one, the value model.

  Attributes:
    model: the policy, a decoder.
    values: "none"; "separate", a trunk of its own, which begins as the policy's, so that the two
      objectives do not compete; or "shared", a head on the policy's last states.
  """

  model: Transformer
  values: str = "none"

  def init(self, key: jax.Array, policy: Any = None) -> dict[str, Any]:
    """Parameters whose trunks all begin as the policy.

    Args:
      key: key of new parameters.
      policy: the policy's parameters; None makes new ones, with Linen's boxes.
    """
    policy_key, value_key = jax.random.split(key)
    if policy is None:
      policy = loop.initializer(self.model)(policy_key)
    if self.values == "none":
      return {"policy": policy}
    config = self.model.config
    if self.values == "shared":
      states = jnp.zeros((1, config.width), jnp.float32)
      return {"policy": policy, "value": TokenHead(config).init(value_key, states)["params"]}
    fresh = TokenValues(config).init(value_key, jnp.zeros((1, 1), jnp.int32))["params"]
    trunk = jax.tree.map(jnp.copy, trunk_of(policy, fresh["trunk"]))
    return {"policy": policy, "value": {"trunk": trunk, "head": fresh["head"]}}

  def evaluate(
    self, params: Mapping[str, Any], batch: Mapping[str, jax.Array], late_values: bool = False
  ) -> Evaluated:
    """Everything that a loss reads.

    Args:
      params, batch: see the module.
      late_values: take the values one column late: of the text that ends in a token, not of the one
        in front of it.
    """
    states = _states(self.model, params["policy"], batch)
    log_probs, entropy = losses.of_logits(
      _log_probs_and_entropy, self.model, params["policy"], states, batch["targets"])
    if late_values:
      later = _with_last_column(batch)
      return Evaluated(log_probs, entropy, self.value(params, later))
    return Evaluated(log_probs, entropy, self._values(params, batch, states))

  def value(self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    """The values alone, `[B,R] float32`."""
    shared = self.values == "shared"
    states = _states(self.model, params["policy"], batch) if shared else None
    return self._values(params, batch, states)

  def _values(self, params, batch, states):
    if self.values == "none":
      return None
    config = self.model.config
    if self.values == "shared":
      return TokenHead(config).apply({"params": params["value"]}, states)
    values = TokenValues(config).apply({"params": params["value"]}, *_inputs(batch))
    return values[:, -batch["targets"].shape[1]:]


def log_probs(
  model: Transformer, params, batch: Mapping[str, jax.Array], head: Any = None
) -> jax.Array:
  """Nats of a batch's responses under one policy, `[B,R] float32`.

  Args:
    head: parameters whose output matrix is used; None takes those of `params`.
  """
  states = _states(model, params, batch)
  head = params if head is None else head
  nats = losses.of_logits(losses.cross_entropy, model, head, states, batch["targets"])
  return -nats


def on_live_trunk(params: Mapping[str, Any], reference: Mapping[str, Any], num_blocks: int):
  """The reference as Promptist's code has it: its top blocks and last norm on the policy's trunk.

  The policy's embeddings learn, so this reference drifts with them. Its output matrix is the
  reference's own, see `log_probs`.

  Args:
    params: the policy's. reference: what it began as. num_blocks: blocks of the reference.
  """
  mixed = jax.tree.map(
    lambda live, kept: jnp.concatenate([live[: len(live) - num_blocks], kept[-num_blocks:]]),
    params["layers"], reference["layers"])
  top = {"final_norm": reference["final_norm"]} if "final_norm" in reference else {}
  return {**params, "layers": mixed, **top}


def top_blocks_only(
  optimizer: optax.GradientTransformation, num_blocks: int
) -> optax.GradientTransformation:
  """An optimizer that leaves all but the policy's top blocks as they are.

  Embeddings, the last norm, the head and the value model stay free, as in Promptist's code. The
  gradients of frozen blocks count as 0, also for clipping, and weight decay passes them over.

  Args:
    optimizer: of `Networks.init`'s parameters.
    num_blocks: blocks that learn.
  """
  def masked(tree):
    def of_leaf(path, x):
      names = [getattr(part, "key", getattr(part, "name", None)) for part in path[:2]]
      if names != ["policy", "layers"]:
        return x
      learns = jnp.arange(x.shape[0]) >= x.shape[0] - num_blocks
      return jnp.where(learns.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)

  def update(grads, state, params=None):
    updates, state = optimizer.update(masked(grads), state, params)
    return masked(updates), state

  return optax.GradientTransformation(optimizer.init, update)


def _inputs(batch):
  return batch["tokens"], batch["positions"], batch["segment_ids"]


def _with_last_column(batch):
  """The batch with the last token of each row, so that its last R columns lie one further right."""
  last = batch["loss_mask"][:, -1:].astype(jnp.int32)
  positions = batch["positions"]
  return {
    **batch, "tokens": jnp.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1),
    "segment_ids": jnp.concatenate([batch["segment_ids"], last], axis=1),
    "positions": jnp.concatenate([positions, positions[:, -1:] + last], axis=1)}


def _states(model, params, batch):
  """Hidden states in the columns that predict the response, `[B,R,D]`."""
  states = model.apply({"params": params}, *_inputs(batch))
  return states[:, -batch["targets"].shape[1]:]


def _log_probs_and_entropy(logits, targets):
  return -losses.cross_entropy(logits, targets), objectives.entropy(logits)
