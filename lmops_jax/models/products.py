"""Products of activations and weights, `[T,K] @ [K,N]`, whose weight gradient is fast on a CPU too.

The gradient of the weights is `x^T g`. XLA on a CPU reads a transposed left matrix in place, at a
third to nine tenths of the speed of a product of row-major matrices: the fewer columns the right
one has, the slower. See `_weight_gradients` for what it does instead. jax lets only primitives
choose how they are transposed, and only primitives keep forward-mode rules beside that (a
`custom_vjp` would end Hessian-vector products), so "turned" products are bilinear primitives,
differentiable to any order. "plain" ones are a `dot_general`, used on other platforms and inside a
`shard_map`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from lmops_jax.models.partitioning import platform_in_use

_KINDS = {"cpu": "turned"}  # the kind of product by platform; "plain" on all others
_NARROW = 512  # columns, see `_weight_gradients`
# Axes of two matrices, counted from the last, over which a product sums.
_ROWS = (-1, -2)  # x @ w
_COLUMNS = (-2, -2)  # x.T @ g
_OUTPUTS = (-1, -1)  # g @ w.T


def kind_in_use() -> str:
  """"turned" or "plain": the kind of product for the mesh in use, see the module."""
  axis_types = jax.sharding.get_abstract_mesh().axis_types
  # If axes are manual (shard_map) or explicit, dot_general's rules also track how arrays are split.
  is_plain = any(axis_type != AxisType.Auto for axis_type in axis_types)
  return "plain" if is_plain else _KINDS.get(platform_in_use(), "plain")


def matrix_product(x: jax.Array, w: jax.Array, dtype=None, kind: str | None = None) -> jax.Array:
  """`x [...,T,K] @ w [...,K,N]`, `[...,T,N]` in `dtype`, by default that of the two.

  Args:
    x, w: stacks of as many matrices; the axes in front of the last two are equal.
    kind: "turned" or "plain"; None is `kind_in_use()`. The values are the same.
  """
  return _of_kind(_product, _ROWS, x, w, dtype, kind)


def product_of_rows(x: jax.Array, w: jax.Array, dtype=None, kind: str | None = None) -> jax.Array:
  """`x [...,T,K] @ w.T` for `w [...,N,K]`, otherwise as `matrix_product`."""
  return _of_kind(_input_gradient, _OUTPUTS, x, w, dtype, kind)


def _of_kind(primitive, axes, x, w, dtype, kind):
  dtype = jnp.dtype(jnp.promote_types(x.dtype, w.dtype) if dtype is None else dtype)
  if (kind or kind_in_use()) == "plain":
    return jax.lax.dot_general(x, w, _dimensions(axes, x.ndim), preferred_element_type=dtype)
  # The precision is read now: rules and lowering run later, perhaps in another context.
  return primitive.bind(x, w, dtype=dtype, precision=jax.config.jax_default_matmul_precision)


def project_to_vocabulary(
  hidden: jax.Array, matrix: jax.Array, bias: jax.Array | None = None, *, transposed: bool = False
) -> jax.Array:
  """Logits `[...,V]`, at least float32, of `[...,W]` and a matrix `[W,V]` (`[V,W]` transposed)."""
  flat = hidden.reshape(-1, hidden.shape[-1])
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  if transposed:
    logits = product_of_rows(flat, matrix, dtype)
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
  is_one = primitive in (_product, _input_gradient) and args[0].ndim == 2
  return is_one or plain(primitive, *args, **params)


def _dimensions(axes, num_axes):
  """What `dot_general` calls a product of two stacks of matrices that sums over these axes."""
  stacked = tuple(range(num_axes - 2))
  return tuple((num_axes + axis,) for axis in axes), (stacked, stacked)


def _bilinear(name, axes, compiled, lhs_rule, rhs_rule):
  """A primitive of two stacks of matrices: their `dot_general`, written as `compiled`."""
  primitive = Primitive(name)
  kept = [-3 - axis for axis in axes]
  primitive.def_impl(jax.jit(compiled, static_argnames=("dtype", "precision")))
  primitive.def_abstract_eval(lambda x, y, *, dtype, precision: jax.core.ShapedArray(
    (*x.shape[:-2], x.shape[kept[0]], y.shape[kept[1]]), dtype))
  ad.defbilinear(primitive, lhs_rule, rhs_rule)

  def batched(args, where, **params):
    if None in where:
      return jax.vmap(functools.partial(_dot, axes, **params), in_axes=tuple(where))(*args), 0
    return primitive.bind(*(jnp.moveaxis(x, at, 0) for x, at in zip(args, where)), **params), 0

  batching.primitive_batchers[primitive] = batched
  mlir.register_lowering(primitive, mlir.lower_fun(compiled, multiple_results=False))
  return primitive


def _dot(axes, x, y, *, dtype, precision):
  # Summed in the widest of the three types, as dot_general's own transposes are.
  wide = functools.reduce(jnp.promote_types, (x.dtype, y.dtype, dtype))
  out = jax.lax.dot_general(
    x, y, _dimensions(axes, x.ndim), precision=precision, preferred_element_type=wide)
  return out.astype(dtype)


def _weight_gradients(x, g, *, dtype, precision):
  """`x.T @ g`, in the way that is fastest on a CPU: as `(g.T @ x).T` if `g` is the narrower one.

  A narrow matrix on the left is read in place; others are turned, at the cost of a copy. With 512
  and 4,096 rows of 64 to 2,048 columns each this comes on one core within 16 % of the better of the
  two, where `x.T @ g` read in place takes up to three times as long. XLA computes a norm again
  while it turns its output, 11 ms for 4,096 x 512, where turning what lies in memory takes 2.
  """
  is_swapped = x.shape[-1] > g.shape[-1]
  left, right = (g, x) if is_swapped else (x, g)
  axes = _COLUMNS
  if left.shape[-1] > _NARROW or right.shape[-1] < 2 * left.shape[-1]:
    axes, left = _ROWS, _turned(left)
  out = _dot(axes, left, right, dtype=dtype, precision=precision)
  # The barrier comes first, since XLA would swap the product back.
  return jax.lax.optimization_barrier(out).swapaxes(-1, -2) if is_swapped else out


def _turned(x):
  # Behind a barrier, since XLA would fold the transpose into the product again.
  return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


# The transposes of each of the three are the other two: x @ w, x.T @ g and g @ w.T.
_product = _bilinear(
  "matrix_product", _ROWS, functools.partial(_dot, _ROWS),
  lambda ct, x, w, *, precision, **_: _input_gradient.bind(
    ct, w, dtype=x.aval.dtype, precision=precision),
  lambda ct, x, w, *, precision, **_: _weight_gradient.bind(
    x, ct, dtype=w.aval.dtype, precision=precision))
_weight_gradient = _bilinear(
  "matrix_product_weight_gradient", _COLUMNS, _weight_gradients,
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
