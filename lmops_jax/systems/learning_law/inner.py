"""The inner run: full-batch training of a task's model, whose weights a policy chooses."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax import control
from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.mesh.meshes import BATCH_AXES, Partitioner
from lmops_jax.sizing import solve_cost
from lmops_jax.systems.learning_law.tasks import Task

MONITORED = ("select", "test")  # their losses are recorded and steer nothing within a run


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Training:
  """How the model is trained under a policy.

  Attributes:
    num_steps: T.
    optimizer: any optax transformation; the paper's is plain gradient descent, rate 0.1.
    trajectory: what the reverse pass keeps, "all", "sqrt", "host" or a number of states.
    micro_batch_size: training examples differentiated at once; None: all.
    target_batch_size: examples of the other parts evaluated at once; None: all.
    surrogate: "clipped_straight_through" for an optimizer whose update is piecewise constant, such
      as Lion, see `control.surrogates`.
  """

  num_steps: PositiveInt
  optimizer: optax.GradientTransformation
  trajectory: Literal["all", "sqrt", "host"] | PositiveInt = "all"
  micro_batch_size: PositiveInt | None = None
  target_batch_size: PositiveInt | None = None
  surrogate: Literal[control.SURROGATES] | None = None

  @property
  def options(self) -> control.SolveOptions:
    """Options of the solves, all of the same run."""
    return control.SolveOptions(
      trajectory=self.trajectory, micro_batch_size=self.micro_batch_size, surrogate=self.surrogate)

  def check_optimizer(self, params: Any) -> None:
    """Refuses an optimizer that would leave every policy as it is.

    Args:
      params: arrays or `ShapeDtypeStruct`s.
    """
    control.check_optimizer(self.optimizer, params, self.surrogate, "learning_law.Training.")

  def on(self, task: Task, init_seed: int, partitioner: Partitioner) -> InnerRun:
    """The run on a task's data from the initialisation of `init_seed`."""
    return InnerRun(self, task, init_seed, partitioner)


