"""The two programs that a resumable solve runs again and again, from shapes alone.

`pmp_scores_resumable` calls one compiled program for each segment of the forward pass and one for
each segment of the reverse pass. Here the same programs are lowered for abstract values that carry
the shardings of a mesh, so that they can be compiled for devices that are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.control import piecewise, resumable
from lmops_jax.control.adjoint import float_leaves
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import State, init_state, map_images
from lmops_jax.control.pmp import check_settings, shardings_of
from lmops_jax.control.problem import Settings
from lmops_jax.mesh.micro_batches import DeviceRows


class SegmentPrograms(NamedTuple):
  """Lowers one segment of a pass; call it inside the mesh's context.

  Attributes:
    forward, reverse: `() -> jax.stages.Lowered`.
    state: the abstract state that a segment starts from.
  """

  forward: Callable[[], Any]
  reverse: Callable[[], Any]
  state: State


def segment_programs(
  example_losses: Callable, target_loss: Any, optimizer: Any, params: Any, batches: Any,
  weights: jax.ShapeDtypeStruct, proxy: Any, settings: Settings, segment_steps: int,
    device_rows: DeviceRows | None = None,
) -> SegmentPrograms:
  """The programs of a solve.

  Args:
    target_loss: a `MeanTargetLoss` whose data are `ShapeDtypeStruct`s.
    params, batches, weights, proxy: as in `pmp_scores`, `ShapeDtypeStruct`s with shardings.
    settings: of the solve.
    segment_steps: steps of a segment. device_rows: as in `pmp_scores`.
  """
  num_steps, batch_size = weights.shape
  settings = check_settings(settings, num_steps, batch_size)
  data = resumable._Data(
    as_pytree(example_losses), target_loss, as_pytree(optimizer.update), batches, weights, proxy)
  state = abstract_state(optimizer, params)
  settings = settings._replace(
    surrogate=piecewise.used_surrogate(optimizer.update, state, settings.surrogate))
  static = dict(settings=settings, shardings=shardings_of(params), device_rows=device_rows)
  steps = jax.ShapeDtypeStruct((min(segment_steps, num_steps),), jnp.int32)

  def forward():
    return resumable._forward_segment.lower(data, state, steps, **static)

  def reverse():
    carry, _ = jax.eval_shape(
      lambda data, state: resumable._problem(data, **static).first_carry(state), data, state)
    carry = carry._replace(
      costate=_placed(carry.costate, params), opt_cotangent=float_leaves(state.opt_state))
    if carry.group is not None:
      carry = carry._replace(group=carry.group._replace(
        direction=_placed(carry.group.direction, params),
        params=_placed(carry.group.params, params)))
    return resumable._reverse_segment.lower(data, state, carry, steps, **static)

  return SegmentPrograms(forward, reverse, state)


def abstract_state(optimizer: Any, params: Any) -> State:
  """The first state of a solve: optimizer state in the parameters' image placed like them."""
  state = jax.eval_shape(lambda p: init_state(optimizer.init, optimizer.update, p), params)
  opt_state = map_images(lambda image: _placed(image, params), state.opt_state, params)
  return State(_placed(state.params, params), opt_state)


def _placed(tree: Any, like: Any) -> Any:
  return jax.tree.map(
    lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), tree, like)
