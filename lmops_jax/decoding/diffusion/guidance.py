"""Classifier-free guidance (arXiv:2207.12598): a network asked with and without its condition."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmops_jax.decoding.diffusion.plans import Predict


def guided(
  predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], condition: jax.Array,
  without: jax.Array | None, guidance: float,
) -> Predict:
  """A network that leans towards its condition: `without + guidance (with - without)`.

  Both are asked in one batch of twice the rows. A row with its condition stands beside the same one
  without it, so that rows which are split over devices stay where they are.

  Args:
    predict: `(samples [B,...], times [B], condition [B,S,X]) -> [B,...]`.
    condition: `[B,S,X]`.
    without: `[B,S,X]`, the condition to lean away from, such as that of the empty text; it may be
      None if `guidance` is 1.
    guidance: 1 asks the network once, with its condition alone.

  Raises:
    ValueError: as `check_guidance`.
  """
  check_guidance(guidance)
  if guidance == 1:
    return lambda x, times: predict(x, times, condition)
  both = _beside(without, condition)

  def ask(x: jax.Array, times: jax.Array) -> jax.Array:
    output = predict(_beside(x, x), _beside(times, times), both).astype(x.dtype)
    output = output.reshape(-1, 2, *output.shape[1:])
    return output[:, 0] + guidance * (output[:, 1] - output[:, 0])

  return ask


def check_guidance(guidance: float) -> None:
  """Raises ValueError unless the guidance is positive and finite."""
  if not 0 < guidance < float("inf"):
    raise ValueError(
      f"guidance={guidance} must be a number above 0; 1 draws as the condition says, 7.5 leans "
      "towards it."
    )


def _beside(a: jax.Array, b: jax.Array) -> jax.Array:
  """Rows of both in turns, `[2B,...]`."""
  return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
