"""Prefixes of stacked rows, whose gradients are added up fast on a CPU too.

The gradient of a slice is padded with zeros, and XLA on a CPU adds all padded gradients at once,
looking at every number which of them reach it. Here each is added in place to those before it, as
columns, which is how a product on a CPU leaves the gradient of a narrow matrix of keys or values
(see `products`). A primitive is linear to all orders, also forwards over backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lmops_jax.models.partitioning import on_one_cpu

_SPARE = 16  # columns, see `turned`


def prefixes(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
  """`x[..., :n, :]` of `x [...,M,E]` for each length `n`, which ascend to `M`."""
  if on_one_cpu():
    return [part.swapaxes(-1, -2) for part in _cut.bind(x.swapaxes(-1, -2), lengths=(*lengths,))]
  return [x[..., :length, :] for length in lengths]


def turned(x: jax.Array) -> jax.Array:
  """The columns of `x [...,M,E]` as rows, `[...,E,M + 16]`, for `with_turned_gradient`.

  The zeros behind each row keep columns apart by no power of two of bytes: those would share one
  set of a cache, and turning gradients back would take three times as long.
  """
  return jnp.pad(x.swapaxes(-1, -2), [(0, 0)] * (x.ndim - 1) + [(0, _SPARE)])


@jax.custom_jvp
def with_turned_gradient(x: jax.Array, columns: jax.Array) -> jax.Array:
  """`x`, whose derivatives reach `columns`, which is `turned(x)`, instead of it.

  So a loop stacks gradients as `prefixes` leaves them, and all of them are turned at once after it.
  """
  del columns
  return x


@with_turned_gradient.defjvp
def _(primals, tangents):
  length = primals[0].shape[-2]
  return with_turned_gradient(*primals), tangents[1][..., :length].swapaxes(-1, -2)


def _slices(x, *, lengths):
  return [x[..., :length] for length in lengths]


def _added(cotangents, x, *, lengths):
  """The sum of the prefixes' cotangents, each where it stands."""
  *shorter, total = map(ad.instantiate_zeros, cotangents)
  for length, cotangent in zip(lengths, shorter):
    begun = total[..., :length] + cotangent
    total = jax.lax.dynamic_update_slice(total, begun, (0,) * total.ndim)
  return [jax.lax.optimization_barrier(total)]  # or it would be turned while it is added


def _batched(args, axes, *, lengths):
  found = _cut.bind(jnp.moveaxis(args[0], axes[0], 0), lengths=lengths)
  return found, [0] * len(found)


_cut = Primitive("prefixes")
_cut.multiple_results = True
_cut.def_impl(_slices)
_cut.def_abstract_eval(lambda x, *, lengths: [
  jax.core.ShapedArray((*x.shape[:-1], length), x.dtype) for length in lengths])
ad.deflinear2(_cut, _added)
batching.primitive_batchers[_cut] = _batched
mlir.register_lowering(_cut, mlir.lower_fun(_slices, multiple_results=True))
