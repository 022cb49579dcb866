"""A linear classifier without bias, the smallest model of the learning law (arXiv 2402.17759)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import PositiveInt, component


@component(module="models")
@dataclasses.dataclass(frozen=True)
class PerceptronConfig:
  """Sizes of a perceptron.

  Attributes:
    dim: D, the number of an example's inputs.

  Raises:
    ValueError: for a dim below 1.
  """

  dim: PositiveInt = 128



class Perceptron(nn.Module):
  """`[B,D]` inputs to `[B]` logits of the label 1: a product with `theta [D]`.

  `theta` starts uniform between -1 / sqrt(D) and 1 / sqrt(D).
  """

  config: PerceptronConfig

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    dim = self.config.dim
    bound = dim**-0.5
    theta = self.param(
      "theta", lambda key: jax.random.uniform(key, (dim,), jnp.result_type(float), -bound, bound)
    )
    return inputs @ theta
