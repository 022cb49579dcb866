"""Prefixes against slices: values and all derivatives, and what a CPU adds up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.prefixes import prefixes, turned, with_turned_gradient
from tests.models.test_products import ORDERS

LENGTHS = (2, 3, 7)


def _loss(cut, used, x):
  """A loss that reads some of the prefixes and has a full Hessian."""
  parts = cut(x, LENGTHS)
  return sum(jnp.sum(jnp.sin(parts[i]).sum(0) ** (3 + i)) for i in used)


def _sliced(x, lengths):
  return [x[..., :length, :] for length in lengths]


@pytest.mark.parametrize("used", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("order", ORDERS)
def test_derivatives_equal_those_of_slices_also_under_vmap(order, used):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, u, v = (jnp.asarray(rng.normal(size=(2, 3, 7, 5))) for _ in range(3))
    got, want = (jax.vmap(functools.partial(ORDERS[order], functools.partial(_loss, f, used)), 1)(
      x, u, v) for f in (prefixes, _sliced))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


def test_gradients_are_added_without_padding():
  def gradient(cut):
    x = jnp.zeros((2, 7, 5))
    return jax.jit(jax.grad(functools.partial(_loss, cut, (0, 1, 2)))).lower(x).as_text()

  assert "stablehlo.pad" in gradient(_sliced) and "stablehlo.pad" not in gradient(prefixes)


@pytest.mark.parametrize("order", ORDERS)
def test_a_turned_gradient_is_the_same_gradient(order):
  def through_columns(x, lengths):
    return prefixes(with_turned_gradient(jax.lax.stop_gradient(x), turned(x)), lengths)

  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    x, u, v = (jnp.asarray(rng.normal(size=(2, 3, 7, 5))) for _ in range(3))
    got, want = (jax.vmap(functools.partial(
      ORDERS[order], functools.partial(_loss, f, (0, 1, 2))), 1)(x, u, v)
      for f in (through_columns, _sliced))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


def test_a_loop_stacks_turned_gradients_as_columns():
  x = jnp.zeros((3, 7, 5))
  grad = jax.grad(lambda x: jnp.sum(jax.lax.map(
    lambda pair: jnp.sin(with_turned_gradient(*pair)), (x, turned(x)))))
  (loop,) = [e for e in jax.make_jaxpr(grad)(x).eqns if e.primitive.name == "scan"][-1:]
  assert [v.aval.shape for v in loop.outvars] == [turned(x).shape]
