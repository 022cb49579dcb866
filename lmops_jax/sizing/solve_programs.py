"""The two programs that a solve with a store runs again and again, from shapes alone.

Such a solve calls one compiled program for every segment of the forward pass and another for every
segment of the reverse pass. Here the same programs are lowered for abstract values that carry the
shardings of a mesh, so that they can be compiled for devices that are not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.control import piecewise, resumable
from lmops_jax.control.adjoint import float_leaves
from lmops_jax.control.dynamics import State, init_state, map_images
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.problem import Problem
from lmops_jax.control.training_run import TrainingRun, shardings_of


class SegmentPrograms(NamedTuple):
  """Functions that lower one segment of a pass; call them inside the mesh's context.

  Attributes:
    forward, reverse: `() -> jax.stages.Lowered`.
    state: the abstract state that a segment starts from.
  """

  forward: Callable[[], Any]
  reverse: Callable[[], Any]
  state: State


def segment_programs(
    run: TrainingRun, target_loss: Any, proxy: Any, options: SolveOptions) -> SegmentPrograms:
  """The programs of a solve.

  Args:
    run: of `ShapeDtypeStruct`s with shardings.
    target_loss: a `MeanTargetLoss` whose data are `ShapeDtypeStruct`s.
    proxy: `ShapeDtypeStruct`s with shardings.
  """
  options = options.checked(*run.weights.shape)
  state = abstract_state(run.optimizer, run.params)
  options = dataclasses.replace(options, surrogate=piecewise.used_surrogate(
    run.optimizer.update, state, options.surrogate))
  params = run.params
  static = dict(options=options, shardings=shardings_of(params))
  data = dataclasses.replace(run, params=None).traceable(), target_loss, proxy
  steps = jax.ShapeDtypeStruct((options.segment_steps,), jnp.int32)

  def forward():
    return resumable.forward_segment.lower(data, state, steps, **static)

  def reverse():
    carry, _ = jax.eval_shape(
      lambda data, state: Problem.of(*data, **static).first_carry(state), data, state)
    carry = carry._replace(
      costate=_placed(carry.costate, params), opt_cotangent=float_leaves(state.opt_state))
    if carry.group is not None:
      carry = carry._replace(group=carry.group._replace(
        direction=_placed(carry.group.direction, params),
        params=_placed(carry.group.params, params)))
    return resumable.reverse_segment.lower(data, state, carry, steps, **static)

  return SegmentPrograms(forward, reverse, state)


def abstract_state(optimizer: Any, params: Any) -> State:
  """The first state of a solve; optimizer state in the parameters' image is placed like them."""
  state = jax.eval_shape(lambda p: init_state(optimizer.init, optimizer.update, p), params)
  opt_state = map_images(lambda image: _placed(image, params), state.opt_state, params)
  return State(_placed(state.params, params), opt_state)


def _placed(tree: Any, like: Any) -> Any:
  return jax.tree.map(
    lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), tree, like)
