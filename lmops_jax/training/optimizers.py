"""Optimizers and schedules by gin name; each returns a plain optax transformation or schedule.

`learning_rate` is a positive number or a schedule `step -> rate`. The transformations hold no
parameters and no step of their own outside the optax state, so that `control` can differentiate
through them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from lmops_jax.config.setting_types import (
  Count,
  Decay,
  NonEmpty,
  NonNegative,
  Positive,
  PositiveInt,
  Text,
  component,
)
from lmops_jax.config.setting_words import Rule, Words

DECAY_MASKS = ("all", "matrices")


def _gives_a_number(schedule: Callable) -> bool:
  try:
    rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
  except Exception:  # a function that is no schedule may raise anything
    return False
  return getattr(rate, "shape", None) == ()


Schedule = Annotated[
  Callable[[jax.Array], jax.Array], Rule(_gives_a_number),
  Words("a schedule such as @optim.warmup_cosine()"),
]


@component(module="optim")
def sgd(
  learning_rate: Positive | Schedule = 0.1,
  momentum: Decay | None = None,
  weight_decay: NonNegative = 0.0,
  clip_norm: Positive | None = None,
  nesterov: bool = False,
  decay_mask: Literal[DECAY_MASKS] = "all",
) -> optax.GradientTransformation:
  """`m' = momentum m + g + weight_decay theta`, `theta' = theta - learning_rate m'`.

  The decay is part of the gradient, as in the reference of PDS. With `clip_norm` the gradient is
  clipped before that.

  Raises:
    ValueError: for values outside their range.
  """
  if nesterov and not momentum:
    raise ValueError("optim.sgd.nesterov=True needs a momentum above 0.")
  parts = _clip(clip_norm)
  mask = decay_mask_fn(decay_mask)
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, mask))
  if momentum is not None:
    parts.append(optax.trace(momentum, nesterov))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


@component(module="optim")
def momentum(
  learning_rate: Positive | Schedule = 0.1,
  decay: Decay = 0.9,
  nesterov: bool = False,
  weight_decay: NonNegative = 0.0,
  clip_norm: Positive | None = None,
  decay_mask: Literal[DECAY_MASKS] = "all",
) -> optax.GradientTransformation:
  """Heavy-ball or Nesterov momentum: `sgd` with the momentum on.

  Raises:
    ValueError: for values outside their range.
  """
  return sgd(learning_rate, decay, weight_decay, clip_norm, nesterov, decay_mask)


@component(module="optim")
def adamw(
  learning_rate: Positive | Schedule,
  b1: Decay = 0.9,
  b2: Decay = 0.98,
  eps: NonNegative = 1e-6,
  weight_decay: NonNegative = 1e-2,
  clip_norm: Positive | None = 1.0,
  decay_mask: Literal[DECAY_MASKS] = "all",
  eps_root: NonNegative = 0.0,
) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101) after clipping by the global norm; defaults are those of PDS.

  Args:
    learning_rate: number or schedule.
    b1: decay of the gradient's running mean.
    b2: decay of the running mean of its square.
    eps: added outside the root.
    weight_decay: decoupled, multiplied by the learning rate.
    clip_norm: largest global norm of the gradient; None does not clip.
    decay_mask: "all" parameters decay (as in the reference of PDS), or "matrices", which spares
      norm scales and biases.
    eps_root: added inside the root. Above 0 it makes the update smooth at a gradient of 0.

  Raises:
    ValueError: for values outside their range.
  """
  if eps + eps_root == 0:
    raise ValueError("optim.adamw.eps=0 and eps_root=0 divide by 0 where a gradient is 0; set one.")
  return optax.chain(
    *_clip(clip_norm),
    optax.adamw(
      learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay,
      mask=decay_mask_fn(decay_mask),
    ),
  )


@component(module="optim")
def lion(
  learning_rate: Positive | Schedule = 1e-4,
  b1: Decay = 0.9,
  b2: Decay = 0.99,
  weight_decay: NonNegative = 1e-1,
  clip_norm: Positive | None = None,
  decay_mask: Literal[DECAY_MASKS] = "all",
) -> optax.GradientTransformation:
  """Lion (arXiv:2302.06675): the sign of an interpolated momentum, decoupled decay.

  Its update is piecewise constant, so scores through it need a surrogate, see `control.surrogates`.

  Raises:
    ValueError: for values outside their range.
  """
  return optax.chain(
    *_clip(clip_norm),
    optax.lion(
      learning_rate, b1, b2, weight_decay=weight_decay, mask=decay_mask_fn(decay_mask)
    ),
  )


@component(module="optim")
def partition(
  rules: Annotated[Mapping[Text, optax.GradientTransformation | None], NonEmpty],
) -> optax.GradientTransformation:
  """A transformation of its own for each group of parameters; groups are told apart by paths.

  Each transformation sees its own group alone, so that it clips by the norm of that group.

  Args:
    rules: transformations by regular expression. The first expression that matches a parameter's
      whole path, such as `layers/attention/query/kernel`, decides. None freezes: no gradient is
      computed for the parameter, and the optimizer keeps no state for it.

  Raises:
    ValueError: for a pattern that is no regular expression; and, once there are parameters, for a
      parameter that no pattern matches.
  """
  patterns = {}
  for text in rules:
    try:
      patterns[text] = re.compile(text)
    except re.error as error:
      raise ValueError(
        f"optim.partition.rules has the pattern {text!r}, which must be a regular expression: "
        f"{error}."
      ) from error

  def group(path, _):
    name = "/".join(str(getattr(part, "key", getattr(part, "name", None))) for part in path)
    for text, pattern in patterns.items():
      if pattern.fullmatch(name):
        return text
    raise ValueError(
      f"optim.partition.rules must cover the parameter {name}, which none of its patterns matches; "
      "add one, with None to freeze it."
    )

  return optax.partition(
    {text: optax.set_to_zero() if rule is None else rule for text, rule in rules.items()},
    functools.partial(jax.tree_util.tree_map_with_path, group),
  )


@component(module="optim")
def warmup_cosine(
  peak: Positive, warmup_steps: Count, total_steps: PositiveInt, end: NonNegative = 0.0
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


@component(module="optim")
def warmup_linear(
  peak: Positive, warmup_steps: Count, total_steps: PositiveInt, end: NonNegative = 0.0
) -> Schedule:
  """Linear from 0 at step 0 to `peak`, then linear to `end` at `total_steps`, then `end`.

  It is the polynomial decay of fairseq with its power of 1.

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


@component(module="optim")
def constant(value: Positive) -> Schedule:
  """The same rate at every step."""
  return optax.constant_schedule(value)


def decay_mask_fn(kind: Literal[DECAY_MASKS]) -> Callable | None:
  """The parameters that decay, as an optax mask: None for "all", a function for "matrices".

  Vectors are recognised by name (`scale`, `bias`) as well as by rank, because the scales of stacked
  layers are `[L,D]`.
  """
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


def _check_warmup(name, peak, warmup_steps, total_steps, end):
  if end > peak:
    raise ValueError(f"optim.{name}.end={end} must be in [0, peak={peak}].")
  if warmup_steps >= total_steps:
    raise ValueError(
      f"optim.{name}.warmup_steps={warmup_steps} must be in [0, total_steps={total_steps}); "
      "shorten the warm-up or train longer."
    )
