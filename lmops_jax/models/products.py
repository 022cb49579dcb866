"""Products of activations and weights, `[T,K] @ [K,N]`, whose weight gradient is fast on a CPU too.

The gradient of the weights is `x^T g`. XLA on a CPU reads the transposed `x` in place, at half the
speed of a product of row-major matrices (40 against 80 GFLOP/s a core), which makes a gradient four
forward passes where three are ideal. Turning `x` round first costs a copy of it. jax lets only
primitives choose how they are transposed, and only primitives keep forward-mode rules beside that
(a `custom_vjp` would end Hessian-vector products), so "turned" products are bilinear primitives,
differentiable to any order. "plain" ones are a `dot_general`: those of other platforms, and of the
inside of a `shard_map`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from lmops_jax.models.partitioning import platform_in_use

_KINDS = {"cpu": "turned"}  # of products by platform; "plain" on all others
_ROWS = (((1,), (0,)), ((), ()))  # x @ w
_COLUMNS = (((0,), (0,)), ((), ()))  # x.T @ g
_OUTPUTS = (((1,), (1,)), ((), ()))  # g @ w.T


def kind_in_use() -> str:
  """"turned" or "plain": the kind of product that is right here, see the module."""
  axis_types = jax.sharding.get_abstract_mesh().axis_types
  # If axes are manual (shard_map) or explicit, dot_general's rules also track who holds what.
  is_plain = any(axis_type != AxisType.Auto for axis_type in axis_types)
  return "plain" if is_plain else _KINDS.get(platform_in_use(), "plain")


def matrix_product(x: jax.Array, w: jax.Array, dtype=None, kind: str | None = None) -> jax.Array:
  """`x [T,K] @ w [K,N]`, `[T,N]` in `dtype`, by default that of the two.

  Args:
    kind: "turned" or "plain"; None is `kind_in_use()`. The values are the same.
  """
  dtype = jnp.dtype(jnp.promote_types(x.dtype, w.dtype) if dtype is None else dtype)
  if (kind or kind_in_use()) == "plain":
    return jax.lax.dot_general(x, w, _ROWS, preferred_element_type=dtype)
  # The precision in force now: rules and lowering run later, perhaps in another context.
  return _product.bind(x, w, dtype=dtype, precision=jax.config.jax_default_matmul_precision)


def project_to_vocabulary(
  hidden: jax.Array, matrix: jax.Array, bias: jax.Array | None = None, *, transposed: bool = False
) -> jax.Array:
  """Logits `[...,V]`, at least float32, of `[...,W]` and a matrix `[W,V]` (`[V,W]` transposed)."""
  flat = hidden.reshape(-1, hidden.shape[-1])
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  if transposed:
    by_rows = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(flat, matrix, by_rows, preferred_element_type=dtype)
  else:
    logits = matrix_product(flat, matrix, dtype)
  if bias is not None:
    logits = logits + bias.astype(dtype)
  return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def remat_policy(name: str):
  """The policy of `jax.checkpoint` for one of `config.REMAT_POLICIES` but "none"."""
  return jax.checkpoint_policies.nothing_saveable if name == "full" else save_products


def save_products(primitive, *args, **params) -> bool:
  """Policy of `jax.checkpoint` that keeps the products with weights, and nothing else."""
  plain = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return primitive is _product or plain(primitive, *args, **params)


def _bilinear(name, dimensions, compiled, lhs_rule, rhs_rule):
  """A primitive of two matrices: their `dot_general`, written as `compiled`."""
  primitive = Primitive(name)
  kept = [1 - contracted[0] for contracted in dimensions[0]]
  primitive.def_impl(jax.jit(compiled, static_argnames=("dtype", "precision")))
  primitive.def_abstract_eval(lambda x, y, *, dtype, precision: jax.core.ShapedArray(
    (x.shape[kept[0]], y.shape[kept[1]]), dtype))
  ad.defbilinear(primitive, lhs_rule, rhs_rule)

  def batched(args, axes, *, dtype, precision):
    plain = functools.partial(_dot, dimensions, dtype=dtype, precision=precision)
    return jax.vmap(plain, in_axes=tuple(axes))(*args), 0

  batching.primitive_batchers[primitive] = batched
  mlir.register_lowering(primitive, mlir.lower_fun(compiled, multiple_results=False))
  return primitive


def _dot(dimensions, x, y, *, dtype, precision):
  # Summed in the wider of the two and what is asked for, as dot_general's own transposes are.
  wide = functools.reduce(jnp.promote_types, (x.dtype, y.dtype, dtype))
  out = jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=wide)
  return out.astype(dtype)


def _turned(x, g, *, dtype, precision):
  # Behind a barrier: XLA would fold the transpose into the product again.
  return _dot(_ROWS, jax.lax.optimization_barrier(x.T), g, dtype=dtype, precision=precision)


# Each of the three is what the transposes of the other two need: x @ w, x.T @ g and g @ w.T.
_product = _bilinear(
  "matrix_product", _ROWS, functools.partial(_dot, _ROWS),
  lambda ct, x, w, *, precision, **_: _input_gradient.bind(
    ct, w, dtype=x.aval.dtype, precision=precision),
  lambda ct, x, w, *, precision, **_: _weight_gradient.bind(
    x, ct, dtype=w.aval.dtype, precision=precision))
_weight_gradient = _bilinear(
  "matrix_product_weight_gradient", _COLUMNS, _turned,
  lambda ct, x, g, *, precision, **_: _input_gradient.bind(
    g, ct, dtype=x.aval.dtype, precision=precision),
  lambda ct, x, g, *, precision, **_: _product.bind(
    x, ct, dtype=g.aval.dtype, precision=precision))
_input_gradient = _bilinear(
  "matrix_product_input_gradient", _OUTPUTS, functools.partial(_dot, _OUTPUTS),
  lambda ct, g, w, *, precision, **_: _product.bind(
    ct, w, dtype=g.aval.dtype, precision=precision),
  lambda ct, g, w, *, precision, **_: _weight_gradient.bind(
    ct, g, dtype=w.aval.dtype, precision=precision))
