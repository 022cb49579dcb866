"""Training as a discrete dynamical system: the state, the weighted loss and one optimizer step.

The state of PDS's control problem (arXiv 2410.07064, section 2.1, extended to any optimizer as in
its appendix on Adam) is `(params, opt_state)`; one step is

  g_t = grad sum_n weights[t, n] * l_n(params_t);   state_{t+1} = update(g_t, state_t).

Everything is a pure function of arrays, so it runs under `jit`, `scan` and sharding. Training takes
the same step, so a solve's forward pass and a training run on the same batches give the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmops_jax.control import checks, jaxprs
from lmops_jax.control.callables import as_pytree
from lmops_jax.mesh.micro_batches import DeviceRows, sum_over_micro_batches


class State(NamedTuple):
  """Parameters and optimizer state before a step."""
  params: Any
  opt_state: Any


def strong(tree: Any) -> Any:
  """`tree` with every leaf an array of fixed dtype (Python scalars and weak types made strong)."""
  def leaf(x):
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x
  return jax.tree.map(leaf, tree)


def weighted_loss(example_losses: Callable, params: Any, batch: Any, weights: jax.Array):
  """`(sum_n weights[n] * l_n, l)` with the sum and `l [B]` in float32 or wider."""
  losses = example_losses(params, batch)
  losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
  return jnp.sum(weights * losses), losses


def gradient(example_losses: Callable, params: Any, batch: Any, weights: jax.Array, *,
             micro_batch_size: int | None = None, device_rows: DeviceRows | None = None) -> Any:
  """Gradient of the weighted loss (pytree like `params`), summed over micro-batches if asked."""
  return gradient_and_sums(example_losses, params, batch, weights, lambda losses, weights: None,
                           micro_batch_size=micro_batch_size, device_rows=device_rows)[0]


def gradient_and_sums(
  example_losses: Callable, params: Any, batch: Any, weights: jax.Array, sums: Callable, *,
  micro_batch_size: int | None = None, device_rows: DeviceRows | None = None,
) -> tuple[Any, Any]:
  """The gradient, and `sums(losses [B], weights [B])` of every micro-batch added up."""
  def part(whole, batch, weights):
    grads, losses = jax.grad(weighted_loss, argnums=1, has_aux=True)(*whole, batch, weights)
    return (grads, sums(losses, weights)), None

  return sum_over_micro_batches(
    part, (as_pytree(example_losses), params), batch, weights, micro_batch_size, device_rows)[0]


def apply_update(update: Callable, state: State, grads: Any) -> State:
  """One optimizer step from raw gradients; leaf dtypes of the state are kept."""
  updates, opt_state = update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  def like(new, old):
    new = jnp.asarray(new)
    return new if new.dtype == old.dtype else new.astype(old.dtype)
  return State(jax.tree.map(like, params, state.params),
               jax.tree.map(like, opt_state, state.opt_state))


class StepSums(NamedTuple):
  """What a step measures on its way, each `[] float32`.

  Attributes:
    objective: the weighted loss.
    loss_sum: the losses of all examples, added without weights.
    grad_norm: the gradient's norm before the optimizer clips it; frozen parameters count as 0.
  """
  objective: jax.Array
  loss_sum: jax.Array
  grad_norm: jax.Array


def step(
  example_losses: Callable, update: Callable, state: State, batch: Any, weights: jax.Array, *,
  micro_batch_size: int | None = None, device_rows: DeviceRows | None = None,
) -> tuple[State, StepSums]:
  """One step: the gradient of the weighted loss, and the optimizer's update with it.

  The loss is differentiated with respect to those parameters alone whose gradients the optimizer
  reads, so that a frozen parameter costs no gradient and no memory for one.

  Args:
    example_losses: `(params, batch) -> [B]`.
    update: `optimizer.update`.
    batch: leaves `[B, ...]`. weights: `[B] float32`.
    micro_batch_size, device_rows: see `lmops_jax.mesh.micro_batches`.
  """
  leaves, treedef = jax.tree.flatten(state.params)
  is_read = gradients_read(update, state)
  learned = [x for x, read in zip(leaves, is_read) if read]
  frozen = [x for x, read in zip(leaves, is_read) if not read]
  losses_of_learned = jax.tree_util.Partial(
    functools.partial(_losses_of_learned, treedef, is_read), as_pytree(example_losses), frozen)
  found, (objective, loss_sum) = gradient_and_sums(
    losses_of_learned, learned, batch, weights,
    lambda losses, weights: (jnp.vdot(weights, losses), jnp.sum(losses)),
    micro_batch_size=micro_batch_size, device_rows=device_rows)
  grads = _joined(treedef, is_read, found, [jnp.zeros_like(x) for x in frozen])
  sums = StepSums(objective, loss_sum, optax.tree.norm(grads))
  return apply_update(update, state, grads), sums


def gradients_read(update: Callable, state: State) -> list[bool]:
  """For each leaf of the parameters, whether anything `update` returns depends on its gradient.

  No array is computed: the traced program of the update is read.
  """
  num = len(jax.tree.leaves(state.params))
  traced = jax.make_jaxpr(update)(state.params, state.opt_state, state.params).jaxpr
  masks = [1 << i if i < num else 0 for i in range(len(traced.invars))]
  read = jaxprs.union(jaxprs.dependence(traced, masks))
  return [bool(read >> i & 1) for i in range(num)]


def _losses_of_learned(treedef, is_read, example_losses, frozen, learned, batch):
  return example_losses(_joined(treedef, is_read, learned, frozen), batch)


def _joined(treedef, is_read, learned, frozen):
  learned, frozen = iter(learned), iter(frozen)
  return treedef.unflatten([next(learned if read else frozen) for read in is_read])


def map_images(fn: Callable, opt_state: Any, params: Any) -> Any:
  """`opt_state` with `fn` applied to every part that is like `params` in structure and shapes."""
  structure = jax.tree.structure(params)
  shapes = [x.shape for x in jax.tree.leaves(params)]

  def is_image(tree):
    return jax.tree.structure(tree) == structure and shapes == [
      jnp.shape(x) for x in jax.tree.leaves(tree)]

  return jax.tree.map(lambda x: fn(x) if is_image(x) else x, opt_state, is_leaf=is_image)


def init_state(init: Callable, update: Callable, params: Any) -> State:
  """The state before step 0, in dtypes that a step keeps.

  An optimizer may start its state in a narrower or weakly typed dtype than the one it returns; the
  first state is widened to what later steps hold, so that all states of a run have one type.

  Raises:
    ValueError: if the optimizer does not work on these parameters, or the update changes the
      structure or a shape of the optimizer state.
  """
  params = strong(params)
  failure = "optimizer cannot take a step on params, given gradients, its state and params alone"
  with checks.failing(failure):
    opt_state = strong(init(params))
  for _ in range(3):  # a widened leaf may widen another one: repeat until nothing changes
    with checks.failing(failure):
      out = jax.eval_shape(update, params, opt_state, params)[1]
    if jax.tree.structure(out) != jax.tree.structure(opt_state) or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(opt_state))):
      raise ValueError(
        "optimizer.update returns a state whose structure or shapes differ from optimizer.init's; "
        "steps and their adjoint need an optimizer with a state of constant type.")
    def widen(old, new):
      if not jnp.issubdtype(old.dtype, jnp.inexact):
        return old
      return old.astype(jnp.promote_types(old.dtype, new.dtype))
    wide = jax.tree.map(widen, opt_state, out)
    if all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(opt_state))):
      break
    opt_state = wide
  return State(params, opt_state)
