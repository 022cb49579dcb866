"""Optimizers and schedules by gin name; each returns a plain optax transformation or schedule.

`learning_rate` is a positive number or a schedule `step -> rate`. The transformations hold no
parameters and no step of their own outside the optax state, so that `control` can differentiate
through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import optax

DECAY_MASKS = ("all", "matrices")
Schedule = Callable[[jax.Array], jax.Array]


@gin.register(module="optim")
def sgd(
  learning_rate: float | Schedule = 0.1,
  momentum: float | None = None,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  nesterov: bool = False,
  decay_mask: str = "all",
) -> optax.GradientTransformation:
  """`m' = momentum m + g + weight_decay theta`, `theta' = theta - learning_rate m'`.

  The decay is part of the gradient, as in the reference of PDS. With `clip_norm` the gradient is
  clipped before that.

  Raises:
    ValueError: for values outside their range.
  """
  _check("sgd", learning_rate, weight_decay, clip_norm)
  if momentum is not None and not 0 <= momentum < 1:
    raise ValueError(f"optim.sgd.momentum={momentum} must be in [0, 1) or None.")
  if nesterov and not momentum:
    raise ValueError("optim.sgd.nesterov=True needs a momentum above 0.")
  parts = _clip(clip_norm)
  mask = decay_mask_fn(decay_mask)
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, mask))
  if momentum is not None:
    parts.append(optax.trace(momentum, nesterov))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


@gin.register(module="optim")
def momentum(
  learning_rate: float | Schedule = 0.1,
  decay: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  decay_mask: str = "all",
) -> optax.GradientTransformation:
  """Heavy-ball or Nesterov momentum: `sgd` with the momentum on.

  Raises:
    ValueError: for values outside their range.
  """
  return sgd(learning_rate, decay, weight_decay, clip_norm, nesterov, decay_mask)


@gin.register(module="optim")
def adamw(
  learning_rate: float | Schedule,
  b1: float = 0.9,
  b2: float = 0.98,
  eps: float = 1e-6,
  weight_decay: float = 1e-2,
  clip_norm: float | None = 1.0,
  decay_mask: str = "all",
  eps_root: float = 0.0,
) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101) after clipping by the global norm; defaults are those of PDS.

  Args:
    learning_rate: number or schedule.
    b1: decay of the mean.
    b2: decay of the square.
    eps: added outside the root.
    weight_decay: decoupled, multiplied by the learning rate.
    clip_norm: largest global norm of the gradient; None does not clip.
    decay_mask: "all" parameters decay (as in the reference of PDS), or "matrices", which spares
      norm scales and biases.
    eps_root: added inside the root. Above 0 it makes the update smooth where a gradient is 0.

  Raises:
    ValueError: for values outside their range.
  """
  _check("adamw", learning_rate, weight_decay, clip_norm)
  _check_betas("adamw", b1, b2)
  if eps < 0 or eps_root < 0 or eps + eps_root == 0:
    raise ValueError(
      f"optim.adamw.eps={eps} and eps_root={eps_root} must not be negative, nor both 0."
    )
  return optax.chain(
    *_clip(clip_norm),
    optax.adamw(
      learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay,
      mask=decay_mask_fn(decay_mask),
    ),
  )


@gin.register(module="optim")
def lion(
  learning_rate: float | Schedule = 1e-4,
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 1e-1,
  clip_norm: float | None = None,
  decay_mask: str = "all",
) -> optax.GradientTransformation:
  """Lion (arXiv:2302.06675): the sign of an interpolated momentum, decoupled decay.

  Its update is piecewise constant: scores through it need a surrogate, see `control.surrogates`.

  Raises:
    ValueError: for values outside their range.
  """
  _check("lion", learning_rate, weight_decay, clip_norm)
  _check_betas("lion", b1, b2)
  return optax.chain(
    *_clip(clip_norm),
    optax.lion(
      learning_rate, b1, b2, weight_decay=weight_decay, mask=decay_mask_fn(decay_mask)
    ),
  )


