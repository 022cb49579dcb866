"""How alike in-context learning and finetuning are: predictions, updates, attention and its order.

The metrics of arXiv 2212.10559, section 4.2, and those that arXiv 2311.07772 asks for beside them.
Functions named `*_each` give a value for each example and layer; the others give their mean over
examples, `[L]`. Arrays are `[N, L, ...]`: N examples, L layers, H heads, T a query's own tokens
(zeros for padding), n training tokens.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EPSILON = 1e-20
_BLOCK = 2000  # rows of pairs that are compared at a time
KENDALL_VARIANTS = ("tau_a", "tau_b")


class Undefined(UserWarning):
  """A metric has no value for some or all of the data."""


def rec2ftp(gold, zs, ft, icl) -> float:
  """Percentage of the examples mended by finetuning that in-context learning mends too.

  Args:
    gold, zs, ft, icl: `[N] int` labels: true, and predicted zero-shot, finetuned, in context.

  Returns:
    Percent; NaN, with a warning, if finetuning mends none.

  Raises:
    ValueError: for different lengths, or a negative label.
  """
  gold, zs, ft, icl = (np.asarray(x) for x in (gold, zs, ft, icl))
  for name, values in (("zs", zs), ("ft", ft), ("icl", icl)):
    if values.ndim != 1 or values.shape != gold.shape:
      raise ValueError(
        f"gold has shape {gold.shape} and the predictions {name} {values.shape}; give vectors of "
        "one length."
      )
  negative = np.flatnonzero(gold < 0)
  if negative.size:
    raise ValueError(
      f"row {negative[0]} has the label {gold[negative[0]]}; rows without labels cannot be used."
    )
  mended = (zs != gold) & (ft == gold)
  if not mended.any():
    warnings.warn(
      "Rec2FTP is undefined: no row is wrong zero-shot and right after finetuning.", Undefined,
      stacklevel=2)
    return float("nan")
  return 100 * float(np.mean(icl[mended] == gold[mended]))


def cosine(u, v):
  """`u.v / (|u||v| + 1e-20)` over the last axis."""
  u, v = jnp.asarray(u), jnp.asarray(v)
  norms = jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(v, axis=-1)
  # 1e-20 is below float32's rounding of any other sum, and keeps 0 / 0 at 0.
  return jnp.sum(u * v, axis=-1) / (norms + _EPSILON)


def sim_aou_each(icl, zs, ft, normalise: bool = True):
  """Similarity of attention output updates `[N,L]`: `cos(icl - zs, ft - zs)` of `[N,L,D]`.

  Args:
    icl, zs, ft: outputs of attention in the three settings.
    normalise: bring outputs to length 1 first (the paper); then even unrelated updates are somewhat
      alike, see `sim_aou`.
  """
  _check_equal(icl=icl, zs=zs, ft=ft)
  return cosine(_change(icl, zs, normalise), _change(ft, zs, normalise))


def sim_aou(icl, zs, ft, normalise: bool = True):
  """Mean over examples of `sim_aou_each`, `[L]`.

  If outputs are normalised, two updates of length `rho |z|` that are orthogonal to the output `z`
  and to each other score `a^2 / (a^2 + rho^2 / (1 + rho^2))` instead of 0, with
  `a = 1 / sqrt(1 + rho^2) - 1`.
  """
  return jnp.mean(sim_aou_each(icl, zs, ft, normalise), axis=0)


def sim_aou_random_each(icl, zs, random):
  """`sim_aou_each`, normalised, with a random vector (`uniform`) as the finetuning update."""
  _check_equal(icl=icl, zs=zs, random=random)
  return cosine(_change(icl, zs, True), random)


def sim_am_each(icl, other):
  """Similarity of attention maps `[N,L]`: the mean over heads of `cos` of scores `[N,L,H,T]`."""
  _check_equal(icl=icl, other=other)
  return jnp.mean(cosine(icl, other), axis=-1)


def sim_am(icl, other):
  """Mean over examples of `sim_am_each`, `[L]`; `other` finetuned ("after") or zero-shot."""
  return jnp.mean(sim_am_each(icl, other), axis=0)


def sim_am_delta_each(icl, zs, ft):
  """Similarity of the changes of attention maps `[N,L]`, of scores `[N,L,H,T]`."""
  _check_equal(icl=icl, zs=zs, ft=ft)
  icl, zs, ft = (jnp.asarray(x) for x in (icl, zs, ft))
  return jnp.mean(cosine(icl - zs, ft - zs), axis=-1)


def sim_am_delta(icl, zs, ft):
  """Mean over examples of `sim_am_delta_each`, `[L]`."""
  return jnp.mean(sim_am_delta_each(icl, zs, ft), axis=0)


class Kendall(NamedTuple):
  """Rank correlation.

  Attributes:
    mean: `[L]`, over the examples for which it is defined; NaN if there are none.
    num_undefined: `[L] int`, examples left out: those with constant values, or a single one.
  """

  mean: np.ndarray
  num_undefined: np.ndarray


def kendall(a, b, variant: str = "tau_b") -> Kendall:
  """Mean over examples of Kendall's tau of `[N,L,n]`; leaves out undefined ones, with a warning.

  Args:
    a, b: values whose orders are compared.
    variant: "tau_a", `(Pc - Pd) / (n (n-1) / 2)` (the paper), or "tau_b", which discounts ties (the
      paper's script, and scipy's default); they are equal without ties.
  """
  return defined_mean(kendall_each(a, b, variant))


def defined_mean(each) -> Kendall:
  """Mean over axis 0 without NaN, with a warning if any is left out."""
  each = np.asarray(each, np.float64)
  undefined = np.isnan(each)
  counts = undefined.sum(axis=0)
  if counts.any():
    warnings.warn(
      f"Kendall's tau is undefined for {counts.sum()} of {each.size} pairs of vectors, which are "
      "constant or have a single element; the means are over the others.", Undefined, stacklevel=3)
  known = len(each) - counts
  total = np.where(undefined, 0, each).sum(axis=0)
  return Kendall(np.where(known > 0, total / np.maximum(known, 1), np.nan), counts)


def kendall_each(a, b, variant: str = "tau_b"):
  """Kendall's tau of each pair of vectors, `[...,n]` to `[...]`; NaN if it is undefined.

  Pairs of values are compared by their signs, `O(n^2)` a vector, in blocks of rows.

  Raises:
    ValueError: for shapes that disagree, or an unknown variant.
  """
  _check_equal(a=a, b=b)
  if variant not in KENDALL_VARIANTS:
    raise ValueError(f"variant={variant!r} is not one of {', '.join(KENDALL_VARIANTS)}.")
  a, b = jnp.asarray(a), jnp.asarray(b)
  if a.shape[-1] < 2 or a.size == 0:
    return jnp.full(a.shape[:-1], jnp.nan, jnp.float32)
  return _kendall(a, b, variant)


@functools.partial(jax.jit, static_argnames="variant")
def _kendall(a, b, variant):
  n = a.shape[-1]
  block = min(n, _BLOCK)
  num_blocks = -(-n // block)

  def one(pair):
    padded = [jnp.pad(x, (0, num_blocks * block - n)).reshape(num_blocks, block) for x in pair]
    inside = (jnp.arange(num_blocks * block) < n).reshape(num_blocks, block)

    def count(total, rows):
      *rows, real = rows
      x, y = (jnp.sign(r[:, None] - whole[None, :]).astype(jnp.int32) * real[:, None]
              for r, whole in zip(rows, pair))
      # Sums of whole numbers are kept as integers: float32 would round above 2^24.
      return total + jnp.stack([jnp.sum(x * y), jnp.sum(x * x), jnp.sum(y * y)]), None

    start = jnp.zeros(3, jnp.int32)
    (both, of_a, of_b), _ = jax.lax.scan(count, start, (*padded, inside))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    both, of_a, of_b = (x.astype(wide) for x in (both, of_a, of_b))
    bottom = jnp.sqrt(of_a) * jnp.sqrt(of_b) if variant == "tau_b" else n * (n - 1)
    return jnp.where((of_a > 0) & (of_b > 0), both / bottom, jnp.nan)

  vectors = (a.reshape(-1, n), b.reshape(-1, n))
  return jax.lax.map(one, vectors).reshape(a.shape[:-1])


def top_recall_each(a, b, count: int):
  """Share of the `count` largest of `a` that are among those of `b`, `[...,n]` to `[...]`."""
  _check_equal(a=a, b=b)
  count = min(count, np.shape(a)[-1])
  if count < 1:
    return jnp.full(np.shape(a)[:-1], jnp.nan, jnp.float32)
  tops = [jax.lax.top_k(jnp.asarray(x), count)[1] for x in (a, b)]
  return jnp.mean(jnp.any(tops[0][..., :, None] == tops[1][..., None, :], axis=-1), axis=-1)


def of_groups(scores, groups, num_groups: int):
  """Softmax over all n tokens, summed over each token's group: `[...,n]` to `[...,groups]`.

  Args:
    scores: scores before softmax.
    groups: `[n] int`, the demonstration of each token.
    num_groups: number of demonstrations.
  """
  member = jax.nn.one_hot(jnp.asarray(groups), num_groups)
  return jnp.matmul(jax.nn.softmax(jnp.asarray(scores), axis=-1), member, precision="highest")


def uniform(seed: int, rows, shape):
  """Random baselines: `[N,*shape]` uniform on [0,1), each row a function of (seed, its number)."""
  key = jax.random.key(seed)
  return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), shape))(
    jnp.asarray(rows, jnp.uint32))


def _change(x, start, normalise):
  """`x - start`, both first at length 1 if `normalise`; exactly 0 if they are equal.

  A plain difference of two quotients may not be 0: compiled, one may be fused into it unrounded.
  """
  x, start = jnp.asarray(x), jnp.asarray(start)
  if not normalise:
    return x - start
  lengths = [jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (x, start)]
  longer = (lengths[0] - lengths[1]) / (lengths[1] + _EPSILON)
  return ((x - start) - start * longer) / (lengths[0] + _EPSILON)


def _check_equal(**arrays):
  shapes = {name: np.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1 or min(map(len, shapes.values())) < 1:
    raise ValueError(
      f"shapes disagree: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
    )
