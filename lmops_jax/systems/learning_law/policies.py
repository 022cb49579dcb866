"""Practical policies: weights from what training sees at a step, without looking ahead.

Each one is a setting with a `name` and `choose(bench) -> (Signals -> [N])`. They share the inner
run of the optimised policies, step for step, and so tell how much of the way local signals go.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.config.setting_types import Name, Share, component
from lmops_jax.control import ControlledRun, Signals
from lmops_jax.systems.learning_law.tasks import Task


class Bench(NamedTuple):
  """What a practical policy may use.

  Attributes:
    task: the task, of which only `train` and `dev` may be used.
    run: the inner run, with padded rows masked.
    padded: fills an array of the training examples up to the run's rows.
    train_on_dev: `params` after the run's steps on `dev` instead of `train`.
  """

  task: Task
  run: ControlledRun
  padded: Callable[[np.ndarray], jax.Array]
  train_on_dev: Callable[[], Any]


Policy = Callable[[Signals], jax.Array]


@runtime_checkable
class PracticalPolicy(Protocol):
  """A setting with a `name` that weights examples by what a step shows."""

  def choose(self, bench: Bench) -> Policy:
    """The policy on a task: a function from the `Signals` of a step to weights `[N]`."""


def _normalised(values: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Weights in proportion to `values >= 0`; uniform if all are 0."""
  mask = jnp.ones(values.shape, bool) if mask is None else mask
  values = jnp.where(mask, values, 0)
  total = jnp.sum(values)
  uniform = mask / jnp.sum(mask)
  return jnp.where(total > 0, values / jnp.where(total > 0, total, 1), uniform)


def _best_share(values: jax.Array, fraction: Any, mask: jax.Array | None) -> jax.Array:
  """Equal weights on the share of the examples with the largest values."""
  if mask is not None:
    values = jnp.where(mask, values, -jnp.inf)
  num = values.shape[0] if mask is None else jnp.sum(mask)
  count = jnp.clip(jnp.round(fraction * num), 1, num)
  rank = jnp.zeros(values.shape, jnp.int32).at[jnp.argsort(-values)].set(
    jnp.arange(values.shape[0], dtype=jnp.int32))
  return (rank < count) / count


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class LossProportional:
  """Weights in proportion to `loss ** power`: hard examples first."""

  power: float = 1.0
  name: Name = "loss"

  def choose(self, bench: Bench) -> Policy:
    """See the module."""
    return jax.tree_util.Partial(_by_loss, bench.run.mask, self.power)


def _by_loss(mask, power, signals: Signals) -> jax.Array:
  return _normalised(jnp.maximum(signals.losses, 0) ** power, mask)


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class GradientAlignment:
  """Weights in proportion to `max(CT, 0) ** power`, the contribution to the desired loss now.

  CT is `<grad L_dev, grad l_n>`: the optimal policy's signal with the costate replaced by the
  gradient, as in the paper's theorem 3.1.
  """

  power: float = 1.0
  name: Name = "alignment"

  def choose(self, bench: Bench) -> Policy:
    """See the module."""
    return jax.tree_util.Partial(_by_alignment, bench.run.mask, self.power)


def _by_alignment(mask, power, signals: Signals) -> jax.Array:
  return _normalised(jnp.maximum(signals.contributions["dev"], 0) ** power, mask)


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Short (easy) examples first: equal weights on a growing share in the order of difficulty.

  Attributes:
    start: share of the examples at step 0.
    pace: share of the steps after which all examples are in.
  """

  start: Share = 0.2
  pace: Share = 0.5
  name: Name = "curriculum"

  def choose(self, bench: Bench) -> Policy:
    """See the module."""
    ease = bench.padded(-np.asarray(bench.task.difficulty, np.float32))
    last = self.pace * bench.run.num_steps
    return jax.tree_util.Partial(_by_difficulty, bench.run.mask, ease, self.start, last)


def _by_difficulty(mask, ease, start, last, signals: Signals) -> jax.Array:
  share = jnp.minimum(start + (1 - start) * signals.step / last, 1)
  return _best_share(ease, share, mask)


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class RHO:
  """Equal weights on the examples with the largest reducible loss (arXiv 2206.07137).

  The irreducible loss is that of a model trained on `dev`.

  Attributes:
    fraction: share of the examples with weight.
  """

  fraction: Share = 0.25
  name: Name = "rho"

  def choose(self, bench: Bench) -> Policy:
    """See the module."""
    irreducible = jax.jit(bench.run.example_losses)(bench.train_on_dev(), bench.run.data)
    return jax.tree_util.Partial(
      functools.partial(_by_reducible_loss, self.fraction), bench.run.mask, irreducible)


def _by_reducible_loss(fraction, mask, irreducible, signals: Signals) -> jax.Array:
  return _best_share(signals.losses - irreducible, fraction, mask)
