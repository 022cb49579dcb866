"""One training step, pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from lmops_jax.mesh.micro_batches import DeviceRows, device_share, sum_over_micro_batches
from lmops_jax.training.train_state import TrainState


def make_train_step(
  example_losses: Callable, optimizer: optax.GradientTransformation, *, accumulate: int = 1,
  num_shards: int = 1, device_rows: DeviceRows | None = None,
) -> Callable:
  """`step(state, batch, weights=None) -> (state, metrics)`.

  The loss of a step is `sum_n weights[n] * l_n`; the default weights are `1 / B`.

  Args:
    example_losses: `(params, batch) -> [B] float32`.
    optimizer: any optax transformation.
    accumulate: micro-batches whose gradients are summed. Changes memory, not results.
    num_shards: devices that share a batch; a micro-batch has equally many rows on each of them (see
      `micro_batches.device_share`).
    device_rows: see `lmops_jax.mesh.micro_batches`. Changes communication and memory, not results.

  Returns:
    The step. Metrics are sums and counts over the batch: `loss_sum` (unweighted), `objective` (the
    weighted loss), `num_examples`, `num_tokens` (with a `loss_mask`), `grad_norm` (before
    clipping), `nonfinite` (1 if the loss or the gradient is not finite).

  Raises:
    ValueError: for `accumulate` below 1, and when tracing a batch that it does not divide.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate={accumulate} must be at least 1.")

  def weighted(params, batch, weights):
    losses = example_losses(params, batch)
    return jnp.vdot(weights, losses), jnp.sum(losses)

  grad = jax.value_and_grad(weighted, has_aux=True)

  def accumulated(params, batch, weights):
    size = weights.shape[0]
    if size % accumulate:
      raise ValueError(
        f"A batch of {size} examples does not split into accumulate={accumulate} micro-batches; "
        "choose a divisor."
      )
    rows = num_shards * device_share(size, size // accumulate, num_shards)
    return sum_over_micro_batches(
      lambda *args: (grad(*args), None), params, dict(batch), weights, rows, device_rows)[0]

  def step(state: TrainState, batch: Mapping[str, jax.Array], weights=None):
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    if weights is None:
      weights = jnp.full((num_examples,), 1 / num_examples, jnp.float32)
    (objective, loss_sum), grads = accumulated(state.params, batch, weights)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    metrics = {
      "loss_sum": loss_sum,
      "objective": objective,
      "num_examples": jnp.asarray(num_examples, jnp.int32),
      "grad_norm": grad_norm,
      "nonfinite": 1 - (jnp.isfinite(loss_sum) & jnp.isfinite(grad_norm)).astype(jnp.int32),
    }
    if "loss_mask" in batch:
      metrics["num_tokens"] = jnp.sum(batch["loss_mask"])
    return TrainState(state.step + 1, params, opt_state), metrics

  return step
