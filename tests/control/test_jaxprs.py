"""Which outputs of a traced function are computed from which inputs."""

import jax
import jax.numpy as jnp

from lmops_jax.control.jaxprs import dependence


def _found(fn, *args):
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  return dependence(jaxpr, [1 << i for i in range(len(args))])


def test_calls_branches_and_loops_are_followed():
  swap = jax.jit(lambda a, b: (b, a))
  assert _found(lambda a, b: (*swap(a, b), 1.0, a * b), 1.0, 2.0) == [2, 1, 0, 3]
  branches = lambda i, a, b: jax.lax.cond(i > 0, lambda: (2 * a, a), lambda: (3 * a, b))  # noqa: E731
  assert _found(branches, 1, 1.0, 2.0) == [0b011, 0b111]

  def loop(a, b, c, xs):  # c reaches the second carry in one turn, the first in two
    def body(carry, x):
      first, second, third = carry
      return (first + second, second + third, third), x + third
    return jax.lax.scan(body, (a, b, c), xs)

  assert _found(loop, 1.0, 2.0, 3.0, jnp.ones(4)) == [0b0111, 0b0110, 0b0100, 0b1100]
