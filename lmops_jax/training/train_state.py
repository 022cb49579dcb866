"""What one training step carries to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
  """The state before step `step`.

  Attributes:
    step: `[] int32`, steps done.
    params: tree of parameters.
    opt_state: of the optax transformation.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before step 0."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(init_params, optimizer: optax.GradientTransformation, key) -> TrainState:
  """Shapes of the state, with Linen's boxes where `init_params(key)` makes them."""
  return jax.eval_shape(lambda key: new_state(init_params(key), optimizer), key)
