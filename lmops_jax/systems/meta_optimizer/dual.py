"""Dual forms of a linear layer under gradient descent and of attention without softmax.

Arxiv 2212.10559, sections 2 and 3. A linear layer after a step of gradient descent is the layer
before it plus linear attention over the training inputs; attention without softmax and scale is a
linear layer plus an update that the demonstrations make. The identity does not hold for softmax
attention.

Arrays are row-major: tokens are rows, weights `[outputs, inputs]`. The letters: `d` model width,
`e` head width, `n` demonstration tokens, `t` query tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DualForm(NamedTuple):
  """Attention over demonstrations as an update of weights.

  Attributes:
    out: `[..., e]`, `(w_zsl + dw_icl) q`.
    w_zsl: `[e, e]`, the layer without demonstrations, which the query's own tokens make.
    dw_icl: `[e, e]`, the demonstrations' update, a sum over their tokens of the value (the
      meta-gradient) times the key (the historic input).
  """

  out: jax.Array
  w_zsl: jax.Array
  dw_icl: jax.Array


def dual_form(w_v, w_k, x_demo, x_query, q) -> DualForm:
  """Attention without softmax as a linear layer, paper equation 6.

  The update costs `O(n e^2)` once and `O(e^2)` a query; `attention_form` costs `O(n e)` a query.

  Args:
    w_v: `[e, d]`, value projection of one head.
    w_k: `[e, d]`, key projection.
    x_demo: `[n, d]`, layer inputs of the demonstrations; n may be 0.
    x_query: `[t, d]`, layer inputs of the query up to the current token.
    q: `[..., e]`, queries.

  Raises:
    ValueError: for shapes that disagree.
  """
  w_v, w_k, x_demo, x_query, q = _checked(w_v, w_k, x_demo, x_query, q)
  w_zsl = _outer_sum(_times(x_query, w_v), _times(x_query, w_k))
  dw_icl = _outer_sum(_times(x_demo, w_v), _times(x_demo, w_k))
  return DualForm(_times(q, w_zsl + dw_icl), w_zsl, dw_icl)


def attention_form(w_v, w_k, x_demo, x_query, q) -> jax.Array:
  """The same output `[..., e]` as attention: values weighted by keys' products with queries."""
  w_v, w_k, x_demo, x_query, q = _checked(w_v, w_k, x_demo, x_query, q)
  x = jnp.concatenate([x_demo, x_query])
  return _linear_attention(_times(x, w_v), _times(x, w_k), q)


def gd_linear_dual(w0, x_train, errors, x) -> jax.Array:
  """A linear layer after gradient descent, as the layer before it plus linear attention.

  This is exact for one step on a batch, and for several steps if each error was taken at its own
  step's weights.

  Args:
    w0: `[dout, din]`, weights before.
    x_train: `[n, din]`, training inputs.
    errors: `[n, dout]`, minus learning rate times the loss's derivative by each output.
    x: `[..., din]`, inputs to evaluate.

  Returns:
    `[..., dout]`, `(w0 + sum_i errors_i x_train_i^T) x`.

  Raises:
    ValueError: for shapes that disagree.
  """
  w0, x_train, errors, x = (jnp.asarray(a) for a in (w0, x_train, errors, x))
  _check_rank(w0=(w0, 2), x_train=(x_train, 2), errors=(errors, 2))
  if errors.shape != (x_train.shape[0], w0.shape[0]) or x_train.shape[1] != w0.shape[1]:
    raise ValueError(
      f"w0 {w0.shape}, x_train {x_train.shape} and errors {errors.shape} do not belong together; "
      "expected [dout, din], [n, din] and [n, dout]."
    )
  _check_last("x", x, w0.shape[1])
  return _times(x, w0) + _linear_attention(errors, x_train, x)


def finetuned_update(w_v, w_k, dw_v, dw_k, x_query) -> jax.Array:
  """The update `dW_FT [e, e]` that finetuned projections make, paper equation 9.

  `((w_v + dw_v) X^T) ((w_k + dw_k) X^T)^T - w_zsl`, expanded so that it is exactly 0 if both
  changes are.

  Args:
    w_v, w_k, dw_v, dw_k: `[e, d]`, projections and their changes.
    x_query: `[t, d]`, the query's layer inputs.
  """
  w_v, w_k, dw_v, dw_k, x = (jnp.asarray(a) for a in (w_v, w_k, dw_v, dw_k, x_query))
  _check_rank(w_v=(w_v, 2), x_query=(x, 2))
  for name, array in (("w_k", w_k), ("dw_v", dw_v), ("dw_k", dw_k)):
    if array.shape != w_v.shape:
      raise ValueError(f"{name} has shape {array.shape} and w_v {w_v.shape}; they must be equal.")
  _check_last("x_query", x, w_v.shape[1])
  changed = _outer_sum(_times(x, dw_v), _times(x, w_k + dw_k))
  return changed + _outer_sum(_times(x, w_v), _times(x, dw_k))


def _linear_attention(values, keys, queries):
  """`sum_i values_i (keys_i . query)`, `[..., width of values]`."""
  return jnp.matmul(_times(queries, keys), values, precision="highest")


def _times(x, w):
  """`w x` for rows of `x`, at full precision on every device."""
  return jnp.matmul(x, w.T, precision="highest")


def _outer_sum(values, keys):
  return jnp.matmul(values.T, keys, precision="highest")


def _checked(w_v, w_k, x_demo, x_query, q):
  arrays = w_v, w_k, x_demo, x_query, q = tuple(
    jnp.asarray(a) for a in (w_v, w_k, x_demo, x_query, q))
  _check_rank(w_v=(w_v, 2), w_k=(w_k, 2), x_demo=(x_demo, 2), x_query=(x_query, 2))
  if w_v.shape != w_k.shape:
    raise ValueError(
      f"w_v has shape {w_v.shape} and w_k {w_k.shape}; both are [head width, model width] of one "
      "head."
    )
  _check_last("x_demo", x_demo, w_v.shape[1])
  _check_last("x_query", x_query, w_v.shape[1])
  _check_last("q", q, w_v.shape[0])
  return arrays


def _check_rank(**arrays):
  for name, (array, rank) in arrays.items():
    if array.ndim != rank:
      raise ValueError(f"{name} has shape {array.shape}; expected {rank} axes.")


def _check_last(name, array, width):
  if not array.ndim or array.shape[-1] != width:
    raise ValueError(f"{name} has shape {array.shape}; its last axis must be {width}.")
