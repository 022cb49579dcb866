"""Influence functions from the same second-order primitive as PDS.

The influence of example n on a target loss J at a converged point is
`grad J . (H + damping I)^{-1} grad l_n` (Koh and Liang, arXiv 1703.04730), the baseline "IF-Score"
of arXiv 2410.07064 and the stationary limit of its costate recursion: with frozen parameters that
recursion is the Neumann series that LiSSA (Agarwal et al., arXiv 1602.03943) sums. One linear solve
gives the direction, one forward-mode pass a batch gives the scores of any number of examples
(`adjoint.directional_scores`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.control import checks, training_run
from lmops_jax.control.adjoint import directional_scores, hvp_scores_losses
from lmops_jax.control.callables import as_pytree
from lmops_jax.control.dynamics import gradient, strong
from lmops_jax.control.problem import tree_norm

METHODS = ("cg", "lissa")
CURVATURES = ("hessian", "fisher")
NUM_PROBES = 8  # for the mean eigenvalue
POWER_STEPS = 20  # for the largest eigenvalue


def influence_direction(
    example_losses: Callable,
    target_grad: Any,
    params: Any,
    batches: Any,
    *,
    damping: float | None = None,
    curvature: str = "hessian",
    method: str = "cg",
    iterations: int = 100,
    tolerance: float = 1e-6,
    scale: float | None = None,
    micro_batch_size: int | None = None,
    seed: int = 0) -> Any:
  """Solves `(H + damping I) w = target_grad` for the curvature H of the mean loss over `batches`.

  Args:
    example_losses: `(params, batch) -> [B]`.
    target_grad: gradient of the target loss at `params`, like `params`.
    batches: leaves `[T, B, ...]`.
    damping: >= 0; by default 1e-2 times the mean eigenvalue of H, estimated from 8 probes.
    curvature: "hessian", or "fisher": the mean outer product of the per-example gradients in its
      place, which is never indefinite (the Hessian of a network is, away from a minimum).
    method: "cg", conjugate gradients on the full sum (H + damping I must be positive definite), or
      "lissa", `w <- target_grad + (I - scale (H_t + damping I)) w` over the batches in turn, whose
      limit times `scale` is the solution.
    iterations: at most this many CG steps, or exactly this many LiSSA steps, >= 1.
    tolerance: CG stops at this relative residual.
    scale: LiSSA's step, below 2 / (largest eigenvalue); by default half of the
      1 / (largest eigenvalue) that 20 power iterations on the first batch find.
    micro_batch_size: examples differentiated at once, a divisor of B.
    seed: draws the probes and the start of the power iteration.
  Returns:
    The direction, like `params`: `directional_scores(..., direction, data)` is positive for
      examples on which a descent step lowers the target loss.
  Raises:
    ValueError: for arguments that do not fit together.
    FloatingPointError: if the result solves the system worse than zero does, which means that the
      iteration diverged or H + damping I is indefinite (checked outside `jit`).
  """
  checks.parameters(params)
  checks.one_of(method, "method", METHODS)
  checks.one_of(curvature, "curvature", CURVATURES)
  iterations = checks.integer(iterations, "iterations", 1)
  num_steps, batch_size = checks.leading_axes(batches, "batches", 2, "T, B")
  checks.number(tolerance, "tolerance")
  if damping is not None:
    checks.number(damping, "damping")
  if scale is not None:
    checks.number(scale, "scale", positive=True)
  seed = checks.integer(seed, "seed", -2**63, 2**63 - 1)
  params = strong(params)
  target_grad = strong(checks.like_params(target_grad, "target_grad", params))
  batches = checks.arrays(batches, "batches")
  checks.losses(
    example_losses, params, jax.tree.map(lambda x: x[0], batches), batch_size, "a batch")
  micro_batch_size = checks.micro_batch(micro_batch_size, "micro_batch_size", batch_size)
  direction, residual = _solve(
    as_pytree(example_losses), target_grad, params, batches, damping, tolerance, scale,
    jax.random.key(seed), curvature, method, iterations, num_steps, batch_size, micro_batch_size)
  if checks.is_concrete(residual) and not residual <= 1:
    raise FloatingPointError(
      f"The influence direction has relative residual {float(residual):.3g} after {iterations} "
      f"iterations of {method!r}; raise damping, use curvature='fisher', lower scale below "
      "2 / (largest eigenvalue), or check that target_grad is finite.")
  return direction


@functools.partial(
  jax.jit, static_argnames=(
    "curvature", "method", "iterations", "num_steps", "batch_size", "micro_batch_size"))
def _solve(example_losses, target_grad, params, batches, damping, tolerance, scale, key, curvature,
           method, iterations, num_steps, batch_size, micro_batch_size):
  weights = jnp.full(batch_size, 1 / batch_size)
  batch_at = functools.partial(training_run.batch_at, batches)

  def batch_product(v, t):
    if curvature == "fisher":  # mean_n grad l_n <grad l_n, v>
      slopes = directional_scores(example_losses, params, v, batch_at(t), micro_batch_size)
      return gradient(example_losses, params, batch_at(t), slopes / batch_size,
                      micro_batch_size=micro_batch_size)
    return hvp_scores_losses(example_losses, params, v, batch_at(t), weights,
                             micro_batch_size=micro_batch_size)[0]

  def product(v):
    def add(total, t):
      return jax.tree.map(jnp.add, total, batch_product(v, t)), None
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(num_steps))
    return jax.tree.map(lambda x: x / num_steps, total)

  probe_key, power_key = jax.random.split(key)
  if damping is None:
    damping = 1e-2 * jnp.maximum(_mean_eigenvalue(product, params, probe_key), 0)

  def damped(hv, v):
    return jax.tree.map(lambda a, b: a + (damping * b).astype(a.dtype), hv, v)

  if method == "cg":
    direction, _ = jax.scipy.sparse.linalg.cg(
      lambda v: damped(product(v), v), target_grad, tol=tolerance, maxiter=iterations)
  else:
    if scale is None:
      scale = 0.5 / _largest_eigenvalue(
        lambda v: damped(batch_product(v, 0), v), params, power_key)

    def step(w, i):
      hw = damped(batch_product(w, i % num_steps), w)
      return jax.tree.map(
        lambda b, w, h: b + w - (scale * h).astype(w.dtype), target_grad, w, hw), None

    w, _ = jax.lax.scan(step, target_grad, jnp.arange(iterations))
    direction = jax.tree.map(lambda x: (scale * x).astype(x.dtype), w)

  left = jax.tree.map(jnp.subtract, target_grad, damped(product(direction), direction))
  norm = tree_norm(target_grad)
  return direction, jnp.where(norm == 0, 0, tree_norm(left) / jnp.where(norm == 0, 1, norm))


def _mean_eigenvalue(product: Callable, params: Any, key: jax.Array, num_probes: int = NUM_PROBES):
  """Hutchinson's estimate of trace(H) / P with Rademacher probes."""
  size = sum(x.size for x in jax.tree.leaves(params))
  def probe(key):
    v = _random_like(params, key, jax.random.rademacher)
    return _vdot(v, product(v)) / size
  return jnp.mean(jax.lax.map(probe, jax.random.split(key, num_probes)))


def _largest_eigenvalue(product: Callable, params: Any, key: jax.Array,
                        iterations: int = POWER_STEPS):
  """Norm growth of a power iteration (a lower bound on the largest absolute eigenvalue)."""
  def normalise(v):
    norm = jnp.maximum(tree_norm(v), jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda x: (x / norm).astype(x.dtype), v), norm
  def step(v, _):
    return normalise(product(v))
  v, _ = normalise(_random_like(params, key, jax.random.normal))
  _, norms = jax.lax.scan(step, v, length=iterations)
  return norms[-1]


def _random_like(tree: Any, key: jax.Array, sample: Callable) -> Any:
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return treedef.unflatten(sample(k, x.shape).astype(x.dtype) for k, x in zip(keys, leaves))


def _vdot(a: Any, b: Any) -> jax.Array:
  def wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return sum(jnp.sum(wide(x) * wide(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
