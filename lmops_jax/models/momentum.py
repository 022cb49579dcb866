"""Momentum attention (arXiv 2212.10559, section 5): a decayed sum of values beside the softmax.

Momentum in gradient descent adds decayed past gradients. If in-context learning is read as gradient
descent, values are the gradients, so every head adds to its output at position t

    s_t = sum over i < t of eta^(t-i) v_i,    s_1 = 0,  s_t = eta (s_{t-1} + v_{t-1})

The sum is not normalised and leaves out the token itself, which the softmax part includes. `eta` is
not given in the paper and so has no default here. The sum has three forms:

- dense: a strictly lower triangular matrix of powers times the values, for up to `DENSE_LENGTH`
  positions;
- scan: the same within blocks of positions, and an associative scan over the blocks' sums, so that
  memory and work grow linearly in the length;
- recurrence: position by position, as a decoder would.

All are plain jax operations, differentiable to any order, in `eta` as well. An `eta` for each head
is left out.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.attention import self_attention

DENSE_LENGTH = 512
FORMS = ("dense", "scan", "recurrence")
_BLOCK = 128


def momentum_attention(q, k, v, eta, causal: bool = True, mask=None) -> jax.Array:
  """Softmax attention scaled by `dh ** -0.5`, plus the decayed sum of earlier values.

  Args:
    q: `[..., h, T, dh]`.
    k: like `q`.
    v: like `q`.
    eta: decay in [0, 1), a number or a scalar array; 0 is ordinary attention, bit for bit.
    causal: must be True; the sum has no meaning otherwise.
    mask: `[..., T] bool`, False for padding: its values count as 0 and nobody attends to them. A
      masked token between others still takes a decay step. Outputs at masked positions mean
      nothing.

  Returns:
    `[..., h, T, dh]`.

  Raises:
    ValueError: for `eta` out of range, `causal=False`, or shapes that disagree.
  """
  check_eta(eta)
  if not causal:
    raise ValueError("Momentum attention is causal: its sum runs over earlier values only.")
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  if q.ndim < 3 or not q.shape == k.shape == v.shape:
    raise ValueError(
      f"q, k and v have the shapes {q.shape}, {k.shape} and {v.shape}; all must be the same "
      "[..., heads, length, head_dim]."
    )
  *batch, heads, length, width = q.shape
  if mask is not None and np.shape(mask) != (*batch, length):
    raise ValueError(f"mask has the shape {np.shape(mask)}; expected {(*batch, length)}.")

  def flat(x):
    return x.reshape(-1, heads, length, width).swapaxes(1, 2)

  segments = None if mask is None else jnp.asarray(mask).reshape(-1, length).astype(jnp.int32)
  out = self_attention(flat(q), flat(k), flat(v), segments).swapaxes(1, 2).reshape(q.shape)
  if is_zero(eta):
    return out
  mask = None if mask is None else jnp.asarray(mask)[..., None, :]
  return out + momentum_term(v, eta, mask=mask)


def momentum_term(values, eta, *, mask=None, segment_ids=None, form: str | None = None):
  """The sum `s [..., T, E]` over earlier values, alone.

  Args:
    values: `[..., T, E]`; heads may be an axis in front or part of E.
    eta: as in `momentum_attention`.
    mask: broadcasts to `[..., T] bool`; values with False count as 0.
    segment_ids: broadcasts to `[..., T] int`; the sum starts anew whenever the id changes.
    form: one of `FORMS`; None is dense up to `DENSE_LENGTH` positions and scan above.

  Raises:
    ValueError: for `eta` out of range, shapes that do not fit, or an unknown form.
  """
  check_eta(eta)
  values = jnp.asarray(values)
  if values.ndim < 2:
    raise ValueError(f"values have the shape {values.shape}; expected [..., length, width].")
  for name, x in (("mask", mask), ("segment_ids", segment_ids)):
    if x is not None and not _fits(np.shape(x), values.shape[:-1]):
      raise ValueError(
        f"{name} has the shape {np.shape(x)}; it must broadcast to {values.shape[:-1]}."
      )
  if form is None:
    form = "dense" if values.shape[-2] <= DENSE_LENGTH else "scan"
  if form not in FORMS:
    raise ValueError(f"form={form!r} is not one of {', '.join(FORMS)}.")
  if mask is not None:
    values = jnp.where(jnp.asarray(mask)[..., None], values, 0)
  runs = None if segment_ids is None else _runs(jnp.asarray(segment_ids))
  return {"dense": _dense, "scan": _scan, "recurrence": _recurrence}[form](values, eta, runs)


def momentum_step(state, value, eta) -> jax.Array:
  """`s_{t+1}` from `s_t` and `v_t`, which have the same shape."""
  return jnp.asarray(eta, state.dtype) * (state + value)


def momentum_term_cached(values, mask, distance, eta) -> jax.Array:
  """The sum for new positions over slots of a cache, from the values kept there anyway.

  It costs as much as the product of attention's probabilities with the values, and needs no state
  of its own: reordered beams, branches and shared contexts work as they do for attention.

  Args:
    values: `[B,K,M,E]`, or `[1,K,M,E]` for slots that all rows share.
    mask: `[B,S,M] bool`, which slots a position sees.
    distance: `[B,S,M]`, the slot's position less the new one's.
    eta: as in `momentum_attention`.

  Returns:
    `[B,S,K,E]`.
  """
  earlier = mask & (distance < 0)
  steps = jnp.where(earlier, -distance, 1)
  weights = jnp.where(earlier, _power(eta, steps, _wide(values)), 0).astype(values.dtype)
  if values.shape[0] == 1 and mask.shape[0] != 1:
    product, values = "bsm,kme->bske", values[0]
  else:
    product = "bsm,bkme->bske"
  out = jnp.einsum(product, weights, values, preferred_element_type=_wide(values))
  return out.astype(values.dtype)


def check_eta(eta) -> None:
  """Raises ValueError for an `eta` that is no scalar in [0, 1); a traced value is not checked."""
  if np.shape(eta) != ():
    raise ValueError(f"eta has the shape {np.shape(eta)}; it must be one number.")
  if not isinstance(eta, jax.core.Tracer) and not 0 <= float(eta) < 1:  # also NaN
    raise ValueError(f"eta={float(eta)} must be in [0, 1).")


def is_zero(eta) -> bool:
  """Whether the sum is known to vanish, so that it can be left out."""
  return not isinstance(eta, jax.core.Tracer) and float(eta) == 0


def _wide(values):
  return jnp.promote_types(values.dtype, jnp.float32)


def _fits(shape, target) -> bool:
  try:
    return np.broadcast_shapes(shape, target) == tuple(target) and shape[-1:] == target[-1:]
  except ValueError:
    return False


def _runs(segment_ids):
  """Numbers stretches of equal ids, so that an id that comes back is another segment."""
  changed = segment_ids[..., 1:] != segment_ids[..., :-1]
  first = jnp.zeros((*segment_ids.shape[:-1], 1), jnp.int32)
  return jnp.concatenate([first, jnp.cumsum(changed, axis=-1, dtype=jnp.int32)], axis=-1)


def _power(eta, steps, dtype):
  """`eta ** steps` for steps of at least 0; the derivative in eta is finite at 0 as well."""
  return jnp.power(jnp.asarray(eta, dtype), jnp.asarray(steps).astype(dtype))


def _triangle(eta, length, dtype):
  """`[T,T]`, row t and column i: `eta^(t-i)` for i < t, else 0."""
  steps = np.arange(length)[:, None] - np.arange(length)[None, :]
  return jnp.where(steps > 0, _power(eta, np.maximum(steps, 1), dtype), 0)


def _weighted(weights, values):
  """`weights [..., s, m] @ values [..., m, e]` at least in float32."""
  return jnp.matmul(
    weights.astype(values.dtype), values, preferred_element_type=_wide(values)
  )


def _within(values, eta, runs):
  weights = _triangle(eta, values.shape[-2], _wide(values))
  if runs is not None:
    weights = jnp.where(runs[..., :, None] == runs[..., None, :], weights, 0)
  return _weighted(weights, values)


def _dense(values, eta, runs):
  return _within(values, eta, runs).astype(values.dtype)


def _scan(values, eta, runs):
  """`_dense` within blocks; `carried` is s at each block's first position, of the run before it."""
  *batch, length, width = values.shape
  block = min(_BLOCK, max(length, 1))
  count = math.ceil(length / block)
  padding = count * block - length
  blocks = jnp.pad(values, [(0, 0)] * len(batch) + [(0, padding), (0, 0)])
  blocks = blocks.reshape(*batch, count, block, width)
  dtype = _wide(values)
  tail = _power(eta, np.arange(block, 0, -1), dtype)  # from each position to the next block
  lead = _power(eta, np.arange(block), dtype)  # from the block's first position on
  through = _power(eta, np.full(count, block), dtype)
  if runs is not None:
    pad = [(0, 0)] * (runs.ndim - 1) + [(0, padding)]
    runs = jnp.pad(runs, pad, mode="edge").reshape(*runs.shape[:-1], count, block)
    last = runs[..., -1]
    before = jnp.concatenate([jnp.full_like(last[..., :1], -1), last[..., :-1]], axis=-1)
    tail = jnp.where(runs == last[..., None], tail, 0)
    lead = jnp.where(runs == before[..., None], lead, 0)
    through = jnp.where(last == before, through, 0)
  sums = _weighted(tail[..., None, :], blocks)[..., 0, :]  # [..., count, width]
  through = jnp.broadcast_to(through[..., None], (*sums.shape[:-1], 1))

  def joined(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]

  _, after = jax.lax.associative_scan(joined, (through, sums), axis=sums.ndim - 2)
  carried = jnp.concatenate([jnp.zeros_like(after[..., :1, :]), after[..., :-1, :]], axis=-2)
  out = _within(blocks, eta, runs) + lead[..., None] * carried[..., None, :]
  return out.reshape(*batch, count * block, width)[..., :length, :].astype(values.dtype)


def _recurrence(values, eta, runs):
  wide = jnp.moveaxis(values.astype(_wide(values)), -2, 0)
  starts = jnp.zeros(values.shape[-2:-1], bool)
  if runs is not None:
    new = jnp.concatenate([jnp.ones_like(runs[..., :1]), runs[..., 1:] - runs[..., :-1]], axis=-1)
    starts = jnp.moveaxis(jnp.broadcast_to(new != 0, values.shape[:-1]), -1, 0)[..., None]

  def step(state, inputs):
    value, start = inputs
    here = jnp.where(start, 0, state)
    return momentum_step(here, value, eta), here

  _, out = jax.lax.scan(step, jnp.zeros(wide.shape[1:], wide.dtype), (wide, starts))
  return jnp.moveaxis(out, 0, -2).astype(values.dtype)