class InnerRun:
  """A `control.ControlledRun` on a mesh, and how arrays of a task get in and out of it.

  Attributes:
    control: the run; its rows are the training examples, then copies that fill up the mesh and
      never get weight.
    target_losses: part to `params -> loss`.
  """

  def __init__(self, training: Training, task: Task, init_seed: int, partitioner: Partitioner):
    self.training, self.task, self.partitioner = training, task, partitioner
    self.init_seed = init_seed
    shards = partitioner.num_batch_shards
    self.num_rows = -(-task.num_train // shards) * shards
    self.params = self._initial(init_seed)
    training.check_optimizer(self.params)
    self.target_losses = {
      part: self._target(part) for part in ("dev", *MONITORED)
    }
    mask = None
    if self.num_rows > task.num_train:
      mask = jax.device_put(np.arange(self.num_rows) < task.num_train,
                            partitioner.batch_sharding(1))
    monitored = {part: self.target_losses[part] for part in MONITORED}
    with partitioner.activate():
      self.control = control.controlled_run(
        task.example_losses, self.target_losses["dev"], training.optimizer, self.params,
        self._placed(task.parts["train"], self.num_rows), training.num_steps, mask=mask,
        monitor=jax.tree_util.Partial(losses_at, monitored), options=training.options,
      )

  def _initial(self, seed: int) -> Any:
    boxed = jax.eval_shape(self.task.boxed_params, jax.random.key(seed))
    shardings = self.partitioner.shardings(boxed, uneven="whole")
    with self.partitioner.activate():
      make = jax.jit(lambda key: nn.unbox(self.task.boxed_params(key)), out_shardings=shardings)
      return make(jax.random.key(seed))

  def _placed(self, batch, num_rows):
    """A part filled up to `num_rows` with copies of its first rows, over the mesh."""
    rows = np.arange(num_rows) % len(next(iter(batch.values())))
    return self.partitioner.place_batch({name: value[rows] for name, value in batch.items()})

  def _target(self, part: str) -> control.targets.MeanTargetLoss:
    batch = self.task.parts[part]
    num = len(next(iter(batch.values())))
    shards = self.partitioner.num_batch_shards
    return control.mean_target_loss(
      self.task.example_losses, self._placed(batch, -(-num // shards) * shards),
      self.training.target_batch_size, num_rows=num,
    )

  def padded(self, values: np.ndarray) -> jax.Array:
    """`[N]` values of the training examples as `[rows]`, 0 for rows that are no example."""
    values = np.asarray(values)
    filled = np.zeros(self.num_rows, values.dtype)
    filled[:len(values)] = values
    return jax.device_put(filled, self.partitioner.batch_sharding(1))

  def place_policy(self, gamma: np.ndarray) -> jax.Array:
    """`[T,N]` weights as `[T,rows]`, split over the mesh by example."""
    gamma = np.asarray(gamma, np.float32)
    filled = np.zeros((len(gamma), self.num_rows), np.float32)
    filled[:, :gamma.shape[1]] = gamma
    spec = jax.sharding.PartitionSpec(None, BATCH_AXES)
    return jax.device_put(filled, jax.sharding.NamedSharding(self.partitioner.mesh, spec))

  def policy_of(self, weights: jax.Array) -> np.ndarray:
    """`[T,rows]` weights back as `[T,N]` on the host."""
    return np.asarray(weights)[:, :self.task.num_train]

  def uniform(self) -> np.ndarray:
    """The weights of conventional training, `[T,N]`."""
    num = self.task.num_train
    return np.full((self.training.num_steps, num), 1 / num, np.float32)

  @functools.cached_property
  def cost(self) -> Cost:
    """What this run computes and holds."""
    sizes = {part: len(next(iter(batch.values()))) for part, batch in self.task.parts.items()}
    return cost_of(self.training, self.params, self.task.forward_flops, sizes)


class Cost(NamedTuple):
  """Operations and bytes of an inner run, over all devices.

  Attributes:
    num_params: P.
    run_flops: operations of training once, with the losses that are recorded.
    epoch_flops: those of a forward and a reverse pass, one outer epoch without line search.
    contribution_flops: those of the contributions to one part's loss at all steps.
    trajectory_bytes: bytes of the states that the reverse pass keeps.
    policy_bytes: bytes of the weights `[T,N] float32`.
  """

  num_params: int
  run_flops: float
  epoch_flops: float
  contribution_flops: float
  trajectory_bytes: int
  policy_bytes: int


def cost_of(
  training: Training, params: Any, forward_flops: float, sizes: Mapping[str, int]
) -> Cost:
  """The cost of a run, from shapes alone.

  Args:
    params: arrays or `ShapeDtypeStruct`s.
    forward_flops: operations of a forward pass on one example.
    sizes: number of examples of each part.
  """
  num_steps = training.num_steps
  passes = solve_cost.solve_passes(training.optimizer, params, num_steps, training.options)
  monitored = sum(sizes[part] for part in MONITORED) * (num_steps + 1)
  state = jax.eval_shape(
    lambda p: control.dynamics.init_state(training.optimizer.init, training.optimizer.update, p),
    params)
  state_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
  desired = sizes["dev"] * (num_steps + 1) + monitored
  contributions = solve_cost.SLOPES * sizes["train"] + solve_cost.GRADIENT * sizes["dev"]
  return Cost(
    num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
    run_flops=forward_flops * (solve_cost.GRADIENT * sizes["train"] * num_steps + desired),
    epoch_flops=forward_flops * (
      passes.batch * sizes["train"] + passes.target * sizes["dev"] + monitored),
    contribution_flops=forward_flops * num_steps * contributions,
    trajectory_bytes=state_bytes * control.trajectory.num_slots(training.trajectory, num_steps),
    policy_bytes=4 * num_steps * sizes["train"],
  )


@jax.jit
def losses_at(losses: Mapping[str, Any], params: Any) -> dict[str, jax.Array]:
  """Losses of several parts."""
  return {part: loss(params) for part, loss in losses.items()}


def check_finite(losses: np.ndarray, what: str) -> None:
  """Refuses a diverged run and names the first step whose loss is not finite."""
  losses = np.asarray(losses, np.float64)
  bad = np.flatnonzero(~np.isfinite(losses))
  if bad.size:
    raise FloatingPointError(
      f"{what} diverged: the desired loss is {losses[bad[0]]} after step {bad[0]} of "
      f"{len(losses) - 1}; lower the inner learning rate."
    )


def host(tree: Any) -> Any:
  """Arrays of a result on the host."""
  return jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), tree)
