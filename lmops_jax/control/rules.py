"""Steps on data weights along their scores: how an outer loop moves what it has found.

A rule has `move(gamma, scores, rate, mask)` and `max_rate`. It moves every row of the weights
alike, so it serves one weight an example (`outer`) and one for each step and example (`policy`).
"""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import component
from lmops_jax.control.simplex import METHODS, project_simplex


@runtime_checkable
class Rule(Protocol):
  """A rule of this module, or another with a `max_rate`."""

  def move(self, gamma: jax.Array, scores: jax.Array, rate: float, mask: Any = None) -> jax.Array:
    """The rows after a step of `rate` along `scores`, like `gamma`."""


def check_rule(rule: Any) -> None:
  """Refuses what is no rule, classes included."""
  if isinstance(rule, type) or not (hasattr(rule, "move") and hasattr(rule, "max_rate")):
    raise ValueError(
      f"rule must be a rule such as ProjectedGradient(), with move and max_rate, got {rule!r}.")


@component(module="policy")
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
  """`project(gamma + rate * scores)` in each row: PDS's step, and that of the Learning Law.

  Attributes:
    method: how to project, see `project_simplex`; "bisect" is several times faster on a CPU,
      leaves examples where they are on a mesh, and is as exact.
  """
  method: Literal[METHODS] = "bisect"
  max_rate = float("inf")

  def move(self, gamma, scores, rate, mask=None):
    """See `Rule`; `mask` is False for entries that are no examples."""
    # The projection ignores a common shift of a row; without it the digits are kept.
    shift = _masked_mean(scores, mask)
    return project_simplex(gamma + rate * (scores - shift), mask, self.method).astype(gamma.dtype)


@component(module="policy")
@dataclasses.dataclass(frozen=True)
class ExponentiatedGradient:
  """`gamma * exp(rate * scores)`, normalised in each row: mirror descent with entropy.

  Weights vanish geometrically and may underflow to 0 in the end; a weight of 0 stays 0.
  """
  max_rate = float("inf")

  def move(self, gamma, scores, rate, mask=None):
    """See `Rule`."""
    # The best score with weight: relative to a better one without, all weights could underflow.
    best = jnp.max(jnp.where(gamma > 0, scores, -jnp.inf), -1, keepdims=True)
    new = gamma * jnp.exp(jnp.minimum(rate * (scores - best), 0))
    return (new / jnp.sum(new, -1, keepdims=True)).astype(gamma.dtype)


@component(module="policy")
@dataclasses.dataclass(frozen=True)
class FrankWolfe:
  """`(1 - rate) gamma + rate * best vertex` in each row; a rate is between 0 and 1."""
  max_rate = 1.0

  def move(self, gamma, scores, rate, mask=None):
    """See `Rule`."""
    best = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    vertex = jax.nn.one_hot(jnp.argmax(best, -1), gamma.shape[-1], dtype=gamma.dtype)
    return gamma + jnp.asarray(rate, gamma.dtype) * (vertex - gamma)


@component(module="policy")
@dataclasses.dataclass(frozen=True)
class SignGradient:
  """Every weight one step of the same size up or down, not below 0, and normalised in each row.

  The step of metagradient descent's data selection (arXiv 2503.13751, section 4): how often an
  example occurs changes by `-sign(metagradient)`, on a random share p of the examples. Weights need
  no whole numbers, so here all change by `rate / N`, N examples: with `rate = p` the mean of that
  step from uniform weights. The sign is that of the score less its mean under `gamma`, the
  derivative for weights that are normalised; the paper adds to the loss of a step and takes the
  sign of the score itself, which early in training is the same for nearly all examples.
  """
  max_rate = float("inf")

  def move(self, gamma, scores, rate, mask=None):
    """See `Rule`."""
    is_example = jnp.ones(scores.shape, bool) if mask is None else jnp.broadcast_to(
      mask, scores.shape)
    # Relative to the best score, so that rounding cannot put all examples below their mean.
    behind = scores - jnp.max(scores, -1, keepdims=True, where=is_example, initial=-jnp.inf)
    better = jnp.sign(behind - jnp.sum(jnp.where(is_example, gamma * behind, 0), -1, keepdims=True))
    step = rate / jnp.sum(is_example, -1, keepdims=True)
    new = jnp.where(is_example, jnp.maximum(gamma + step * better, 0), 0)
    return (new / jnp.sum(new, -1, keepdims=True)).astype(gamma.dtype)


def _masked_mean(scores, mask):
  if mask is None:
    return jnp.mean(scores, axis=-1, keepdims=True)
  return jnp.sum(jnp.where(mask, scores, 0), -1, keepdims=True) / jnp.sum(mask)
