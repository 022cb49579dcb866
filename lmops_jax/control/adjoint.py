"""The adjoint of one training step, split into the optimizer's part and the model's part.

With cotangents `(p, q)` of `(params_{t+1}, opt_state_{t+1})`, one vjp of the optimizer update gives
`(d, q', u)`, the cotangents of `params_t` (direct), `opt_state_t` and of the raw gradient `g_t`.
The model then enters through `u` alone (arXiv 2410.07064, theorem 2.1, for any optimizer):

  p_t = d + H(params_t) u + grad J(params_t);    -dA/dweights[t, n] = -<u, grad l_n(params_t)>.

The Hessian is symmetric, so `H u` is one `jax.jvp` of `jax.grad` (twice the memory of a gradient;
the vjp of the whole step takes four to eight times), and the tangents of the losses in that
same pass are the directional derivatives of all examples: in-batch scores cost nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import State, apply_update, strong, weighted_loss
from lmops_jax.control.guards import finite_derivatives
from lmops_jax.mesh.micro_batches import DeviceRows, RowSum, fill_parts, sum_over_micro_batches

HVP_MODES = ("jvp_of_grad", "vjp_of_grad")


def _like(tangent: Any, params: Any) -> Any:
  """A tangent in the dtypes of the parameters."""
  return jax.tree.map(
    lambda u, p: jnp.asarray(u).astype(jnp.result_type(p)), tangent, params)


def is_inexact(x: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def float_leaves(tree: Any) -> list[jax.Array]:
  """The differentiable leaves of a pytree: counters, keys and flags have no cotangent."""
  return [x for x in jax.tree.leaves(tree) if is_inexact(x)]


def update_pullback(update: Callable, state: State, grads: Any, params_cotangent: Any,
                    opt_cotangent: list[jax.Array], surrogate: str | None = None):
  """Cotangents of everything one optimizer step reads, from those of what it writes.

  Args:
    update: `optimizer.update(grads, opt_state, params)`.
    state: the state before the step. grads: the raw gradient of the step.
    params_cotangent: cotangent of the new parameters, like `params`.
    opt_cotangent: cotangents of the new state's floating-point leaves, in leaf order.
    surrogate: the derivative that a sign gets in place of 0, see `surrogates`.
  Returns:
    `(d, q, u)`: cotangents of `state.params` (through the update alone), of the floating-point
    leaves of `state.opt_state`, and of `grads`. They are finite even if the second moment of Adam
    or the gradient that is clipped is 0 (see `guards`).
  """
  leaves, treedef = jax.tree.flatten(state.opt_state)

  def step(params, floats, grads):
    floats = iter(floats)
    opt_state = treedef.unflatten([next(floats) if is_inexact(x) else x for x in leaves])
    new = apply_update(update, State(params, opt_state), grads)
    return new.params, float_leaves(new.opt_state)

  _, pull = jax.vjp(
    finite_derivatives(step, surrogate), state.params, float_leaves(state.opt_state), grads)
  return pull((params_cotangent, opt_cotangent))


def hvp_scores_losses(example_losses: Callable, params: Any, cotangent: Any, batch: Any,
                      weights: jax.Array, *, mode: str = "jvp_of_grad",
                      micro_batch_size: int | None = None,
                      device_rows: DeviceRows | None = None):
  """`(H u, [<grad l_n, u>], [l_n])` with `H` the Hessian of `sum_n weights[n] l_n`.

  Args:
    example_losses: `(params, batch) -> [B]`.
    cotangent: the vector `u`, like `params`.
    batch: leaves `[B, ...]`. weights: `[B]`.
    mode: "jvp_of_grad" (forward over reverse), or "vjp_of_grad" (reverse over reverse, for losses
      with a `custom_vjp` whose backward pass has no forward-mode rule; more memory).
    micro_batch_size: examples differentiated at once (divides `B`); all by default.
    device_rows: see `sum_over_micro_batches`.
  """
  hvp, (scores, losses) = sum_over_micro_batches(
    *hvp_row_sum(example_losses, params, cotangent, batch, weights, mode, micro_batch_size),
    device_rows)
  return hvp, scores, losses


def hvp_row_sum(example_losses: Callable, params: Any, cotangent: Any, batch: Any,
                weights: jax.Array, mode: str, micro_batch_size: int | None) -> RowSum:
  """`hvp_scores_losses` as a sum over rows: `H u` added up, `(<grad l_n, u>, l_n)` for each row."""
  params, cotangent = strong(params), _like(cotangent, params)

  def part(whole, batch, weights):
    example_losses, params, cotangent = whole
    if mode == "jvp_of_grad":
      grad = jax.grad(lambda p: weighted_loss(example_losses, p, batch, weights), has_aux=True)
      (_, losses), (hvp, scores) = jax.jvp(grad, (params,), (cotangent,))
    else:
      # The gradient as a function of (params, weights): its pullback at u is (H u, <grad l_n, u>).
      grad = jax.grad(lambda p, w: weighted_loss(example_losses, p, batch, w), has_aux=True)
      _, pull, losses = jax.vjp(grad, params, weights, has_aux=True)
      hvp, scores = pull(cotangent)
    return hvp, (scores, losses)

  return RowSum(
    part, (as_pytree(example_losses), params, cotangent), batch, weights, micro_batch_size)


def hvp_and_scores(example_losses: Callable, params: Any, cotangent: Any, batch: Any,
                   gamma: jax.Array):
  """Hessian-cotangent product and per-example scores from one forward-over-reverse pass.

  Args:
    example_losses: `(params, batch) -> [B] float32`.
    cotangent: pytree like `params`. gamma: `[B] float32` data weights, >= 0.
  Returns:
    `H @ cotangent` (like `params`) and `[B] float32`: `<grad l_n, cotangent>`.
  """
  return hvp_scores_losses(example_losses, params, cotangent, batch, gamma)[:2]


def directional_derivatives(example_losses: Callable, params: Any, direction: Any, batch: Any, *,
                            mode: str = "jvp_of_grad", micro_batch_size: int | None = None,
                            device_rows: DeviceRows | None = None):
  """`([<grad l_n, direction>] [B], [l_n] [B])` in one forward-mode pass.

  With `mode="vjp_of_grad"` the jvp is built from two transposes instead, for losses that have no
  forward-mode rule. It takes `micro_batch_size` examples at once (a divisor of B; all by default).
  """
  params, direction = strong(params), _like(direction, params)
  def part(whole, batch, _):
    example_losses, params, direction = whole
    def losses_of(p):
      losses = example_losses(p, batch)
      return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    if mode == "jvp_of_grad":
      losses, slopes = jax.jvp(losses_of, (params,), (direction,))
      return (), (slopes, losses)
    losses, pull = jax.vjp(losses_of, params)
    _, pull_pull = jax.vjp(lambda w: pull(w)[0], jnp.zeros_like(losses))
    return (), (pull_pull(direction)[0], losses)

  num_rows = jax.tree.leaves(batch)[0].shape[0]
  return sum_over_micro_batches(
    part, (as_pytree(example_losses), params, direction), batch, jnp.ones(num_rows),
    micro_batch_size, device_rows)[1]


def directional_scores(example_losses: Callable, params: Any, direction: Any, data: Any,
                       batch_size: int | None = None, *, mode: str = "jvp_of_grad",
                       device_rows: DeviceRows | None = None) -> jax.Array:
  """`<grad l_n(params), direction>` for every row of `data`, `batch_size` rows at a time.

  One forward-mode pass for each batch (three times a forward evaluation), with the memory of one
  batch. If the direction is a gradient of the target loss (a costate, an influence direction), a
  positive score means that a descent step on the example lowers the target loss.

  Args:
    data: leaves `[M, ...]`. batch_size: rows a pass (any size; all rows when None).
    device_rows: see `sum_over_micro_batches`.
  Returns:
    `[M] float32` (or wider, as the losses).
  """
  checks.parameters(params)
  num_rows, = checks.leading_axes(data, "data", 1, "M")
  params, data = strong(params), checks.arrays(data, "data")
  direction = _like(checks.like_params(direction, "direction", params), params)
  checks.losses(example_losses, params, data, num_rows, "data")
  checks.device_rows(device_rows, data=num_rows)
  if batch_size is not None:
    batch_size = checks.integer(batch_size, "batch_size", 1)
  return _directional_scores(
    as_pytree(example_losses), params, direction, data, num_rows, batch_size,
    checks.one_of(mode, "mode", HVP_MODES), device_rows)


@functools.partial(jax.jit, static_argnames=("num_rows", "batch_size", "mode", "device_rows"))
def _directional_scores(example_losses, params, direction, data, num_rows, batch_size, mode,
                        device_rows):
  if device_rows is None and batch_size is not None:
    data, batch_size = fill_parts(data, batch_size)
  scores, _ = directional_derivatives(
    example_losses, params, direction, data, mode=mode, micro_batch_size=batch_size,
    device_rows=device_rows)
  return scores[:num_rows]
