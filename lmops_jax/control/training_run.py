"""The training run whose data a solve scores, as it is given and as compiled functions take it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lmops_jax.control import checks
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import strong
from lmops_jax.control.options import SolveOptions
from lmops_jax.mesh.micro_batches import DeviceRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingRun:
  """T steps of an optimizer over given batches.

  Attributes:
    example_losses: `(params, batch) -> [B]` losses, for any per-example loss.
    optimizer: any `optax.GradientTransformation`; it is run on the raw gradient of each step's
      weighted loss, starting from `optimizer.init(params)`.
    params: pytree of floating-point leaves of any shape, before the first step.
    batches: pytree with leaves `[T, B, ...]`.
    weights: `[T, B]`, finite and >= 0; the loss of step t is `sum_n weights[t, n] * l_n`. None
      means `1 / B` everywhere.
    device_rows: how the batches lie on a mesh, if gradients are to be added over the mesh once a
      step, after sums over each device's rows (see `micro_batches`); B is a multiple of its shards.
      None leaves it to the partitioner. `mean_target_loss` has its own.
  """
  example_losses: Callable
  optimizer: Any
  params: Any
  batches: Any
  weights: Any = None
  device_rows: DeviceRows | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def num_steps(self) -> int:
    """T, of a run whose weights are given."""
    return self.weights.shape[0]

  def batch_at(self, t: jax.Array) -> Any:
    """The batch of step t, which may be traced."""
    return batch_at(self.batches, t)

  def traceable(self) -> "TrainingRun":
    """This run as an argument of jitted functions, its own functions included."""
    return dataclasses.replace(
      self, example_losses=as_pytree(self.example_losses),
      optimizer=optax.GradientTransformation(
        as_pytree(self.optimizer.init), as_pytree(self.optimizer.update)))


def batch_at(batches: Any, t: jax.Array) -> Any:
  """The batch of step t, which may be traced, from leaves `[T, B, ...]`."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, keepdims=False), batches)


def prepare(run: TrainingRun, target_loss: Callable, proxy: Any,
            options: SolveOptions) -> tuple[TrainingRun, Callable, Any, SolveOptions]:
  """Checks the arguments of a solve and makes them those of its compiled functions.

  Raises:
    ValueError: for arguments that do not fit together, in one sentence.
  """
  checks.optimizer(run.optimizer)
  checks.parameters(run.params)
  num_steps, batch_size = checks.leading_axes(run.batches, "batches", 2, "T, B")
  params, batches = strong(run.params), checks.arrays(run.batches, "batches")
  weights = run.weights
  if weights is None:
    weights = jnp.full((num_steps, batch_size), 1 / batch_size)
  weights = checks.array(weights, "weights")
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    weights = weights.astype(jnp.result_type(float))
  weights = strong(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)))
  checks.step_weights(weights, num_steps, batch_size)
  checks.losses(run.example_losses, params, jax.tree.map(lambda x: x[0], batches), batch_size,
                "a batch")
  checks.target(target_loss, params)
  checks.device_rows(run.device_rows, batches=batch_size)
  if proxy is not None:
    num_proxies, = checks.leading_axes(proxy, "proxy", 1, "M")
    proxy = checks.arrays(proxy, "proxy")
    checks.losses(run.example_losses, params, proxy, num_proxies, "proxy")
    checks.device_rows(run.device_rows, proxy=num_proxies)
  run = dataclasses.replace(run, params=params, batches=batches, weights=weights)
  return run.traceable(), as_pytree(target_loss), proxy, options.checked(num_steps, batch_size)


def shardings_of(tree: Any) -> tuple:
  """Each leaf's NamedSharding if it is an array over several devices, else None."""
  def sharding(x):
    found = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) and found.mesh.size > 1 else None
  return tuple(map(sharding, jax.tree.leaves(tree)))


def constrain(shardings: tuple, tree: Any) -> Any:
  """`tree` with leaves pinned to `shardings` (None leaves it to the partitioner)."""
  leaves, treedef = jax.tree.flatten(tree)
  pinned = [x if s is None else jax.lax.with_sharding_constraint(x, s)
            for x, s in zip(leaves, shardings, strict=True)]
  return treedef.unflatten(pinned)
