"""Finite derivatives for optimizer updates at the points where they have none.

Differentiating a stock optimizer meets `sqrt(0)` (Adam's second moment of an embedding row that was
never used), `0 / 0` (the global norm of a zero gradient, in the branch that clipping does not take)
and `nan * x` (RAdam's rectification in its first steps, also not taken). Autodiff answers
`inf * 0 = nan` there. Those terms are defined as zero here, which is the slope of Adam's update at
a second moment of 0 for a coordinate whose gradient stays 0.

`finite_derivatives` traces any JAX function and evaluates its jaxpr again with the double-where
trick around the primitives that have a pole, so it needs no list of optimizers: every optax chain
is covered. Values do not change, only derivatives exactly at a pole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lmops_jax.control import surrogates
from lmops_jax.control.jaxprs import CALLS, called, opened


def _guard(is_pole: Callable[..., Any]):
  """A rule that keeps a primitive's value and makes it constant where `is_pole(*args)` holds."""

  def rule(eqn, params, *args):
    at_pole = is_pole(params, *args)
    safe = [
      jnp.where(at_pole, jnp.ones((), jnp.result_type(x)), x)
      if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
      for x in args
    ]
    value = eqn.primitive.bind(*map(jax.lax.stop_gradient, args), **params)
    return jnp.where(at_pole, value, eqn.primitive.bind(*safe, **params))

  return rule


def _is_not_finite(params, x, y):
  return ~(jnp.isfinite(x) & jnp.isfinite(y))


# Primitive name -> rule. Poles of the first derivative (for div, of the value) on the real line.
_RULES = {
  "sqrt": _guard(lambda p, x: x == 0),
  "rsqrt": _guard(lambda p, x: x == 0),
  "cbrt": _guard(lambda p, x: x == 0),
  "log": _guard(lambda p, x: x == 0),
  "div": _guard(lambda p, x, y: (y == 0) | _is_not_finite(p, x, y)),
  "mul": _guard(_is_not_finite),
  "pow": _guard(lambda p, x, y: (x == 0) & (y < 1)),
  "integer_pow": _guard(lambda p, x: (x == 0) & (p["y"] < 0)),
}


def finite_derivatives(fn: Callable, surrogate: str | None = None) -> Callable:
  """`fn` with the same values and with zero instead of undefined derivatives at poles.

  Args:
    fn: a function of pytrees of arrays that returns a pytree of arrays; control flow through
      `jit`, `cond`, `switch`, `scan` and `remat` is followed, and `custom_jvp` / `custom_vjp`
      functions keep their own rules.
    surrogate: the derivative that a sign gets in place of 0, see `surrogates`.
  Returns:
    A function of the same signature (positional arguments only).
  """

  rules = _RULES | surrogates.rules(surrogate)

  def wrapped(*args):
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    outs = _eval(rules, closed.jaxpr, closed.consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(out_shape), outs)

  return wrapped


def _eval(rules, jaxpr, consts, *args):
  env = {}

  def read(atom):
    return atom.val if isinstance(atom, jex.Literal) else env[atom]

  env.update(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  for eqn in jaxpr.eqns:
    outs = _eval_eqn(rules, eqn, [read(v) for v in eqn.invars])
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _eval_eqn(rules, eqn, args):
  name = eqn.primitive.name
  # The equation's own context keeps what the traced code had set (x64, matmul precision, mesh).
  with eqn.ctx.manager:
    if name in rules and not _is_scaling(eqn) and jnp.issubdtype(
        eqn.outvars[0].aval.dtype, jnp.floating):
      return [rules[name](eqn, dict(eqn.params), *args)]
    if name in CALLS:
      return _eval(rules, *called(eqn), *args)
    if name == "cond":
      branches = [_as_function(rules, b) for b in eqn.params["branches"]]
      return jax.lax.switch(args[0], branches, *args[1:])
    if name == "scan":
      return _eval_scan(rules, eqn.params, args)
    bind_params = eqn.primitive.get_bind_params(eqn.params)
    outs = eqn.primitive.bind(*args, **bind_params)
    return outs if eqn.primitive.multiple_results else [outs]


def _is_scaling(eqn):
  """A product with a constant, which needs no guard and is the most common operation."""
  return eqn.primitive.name == "mul" and any(isinstance(v, jex.Literal) for v in eqn.invars)


def _eval_scan(rules, params, args):
  num_consts, num_carry = params["num_consts"], params["num_carry"]
  consts = args[:num_consts]
  init = args[num_consts:num_consts + num_carry]
  body = _as_function(rules, params["jaxpr"])

  def step(carry, xs):
    outs = body(*consts, *carry, *xs)
    return outs[:num_carry], outs[num_carry:]

  carry, ys = jax.lax.scan(step, init, args[num_consts + num_carry:], length=params["length"],
                           reverse=params["reverse"], unroll=params["unroll"])
  return [*carry, *ys]


def _as_function(rules, closed):
  return lambda *args: _eval(rules, *opened(closed), *args)
