"""One PMP solve as a pair of pure functions: a forward step and a fused reverse step.

`Problem` ties a loss, a target, an optimizer and the data of T steps together; trajectory policies
and the resumable driver run it without knowing the mathematics. The reverse step at t does at once
what the code of arXiv 2410.07064 does in separate passes: the adjoint of the optimizer, the
Hessian-vector product, the scores of the examples trained on, those of the proxy examples (at the
steps that `every_k`, `groups` or `proxy_samples` choose), and the target gradient. It holds four
parameter-sized arrays at a time: the parameters, the costate, the cotangent u and the product H u;
if sums over devices cross the mesh together, it holds the target gradient, too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.control import adjoint
from lmops_jax.control.dynamics import State, apply_update, gradient, map_images
from lmops_jax.control.options import SolveOptions
from lmops_jax.control.targets import MeanTargetLoss
from lmops_jax.control.training_run import TrainingRun, constrain
from lmops_jax.mesh.micro_batches import DeviceRows, sum_together

PROXY_SCOPE = "score_proxies"  # in the names of the operations that score proxies


class Carry(NamedTuple):
  """What the reverse pass hands from step t to step t - 1."""
  costate: Any  # lambda_{t+1}, the cotangent of params_{t+1}
  opt_cotangent: list[jax.Array]  # of the floating-point leaves of opt_state_{t+1}
  proxy_scores: jax.Array | None  # [M], of the steps done
  group: "Group | None"


class Group(NamedTuple):
  """Running sums over the steps of one group, which is scored once (`SolveOptions.groups`)."""
  direction: Any  # sum of u_t
  params: Any  # mean of params_t weighted by |u_t|
  weight: jax.Array  # [] sum of |u_t|


class Target(NamedTuple):
  """The target loss at some parameters."""
  loss: jax.Array  # []
  grad_norm: jax.Array  # [], 0 if the loss is not part of the objective
  monitor: Any = None  # what `Problem.monitor` returned


class Outputs(NamedTuple):
  """Results of one reverse step."""
  scores: jax.Array  # [B]
  step_loss: jax.Array  # [] weighted loss at params_t
  target: "Target"  # at params_t
  costate_norm: jax.Array  # [] |lambda_{t+1}|
  costate: Any  # lambda_{t+1}, or None


def group_bounds(num_steps: int, groups: int) -> np.ndarray:
  """`[groups + 1]`: the first step of each group; sizes differ by at most one, larger first."""
  sizes = np.full(groups, num_steps // groups)
  sizes[:num_steps % groups] += 1
  return np.concatenate([[0], np.cumsum(sizes)])


def tree_norm(tree: Any) -> jax.Array:
  """Euclidean norm over all leaves, accumulated in float32 or wider."""
  def square_sum(x):
    return jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
  return jnp.sqrt(sum(square_sum(x) for x in jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Problem:
  """A training run of T steps under weights, with its adjoint.

  Attributes:
    example_losses: `(params, batch) -> [B]`. target_loss: `params -> []`.
    update: `optimizer.update`.
    batch_at: `t -> batch` with leaves `[B, ...]` (t is traced).
    weights: `[T, B]`.
    proxy: pytree with leaves `[M, ...]`, or None.
    constrain: pins a tree like the parameters to their sharding (identity on one device).
    monitor: `params -> pytree` recorded at every params_t, such as losses on other data; or None.
    device_rows: see `micro_batches`.
  """
  example_losses: Callable
  target_loss: Callable
  update: Callable
  batch_at: Callable
  weights: jax.Array
  proxy: Any
  options: SolveOptions
  constrain: Callable = lambda tree: tree
  monitor: Callable | None = None
  device_rows: DeviceRows | None = None

  @classmethod
  def of(cls, run: TrainingRun, target_loss: Callable, proxy: Any, options: SolveOptions,
         shardings: tuple) -> "Problem":
    """The problem of a run whose parameters keep `shardings`, from prepared arguments."""
    return cls(run.example_losses, target_loss, run.optimizer.update, run.batch_at, run.weights,
               proxy, options, functools.partial(constrain, shardings),
               device_rows=run.device_rows)

  def with_surrogate(self, surrogate: str | None) -> "Problem":
    """This problem with the surrogate that the optimizer needs."""
    if surrogate == self.options.surrogate:
      return self
    return dataclasses.replace(
      self, options=dataclasses.replace(self.options, surrogate=surrogate))

  @property
  def num_steps(self) -> int:
    return self.weights.shape[0]

  @property
  def _is_grouped(self) -> bool:
    # One group a step is the same as scoring every step, and is computed as such.
    groups = self.options.groups
    return self.proxy is not None and groups is not None and groups < self.num_steps

  def forward(self, state: State, t: jax.Array) -> State:
    """The state after step t."""
    grads = self._gradient(state.params, t)
    return self.constrain_state(apply_update(self.update, state, grads))

  def constrain_state(self, state: State) -> State:
    """`state` with the parameters, and all parts of the optimizer's state like them, pinned."""
    opt_state = map_images(self.constrain, state.opt_state, state.params)
    return State(self.constrain(state.params), opt_state)

  def _constrain_cotangent(self, state: State, floats: list[jax.Array]) -> list[jax.Array]:
    """The cotangents of an optimizer state's floating-point leaves, placed like the leaves."""
    leaves, treedef = jax.tree.flatten(state.opt_state)
    rest = iter(floats)
    like = treedef.unflatten([next(rest) if adjoint.is_inexact(x) else x for x in leaves])
    return adjoint.float_leaves(self.constrain_state(State(state.params, like)).opt_state)

  def _gradient(self, params, t):
    return self.constrain(gradient(
      self.example_losses, params, self.batch_at(t), self.weights[t],
      **self._in_parts))

  @property
  def _in_parts(self):
    return dict(micro_batch_size=self.options.micro_batch_size, device_rows=self.device_rows)

  def first_carry(self, state: State) -> tuple[Carry, Target]:
    """The carry before the first reverse step, lambda_T = grad J(params_T), from the last state."""
    loss, costate = jax.value_and_grad(self.target_loss)(state.params)
    costate = self.constrain(costate)
    opt_zeros = self._constrain_cotangent(
      state, [jnp.zeros_like(x) for x in adjoint.float_leaves(state.opt_state)])
    proxy_scores, group = None, None
    if self.proxy is not None:
      losses = jax.eval_shape(self.example_losses, state.params, self.proxy)
      proxy_scores = jnp.zeros(losses.shape, jnp.promote_types(losses.dtype, jnp.float32))
    if self._is_grouped:
      wide = self.constrain(jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), state.params))
      group = Group(wide, wide, jnp.zeros_like(tree_norm(wide)))
    target = Target(loss, tree_norm(costate), self.monitored(state.params))
    return Carry(costate, opt_zeros, proxy_scores, group), target

  def monitored(self, params: Any) -> Any:
    """What `monitor` makes of the parameters, None without one."""
    return None if self.monitor is None else self.monitor(params)

  def reverse(self, carry: Carry, state: State, t: jax.Array) -> tuple[Carry, Outputs]:
    """One step of the adjoint recursion, at `state = S_t`."""
    options, costate = self.options, carry.costate
    direct, opt_cotangent, u = adjoint.update_pullback(
      self.update, state, self._gradient(state.params, t), costate, carry.opt_cotangent,
      options.surrogate)
    u, opt_cotangent = self.constrain(u), self._constrain_cotangent(state, opt_cotangent)

    batch, weights = self.batch_at(t), self.weights[t]
    target = None
    if self._target_crosses_with_hessian:
      hessian = adjoint.hvp_row_sum(
        self.example_losses, state.params, u, batch, weights, options.hvp_mode,
        options.micro_batch_size)
      (hvp, (slopes, losses)), ((target_loss, grad), _) = sum_together(
        [hessian, self.target_loss.gradient_sum(state.params, t > 0)], self.device_rows)
      previous = self.constrain(jax.tree.map(lambda d, h, g: d + h + g, direct, hvp, grad))
      target = Target(target_loss, tree_norm(self.constrain(grad)))
    elif options.hessian:
      hvp, slopes, losses = adjoint.hvp_scores_losses(
        self.example_losses, state.params, u, batch, weights, mode=options.hvp_mode,
        **self._in_parts)
      previous = self.constrain(jax.tree.map(jnp.add, direct, hvp))
    else:
      slopes, losses = adjoint.directional_derivatives(
        self.example_losses, state.params, u, batch, mode=options.hvp_mode, **self._in_parts)
      previous = direct
    carry = carry._replace(opt_cotangent=opt_cotangent)
    if self.proxy is not None:
      with jax.named_scope(PROXY_SCOPE):
        carry = self._score_proxies(carry, state.params, u, t)
    # This order keeps the activations of the two passes from existing at the same time.
    params, previous = jax.lax.optimization_barrier((state.params, previous))
    if target is None:
      target, previous = self._add_target(params, previous, t)
    target = target._replace(monitor=self.monitored(params))
    carry = carry._replace(costate=previous)
    dtype = jnp.promote_types(losses.dtype, weights.dtype)
    return carry, Outputs(
      scores=-slopes.astype(dtype), step_loss=jnp.sum(weights * losses), target=target,
      costate_norm=tree_norm(costate), costate=costate if options.keep_costates else None)

  @property
  def _target_crosses_with_hessian(self) -> bool:
    """Whether H u and grad J are summed on each device first, and then added over the mesh at once.

    Both sums are then held at a time: one parameter-sized array more than one after the other.
    """
    return (
      self.device_rows is not None and self.options.hessian and self.options.objective == "area"
      and isinstance(self.target_loss, MeanTargetLoss)
      and self.target_loss.device_rows == self.device_rows)

  def _add_target(self, params, costate, t):
    """J at `params_t`, and the costate with its gradient added if J is in the objective."""
    def loss_only(params, costate):
      loss = self.target_loss(params)
      return Target(loss, jnp.zeros_like(tree_norm(params))), costate

    def with_gradient(params, costate):
      loss, grad = jax.value_and_grad(self.target_loss)(params)
      return Target(loss, tree_norm(grad)), self.constrain(jax.tree.map(jnp.add, costate, grad))

    if self.options.objective == "terminal":
      return loss_only(params, costate)
    return jax.lax.cond(t > 0, with_gradient, loss_only, params, costate)

  def _score_proxies(self, carry: Carry, params, u, t) -> Carry:
    options = self.options
    if options.proxy_samples is not None:
      return carry._replace(proxy_scores=self._score_sample(carry.proxy_scores, params, u, t))

    def scored(total, params, direction):
      slopes = adjoint.directional_scores(
        self.example_losses, params, direction, self.proxy, options.proxy_batch_size,
        mode=options.hvp_mode, device_rows=self.device_rows)
      return total - slopes

    if not self._is_grouped:
      if options.groups is not None or options.every_k == 1:
        return carry._replace(proxy_scores=scored(carry.proxy_scores, params, u))
      return carry._replace(proxy_scores=jax.lax.cond(
        t % options.every_k == 0, scored, lambda total, *_: total, carry.proxy_scores, params, u))

    bounds = group_bounds(self.num_steps, options.groups)
    is_first = np.isin(np.arange(self.num_steps) + 1, bounds[1:])  # in reverse order: the last step
    is_last = np.isin(np.arange(self.num_steps), bounds[:-1])
    group = _add_to_group(carry.group, params, u, jnp.asarray(is_first)[t])
    mean = jax.tree.map(lambda a, p: a.astype(p.dtype), group.params, params)
    total = jax.lax.cond(
      jnp.asarray(is_last)[t], scored, lambda total, *_: total, carry.proxy_scores, mean,
      group.direction)
    return carry._replace(proxy_scores=total, group=group)

  def _score_sample(self, total, params, u, t):
    """`total` plus the scores of the proxies that drew step t, weighted by 1 / probability."""
    options, num_steps, num_proxies = self.options, self.num_steps, len(total)
    # All devices take equally many proxies at a step; places beyond the last proxy do not count.
    num_shards = 1 if self.device_rows is None else self.device_rows.num_shards
    num_rows = -(-num_proxies // (num_steps * num_shards)) * num_shards
    for i in range(options.proxy_samples):
      key, offset_key = jax.random.split(jax.random.fold_in(
        jax.random.key(options.sample_seed), i))
      # The proxy at place p of a random order belongs to step (p + offset) % T.
      offset = jax.random.randint(offset_key, (), 0, num_steps)
      places = (t - offset) % num_steps + num_steps * jnp.arange(num_rows)
      is_row = places < num_proxies
      order = jax.random.permutation(key, num_proxies)
      rows = order[jnp.minimum(places, num_proxies - 1)]
      slopes = adjoint.directional_scores(
        self.example_losses, params, u, jax.tree.map(lambda x: x[rows], self.proxy),  # noqa: B023
        options.proxy_batch_size, mode=options.hvp_mode, device_rows=self.device_rows)
      scale = num_steps / options.proxy_samples
      total = total.at[rows].add(-scale * jnp.where(is_row, slopes, 0).astype(total.dtype))
    return total


def _add_to_group(group: Group, params, u, restart) -> Group:
  norm = tree_norm(u)
  old = jnp.where(restart, 0, group.weight)
  weight = old + norm
  # A mean updated in place: the first step enters with share 1, a step with u = 0 with share 0.
  share = jnp.where(weight > 0, norm / jnp.where(weight > 0, weight, 1), 0)
  share = jnp.where(restart, 1, share)
  direction = jax.tree.map(lambda a, b: jnp.where(restart, b, a + b), group.direction, u)
  mean = jax.tree.map(
    lambda a, p: jnp.where(restart, p, a + share.astype(a.dtype) * (p - a)), group.params, params)
  return jax.tree.map(lambda new, old: new.astype(old.dtype), Group(direction, mean, weight), group)

