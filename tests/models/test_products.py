"""Products with weights against plain `@`: values, all derivatives, and what they compile to."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmops_jax.models.products import matrix_product, product_of_rows, save_products
from lmops_jax.models.transformer import Transformer, TransformerConfig


def _inputs(dtype=np.float64, count=3):
  """`count` pairs of matrices `[6,5]`, `[5,7]`."""
  rng = np.random.default_rng(0)
  return [(jnp.asarray(rng.normal(size=(6, 5)), dtype), jnp.asarray(rng.normal(size=(5, 7)), dtype))
          for _ in range(count)]


def _loss(product):
  """A loss whose Hessian has all blocks."""
  return lambda args: jnp.sum(jnp.sin(product(*args)) ** 3)


ORDERS = {
  "grad": lambda f, p, u, v: jax.grad(f)(p),
  "jvp": lambda f, p, u, v: jax.jvp(f, (p,), (u,)),
  "jvp of grad": lambda f, p, u, v: jax.jvp(jax.grad(f), (p,), (u,)),
  "grad of jvp": lambda f, p, u, v: jax.grad(lambda p: jax.jvp(f, (p,), (u,))[1])(p),
  "vjp of grad": lambda f, p, u, v: jax.vjp(jax.grad(f), p)[1](u),
  "third": lambda f, p, u, v: jax.grad(
    lambda p: jnp.vdot(*(x.ravel()[:30] for x in jax.jvp(jax.grad(f), (p,), (u,))[1])))(p),
  "jvp of vjp of grad": lambda f, p, u, v: jax.jvp(
    lambda p: jax.vjp(jax.grad(f), p)[1](u), (p,), (v,)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_derivatives_equal_those_of_plain_products(order):
  with jax.enable_x64(True):
    got, want = (ORDERS[order](_loss(f), *_inputs()) for f in (matrix_product, jnp.matmul))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_derivatives_under_vmap(axes):
  with jax.enable_x64(True):
    args = [jnp.stack([pair[i] for pair in _inputs()]) if axis == 0 else _inputs()[0][i]
            for i, axis in enumerate(axes)]
    got, want = (jax.vmap(lambda *a, f=f: jax.jvp(jax.grad(_loss(f)), (a,), (a,)), axes)(*args)
                 for f in (matrix_product, jnp.matmul))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("product, formula", [
  (matrix_product, "...tk,...kn->...tn"), (product_of_rows, "...tk,...nk->...tn")])
def test_derivatives_of_stacks_under_vmap(product, formula):
  rng = np.random.default_rng(0)

  def orders(f, x, w):
    return jax.jvp(jax.grad(_loss(f)), ((x, w),), ((w, x),))

  with jax.enable_x64(True):
    x, w = (jnp.asarray(rng.normal(size=(3, 2, 2, 4, 4))) for _ in range(2))
    got, want = (
      jax.vmap(functools.partial(orders, f))(x, w) for f in (product, functools.partial(
        jnp.einsum, formula)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_of_shared_weights_is_summed_over_a_mesh(inside):
  (x, w), *_ = _inputs(np.float32)
  x = jnp.concatenate([x, x[:2]])  # 8 rows
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

  def loss(w, x, product):
    return jnp.sum(jnp.sin(product(x, w)))

  def within(w, x):
    grad = jax.grad(lambda w: jax.lax.psum(loss(w, x, matrix_product), "data"))
    return grad(w)

  with jax.set_mesh(mesh):
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    shard = jax.shard_map(within, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    got = jax.jit(shard if inside else jax.grad(lambda w, x: loss(w, x, matrix_product)))(w, x)
    want = jax.grad(loss)(w, x, jnp.matmul)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_narrow_inputs_are_summed_wide_and_keep_their_gradients_dtype():
  (x, w), *_ = _inputs(jnp.bfloat16)
  out, pull = jax.vjp(lambda x, w: matrix_product(x, w, jnp.float32), x, w)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, np.float32(x) @ np.float32(w), rtol=1e-6)
  g = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
  plain = jax.vjp(
    lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32), x, w)[1](g)
  for got, want in zip(pull(g), plain, strict=True):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


def test_the_precision_in_force_stays_with_the_gradient():
  x, w = _inputs(np.float32)[0]
  with jax.default_matmul_precision("highest"):
    lowered = jax.jit(jax.grad(lambda a: jnp.sum(matrix_product(*a) ** 2))).trace((x, w))
  text = lowered.lower().as_text()
  assert text.count("stablehlo.dot_general") == 3
  assert text.count("precision = [HIGHEST, HIGHEST]") == 3


def test_products_of_a_model_read_turned_only_what_is_narrow_and_on_the_left():
  model = Transformer(TransformerConfig(
    vocab_size=96, num_layers=2, width=32, num_heads=2, mlp_width=80, max_length=16,
    tied_embeddings=False))
  tokens = jnp.ones((4, 16), jnp.int32)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))

  def loss(params):
    return jnp.sum(jax.nn.logsumexp(model.apply(params, tokens, method="logits"), axis=-1))

  text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
  dots = [line for line in text.splitlines() if " dot(" in line]
  weights = [line for line in dots if "batch_dims" not in line]
  assert len(weights) >= 3 * 8
  turned = [line for line in weights if "lhs_contracting_dims={0}" in line]
  shapes = {re.search(r"f32\[(\d+),(\d+)\]", line).groups() for line in turned}
  assert shapes == {("32", "80"), ("32", "96")}


@pytest.mark.parametrize("num_inputs, num_outputs", [
  (3, 8), (8, 3), (5, 5), (300, 260)])
def test_weight_gradients_of_all_shapes(num_inputs, num_outputs):
  rng = np.random.default_rng(0)
  x, w, g = (jnp.asarray(rng.normal(size=shape)) for shape in (
    (4, num_inputs), (num_inputs, num_outputs), (4, num_outputs)))
  got = jax.jit(lambda x, w, g: jax.vjp(matrix_product, x, w)[1](g)[1])(x, w, g)
  np.testing.assert_allclose(got, x.T @ g, rtol=1e-5, atol=1e-5)


def _count(jaxpr, name):
  inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))]
  inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
  return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(_count(j, name) for j in inner)


def test_the_policy_keeps_products():
  x, w = _inputs(np.float32)[0]

  def products(policy):
    f = jax.checkpoint(_loss(matrix_product), policy=policy)
    return _count(jax.make_jaxpr(jax.grad(f))((x, w)).jaxpr, "matrix_product")

  assert products(save_products) == 1
  assert products(jax.checkpoint_policies.nothing_saveable) == 2


@pytest.mark.parametrize("kind, num_primitives", [("turned", 1), ("plain", 0), (None, 1)])
def test_a_kind_is_chosen_by_its_name(kind, num_primitives):
  x, w = _inputs(np.float32)[0]
  trace = jax.make_jaxpr(lambda x, w: matrix_product(x, w, kind=kind))(x, w)
  assert _count(trace.jaxpr, "matrix_product") == num_primitives
