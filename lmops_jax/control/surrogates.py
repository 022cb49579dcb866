"""Surrogate derivatives by name, for operations whose own derivative is 0 almost everywhere.

The update of Lion, of sign SGD and of Rprop passes through a sign. Its derivative is 0, so that an
exact score is 0 whatever the example: true, and useless. A surrogate keeps the sign's value and
puts another derivative in its place, the straight-through estimator of quantised networks
(arXiv 1308.3432, section 4; clipped: arXiv 1602.02830, section 1.3).

"clipped_straight_through" takes the derivative of `clip(x / w, -1, 1)` with the width `w` held
constant: `1 / w` if `|x| <= w`, else 0. `w` is 4 times the mean of `|x|` over the entries of the
array that are not 0, since the argument of a sign (a gradient, a momentum) has no scale of its own.
A narrower window would give few entries a steep derivative, and the costates of a run near its
optimum would grow. If all entries are 0, the derivative stays 0.
"""

import jax
import jax.numpy as jnp

SURROGATES = ("clipped_straight_through",)
_WIDTH = 4.0  # of the mean absolute value


def rules(surrogate: str | None) -> dict:
  """Rules for `guards.finite_derivatives`, by the name of a primitive; none for None."""
  return {} if surrogate is None else {"sign": lambda eqn, params, x: _clipped_sign(x)}


@jax.custom_jvp
def _clipped_sign(x: jax.Array) -> jax.Array:
  return jnp.sign(x)


@_clipped_sign.defjvp
def _clipped_sign_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  wide = jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  width = _WIDTH * jnp.sum(wide) / jnp.maximum(jnp.sum(wide > 0), 1)
  has_slope = width >= jnp.finfo(width.dtype).tiny  # below, 1 / width is infinite
  slope = jnp.where(has_slope & (wide <= width), 1 / jnp.where(has_slope, width, 1), 0)
  return jnp.sign(x), (slope * tangent).astype(x.dtype)
