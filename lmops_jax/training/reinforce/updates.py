"""The learner that PPO and GRPO share: one step of the loop is one batch of rollouts.

A step computes advantages once, with the parameters that wrote the rollouts, and then takes
`num_epochs * num_minibatches` optimizer steps in one scan. So the loop's checkpoints always lie
between two batches of rollouts: a resumed run asks its source for the next ones, which are a
function of seed, step and parameters, and no rollout has to be kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lmops_jax.control import dynamics
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.mesh.micro_batches import DeviceRows, device_share, sum_over_micro_batches
from lmops_jax.models.partitioning import constrain
from lmops_jax.models.transformer import Transformer
from lmops_jax.training.learner import Learner
from lmops_jax.training.losses import check_batch
from lmops_jax.training.reinforce.kl_control import KLControl
from lmops_jax.training.reinforce.networks import Networks, top_blocks_only


class State(NamedTuple):
  """What a run of reinforcement learning has between two batches of rollouts.

  Attributes:
    params: those of `networks.Networks`.
    opt_state: the optimizer's.
    coefficient: `[] float32`, of the penalty for leaving the reference.
  """

  params: Any
  opt_state: Any
  coefficient: jax.Array


class Updating(Protocol):
  """What an algorithm adds to the shared learner; a hashable value.

  Attributes:
    group_size: responses to each prompt, which stand together in a batch.
    num_epochs: times that a batch is learned from.
    num_minibatches: optimizer steps of an epoch.
    accumulate: micro-batches of an optimizer step; it changes memory, not results.
    kl: chooses the coefficient of the penalty.
    num_unfrozen_blocks: the policy's top blocks that learn; None is all.
    live_trunk: whether the reference is these blocks, as they were, on the policy's trunk, which
      its embeddings move; else all of the policy as it was.
    values: what kind of value model there is, see `Networks`.
  """

  group_size: int
  num_epochs: int
  num_minibatches: int
  accumulate: int
  kl: KLControl
  num_unfrozen_blocks: int | None
  live_trunk: bool
  values: str

  def prepare(
    self, networks: Networks, params: Any, batch: Mapping[str, jax.Array], coefficient: jax.Array,
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Arrays `[B,...]` that stay as they are during the updates, and sums to record."""

  def weigh(self, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The rows of an optimizer step, with the weights of their tokens added."""

  def objective(
    self, networks: Networks, params: Any, rows: Mapping[str, jax.Array], coefficient: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a micro-batch, and figures; both add up over the micro-batches of a step.

    The figure `gain`, which is not recorded, is the sum over all rows and places of what
    log-probabilities have gained since the batch was written.
    """


def learner(
  algorithm: Updating, model: Transformer, optimizer: optax.GradientTransformation,
  partitioner: Partitioner | None = None,
) -> Learner:
  """The learner of an algorithm. Its `params` are the policy's alone.

  Args:
    algorithm: such as `algorithms.PPO()`.
    model: the policy.
    optimizer: of the parameters `policy/...` and `value/...`.
    partitioner: the partitioner of the run; None is one device.

  Raises:
    ValueError: for more unfrozen blocks than the model has; and, when a batch is traced, if its
      rows do not split into minibatches, micro-batches and groups.
  """
  num_layers, unfrozen = model.config.num_layers, algorithm.num_unfrozen_blocks
  if unfrozen is not None and unfrozen > num_layers:
    raise ValueError(
      f"num_unfrozen_blocks={unfrozen} is more than the {num_layers} blocks of the model; lower "
      "it, or set it to None for all."
    )
  num_shards, device_rows = (
    (1, None) if partitioner is None else (partitioner.num_batch_shards, partitioner.device_rows))
  if algorithm.live_trunk and unfrozen is None:
    raise ValueError(
      "live_trunk=True lets the reference's top blocks stand on the policy's trunk, and "
      "num_unfrozen_blocks=None says of none how many; set it, to 2 as in Promptist's code."
    )
  init, step = _functions(algorithm, model, optimizer, num_shards, device_rows)
  settings = {
    "algorithm": type(algorithm).__name__, **dataclasses.asdict(algorithm),
    "kl": {"kind": type(algorithm.kl).__name__, **dataclasses.asdict(algorithm.kl)},
  }
  check = functools.partial(check_batch, vocab_size=model.config.vocab_size)
  return Learner(init, step, _policy, check, settings)


def num_passes(algorithm: Updating) -> int:
  """Forward passes of a decoder that scoring a rollout and learning from it take; a gradient counts
  as two of them."""
  trunks = 2 if algorithm.values == "separate" else 1
  return 2 + (trunks - 1) + 3 * trunks * algorithm.num_epochs


def live_blocks(algorithm: Updating) -> int | None:
  """What `rollouts.Rollouts` takes as its `live_blocks`."""
  return algorithm.num_unfrozen_blocks if algorithm.live_trunk else None


def _policy(state: State) -> Any:
  return state.params["policy"]


@functools.lru_cache(maxsize=16)
def _functions(algorithm, model, optimizer, num_shards: int, device_rows: DeviceRows | None):
  """The functions of `learner`; equal parts give the same ones, which then compile once."""
  networks = Networks(model, algorithm.values)
  if algorithm.num_unfrozen_blocks is not None:
    optimizer = top_blocks_only(optimizer, algorithm.num_unfrozen_blocks)

  def init(key, params=None):
    state = dynamics.init_state(optimizer.init, optimizer.update, networks.init(key, params))
    return State(*state, jnp.asarray(algorithm.kl.coefficient, jnp.float32))

  def step(state, batch, key):
    num_rows = batch["targets"].shape[0]
    size, micro = _sizes(algorithm, num_rows, num_shards)
    rows, figures = algorithm.prepare(networks, state.params, batch, state.coefficient)
    order = _order(key, num_rows, algorithm.num_epochs, algorithm.num_minibatches)

    def part(whole, rows, weights):
      params, coefficient = whole
      (loss, sums), grads = jax.value_and_grad(
        lambda p: algorithm.objective(networks, p, rows, coefficient), has_aux=True)(params)
      return (grads, {**sums, "objective": loss}), None

    def update(held, index):
      chosen = rows
      if algorithm.num_minibatches > 1:
        chosen = jax.tree.map(lambda x: _placed(x[index]), rows)
      (grads, sums), _ = sum_over_micro_batches(
        part, (held.params, state.coefficient), algorithm.weigh(chosen),
        jnp.ones(size, jnp.float32), micro, device_rows)
      sums["grad_norm"] = optax.tree.norm(grads)
      return dynamics.apply_update(optimizer.update, held, grads), sums

    def followed(coefficient, gain):
      return algorithm.kl.after(coefficient, gain / size, size), None

    held, found = jax.lax.scan(update, dynamics.State(state.params, state.opt_state), order)
    is_finite = jnp.all(jnp.isfinite(found["objective"]) & jnp.isfinite(found["grad_norm"]))
    gains = found.pop("gain")
    found = {name: jnp.mean(values) for name, values in found.items()}
    kl = _kl(batch)
    sums = {
      **found, **figures, "coefficient": state.coefficient,
      "loss_sum": found["objective"] * num_rows,
      "score_sum": jnp.sum(batch["score"]),
      "kl_sum": kl * num_rows,
      "response_tokens_sum": jnp.sum(batch["loss_mask"]),
      "cut_sum": jnp.sum(batch["is_cut"]),
      "num_examples": jnp.asarray(num_rows, jnp.int32),
      "num_tokens": jnp.sum(batch["loss_mask"]),
      "nonfinite": 1 - is_finite.astype(jnp.int32),
    }
    if algorithm.kl.follows == "updates":
      coefficient, _ = jax.lax.scan(followed, state.coefficient, gains)
    else:
      coefficient = algorithm.kl.after(state.coefficient, kl, num_rows)
    return State(*held, jnp.asarray(coefficient, jnp.float32)), sums

  return init, step


def _kl(batch):
  """Nats a response by which the rollouts' policy has left the reference, `[]`."""
  return jnp.sum((batch["log_probs"] - batch["reference"]) * batch["loss_mask"]) / len(
    batch["score"])


def _sizes(algorithm, num_rows: int, num_shards: int) -> tuple[int, int]:
  """Rows of an optimizer step, and of a micro-batch."""
  parts = algorithm.num_minibatches * algorithm.accumulate
  if num_rows % parts or num_rows // algorithm.num_minibatches % num_shards:
    raise ValueError(
      f"A batch of {num_rows} rollouts does not split into num_minibatches="
      f"{algorithm.num_minibatches} of accumulate={algorithm.accumulate} micro-batches on "
      f"{num_shards} devices; choose divisors."
    )
  if num_rows % algorithm.group_size:
    raise ValueError(
      f"A batch of {num_rows} rollouts does not split into groups of group_size="
      f"{algorithm.group_size}; choose a divisor."
    )
  size = num_rows // algorithm.num_minibatches
  return size, num_shards * device_share(size, size // algorithm.accumulate, num_shards)


def _order(key, num_rows: int, num_epochs: int, num_minibatches: int) -> jax.Array:
  """Rows of each optimizer step, `[steps,n]`: every epoch goes once through all of them."""
  keys = jax.random.split(key, num_epochs)
  orders = jax.vmap(lambda key: jax.random.permutation(key, num_rows))(keys)
  return orders.reshape(num_epochs * num_minibatches, -1)


def _placed(x):
  return constrain(x, ("batch",) + (None,) * (x.ndim - 1))