@gin.register(module="optim")
def warmup_cosine(
  peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
) -> Schedule:
  """Linear from 0 at step 0 to `peak`, then half a cosine to `end` at `total_steps`, then `end`.

  `end + (peak - end) / 2 * (1 + cos(pi (t - warmup_steps) / (total_steps - warmup_steps)))`

  Raises:
    ValueError: for values outside their range.
  """
  _check_warmup("warmup_cosine", peak, warmup_steps, total_steps, end)

  def schedule(step):
    t = jnp.asarray(step, jnp.result_type(float))
    warmup = peak / max(warmup_steps, 1) * t
    done = jnp.clip((t - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    return jnp.where(
      t < warmup_steps, warmup, end + (peak - end) / 2 * (1 + jnp.cos(jnp.pi * done))
    )

  return schedule


@gin.register(module="optim")
def warmup_linear(
  peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
) -> Schedule:
  """Linear from 0 at step 0 to `peak`, then linear to `end` at `total_steps`, then `end`.

  The polynomial decay of fairseq with its power of 1.

  Raises:
    ValueError: for values outside their range.
  """
  _check_warmup("warmup_linear", peak, warmup_steps, total_steps, end)

  def schedule(step):
    t = jnp.asarray(step, jnp.result_type(float))
    left = jnp.clip((total_steps - t) / (total_steps - warmup_steps), 0, 1)
    return jnp.where(
      t < warmup_steps, peak / max(warmup_steps, 1) * t, end + (peak - end) * left
    )

  return schedule


@gin.register(module="optim")
def constant(value: float) -> Schedule:
  """The same rate at every step.

  Raises:
    ValueError: for a rate that is not positive.
  """
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f"optim.constant.value={value} must be positive.")
  return optax.constant_schedule(value)


def decay_mask_fn(kind: str) -> Callable | None:
  """Which parameters decay, as optax takes it: None for "all", a function for "matrices".

  Vectors are told by name (`scale`, `bias`) as well as by rank, because the scales of stacked
  layers are `[L,D]`.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind not in DECAY_MASKS:
    raise ValueError(f"decay_mask={kind!r} is not one of {', '.join(DECAY_MASKS)}.")
  if kind == "all":
    return None

  def matrices(params):
    def decays(path, leaf):
      names = {getattr(part, "key", getattr(part, "name", None)) for part in path}
      return jnp.ndim(leaf) >= 2 and not names & {"scale", "bias"}

    return jax.tree_util.tree_map_with_path(decays, params)

  return matrices


def _clip(clip_norm):
  return [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]


def _check(name, learning_rate, weight_decay, clip_norm):
  if not callable(learning_rate) and not (math.isfinite(learning_rate) and learning_rate > 0):
    raise ValueError(f"optim.{name}.learning_rate={learning_rate} must be positive.")
  if not (math.isfinite(weight_decay) and weight_decay >= 0):
    raise ValueError(f"optim.{name}.weight_decay={weight_decay} must be 0 or more.")
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f"optim.{name}.clip_norm={clip_norm} must be positive, or None not to clip.")


def _check_warmup(name, peak, warmup_steps, total_steps, end):
  if not (math.isfinite(peak) and peak > 0):
    raise ValueError(f"optim.{name}.peak={peak} must be positive.")
  if not 0 <= end <= peak:
    raise ValueError(f"optim.{name}.end={end} must be in [0, peak={peak}].")
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"optim.{name}.warmup_steps={warmup_steps} must be in [0, total_steps={total_steps}); "
      "shorten the warm-up or train longer."
    )


def _check_betas(name, b1, b2):
  for field, value in (("b1", b1), ("b2", b2)):
    if not 0 <= value < 1:
      raise ValueError(f"optim.{name}.{field}={value} must be in [0, 1).")
