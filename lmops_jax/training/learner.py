"""What a system hands to the training loop: how a state begins, and what a step makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.control import dynamics
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.mesh.micro_batches import DeviceRows, device_share


def _accept(batch: Mapping[str, np.ndarray]) -> None:
  """Accepts any batch."""


class Learner(NamedTuple):
  """Pure functions, like an optax pair. The state is any pytree of arrays.

  A state may hold more than parameters: prototypes, a frozen reference, moving averages. The loop
  places it on the mesh, donates it from step to step, and checkpoints all of it. It does so for
  every learner alike, so a learner need not know of meshes.

  Learners that share their functions share the compiled programs: make the functions once (a cached
  maker, functions of a module), not anew for every run.

  Attributes:
    init: `(key, params=None) -> state`, the state before step 0, with Linen's boxes around arrays
      that have logical axes. Given `params`, a plain tree, it starts from them.
    step: `(state, batch, key) -> (state, sums)`, traced once. `batch` holds the arrays `[B, ...]`
      of the source without `example_id`; `key` differs in each step and is a function of the run's
      seed and the step alone. `sums` is a flat dict of scalars: sums and counts, which the host
      divides. It needs `loss_sum`, `num_examples`, `grad_norm` and `nonfinite`; the run ends if
      the last is not 0. `<name>_sum` is recorded as `<name>`, its mean over examples; other
      `num_<things>` are recorded as totals since the start of the run, and anything else as its
      mean over steps. `objective`, the loss that is descended, is not recorded.
    params: `state -> params`, the tree that hooks and sources see and that is kept.
    check: called with every batch while it is on the host; raises ValueError for one that cannot
      be learned from.
    settings: JSON values that a run must still have when it resumes.
  """

  init: Callable[..., Any]
  step: Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[Any, dict[str, jax.Array]]]
  params: Callable[[Any], Any]
  check: Callable[[Mapping[str, np.ndarray]], None] = _accept
  settings: Mapping[str, Any] = {}


def supervised(
  init_params: Callable[[jax.Array], Any], example_losses: Callable,
  optimizer: optax.GradientTransformation, *, accumulate: int = 1, keyed: bool = False,
  check_batch: Callable | None = None, partitioner: Partitioner | None = None,
) -> Learner:
  """The usual learner: it descends the mean of a loss. Its state is `control.dynamics.State`.

  Args:
    init_params: `key -> params`, with Linen's boxes around parameters that have logical axes.
    example_losses: `(params, batch) -> [B] float32`.
    optimizer: any optax transformation. No gradient is computed for parameters whose gradient it
      does not read, such as those that `optim.partition` freezes.
    accumulate: micro-batches whose gradients are summed. It changes memory, not results.
    keyed: whether the losses draw at random (dropout): `batch["key"] [B]` then holds a key for each
      example, so that the draws depend neither on the micro-batches nor on the mesh.
    check_batch: see `Learner.check`.
    partitioner: the partitioner of the run; None is one device. It changes communication and
      memory, not results.

  Raises:
    ValueError: for `accumulate` below 1; and when a batch that it does not divide is traced.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate={accumulate} must be at least 1.")
  num_shards, device_rows = (
    (1, None) if partitioner is None else (partitioner.num_batch_shards, partitioner.device_rows))
  init, step = _supervised(
    init_params, example_losses, optimizer, accumulate, keyed, num_shards, device_rows)
  return Learner(init, step, _params, check_batch or _accept, {"accumulate": accumulate})


def _params(state: dynamics.State) -> Any:
  return state.params


@functools.lru_cache(maxsize=16)
def _supervised(
  init_params, example_losses, optimizer, accumulate: int, keyed: bool, num_shards: int,
  device_rows: DeviceRows | None,
) -> tuple[Callable, Callable]:
  """The functions of `supervised`; equal parts give the same ones, which then compile once."""

  def init(key, params=None):
    params = init_params(key) if params is None else params
    return dynamics.init_state(optimizer.init, optimizer.update, params)

  def step(state, batch, key):
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    if num_examples % accumulate:
      raise ValueError(
        f"A batch of {num_examples} examples does not split into accumulate={accumulate} "
        "micro-batches; choose a divisor."
      )
    own_rows = device_share(num_examples, num_examples // accumulate, num_shards)
    inputs = {**batch, "key": jax.random.split(key, num_examples)} if keyed else dict(batch)
    weights = jnp.full((num_examples,), 1 / num_examples, jnp.float32)
    state, found = dynamics.step(
      example_losses, optimizer.update, state, inputs, weights,
      micro_batch_size=num_shards * own_rows, device_rows=device_rows)
    is_finite = jnp.isfinite(found.loss_sum) & jnp.isfinite(found.grad_norm)
    sums = {
      "loss_sum": found.loss_sum,
      "objective": found.objective,
      "num_examples": jnp.asarray(num_examples, jnp.int32),
      "grad_norm": found.grad_norm,
      "nonfinite": 1 - is_finite.astype(jnp.int32),
    }
    if "loss_mask" in batch:
      sums["num_tokens"] = jnp.sum(batch["loss_mask"])
    return state, sums

  return init, step
