"""Influence directions: dense solves, and the stationary limit of the costate recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from lmops_jax.control import directional_scores, influence_direction, pmp_scores


def _losses(params, batch):  # convex: linear regression in two leaves
  return jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"]) / 2


@pytest.fixture
def convex(x64):
  rng = np.random.default_rng(0)
  params = {"w": rng.normal(size=3), "b": 0.3}
  batches = {"x": rng.normal(size=(3, 8, 3)), "y": rng.normal(size=(3, 8))}
  target_grad = {"w": rng.normal(size=3), "b": -0.4}
  x = np.concatenate([np.ones((24, 1)), batches["x"].reshape(24, 3)], axis=1)  # leaf order b, w
  return params, batches, target_grad, x.T @ x / 24


def _flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_conjugate_gradients_solve_the_system(convex, damping):
  params, batches, target_grad, hessian = convex
  got = influence_direction(_losses, target_grad, params, batches, damping=damping,
                            tolerance=1e-12, micro_batch_size=4)
  want = np.linalg.solve(hessian + damping * np.eye(4), _flat(target_grad))
  np.testing.assert_allclose(_flat(got), want, rtol=1e-8)


def test_default_damping_is_a_hundredth_of_the_mean_eigenvalue(convex):
  params, batches, target_grad, hessian = convex
  got = _flat(influence_direction(_losses, target_grad, params, batches, tolerance=1e-12))
  left = _flat(target_grad) - hessian @ got  # damping * direction
  damping = left @ got / (got @ got)
  np.testing.assert_allclose(left, damping * got, rtol=1e-6)
  np.testing.assert_allclose(damping, 1e-2 * np.trace(hessian) / 4, rtol=0.5)  # 8 probes


def test_lissa_converges_to_the_same_direction(convex):
  params, batches, target_grad, hessian = convex
  one_batch = jax.tree.map(lambda x: x.reshape(1, 24, *x.shape[2:]), batches)
  got = influence_direction(_losses, target_grad, params, one_batch, damping=0.1, method="lissa",
                            iterations=400)
  want = np.linalg.solve(hessian + 0.1 * np.eye(4), _flat(target_grad))
  np.testing.assert_allclose(_flat(got), want, rtol=1e-6)


def test_fisher_is_the_mean_outer_product(convex):
  params, batches, target_grad, _ = convex
  flat_batch = jax.tree.map(lambda x: x.reshape(24, *x.shape[2:]), batches)
  slopes = jax.jacobian(_losses)(params, flat_batch)
  slopes = np.concatenate([slopes["b"][:, None], slopes["w"]], axis=1)
  got = influence_direction(_losses, target_grad, params, batches, damping=0.2, curvature="fisher",
                            tolerance=1e-12, micro_batch_size=2)
  want = np.linalg.solve(slopes.T @ slopes / 24 + 0.2 * np.eye(4), _flat(target_grad))
  np.testing.assert_allclose(_flat(got), want, rtol=1e-8)


def test_influence_is_the_closed_form_on_a_quadratic(convex):
  params, batches, target_grad, hessian = convex
  direction = influence_direction(_losses, target_grad, params, batches, damping=0.1,
                                  tolerance=1e-12)
  data = jax.tree.map(lambda x: x[0], batches)
  got = directional_scores(_losses, params, direction, data, batch_size=3)
  residual = data["x"] @ params["w"] + params["b"] - data["y"]
  grads = residual[:, None] * np.concatenate([np.ones((8, 1)), data["x"]], axis=1)
  want = grads @ np.linalg.solve(hessian + 0.1 * np.eye(4), _flat(target_grad))
  np.testing.assert_allclose(got, want, rtol=1e-8)


def test_costates_of_a_frozen_quadratic_are_the_neumann_series(x64):
  # Training stands still at its optimum and J is linear: lambda_{T-k} = sum_{j<=k} (I - eta H)^j b,
  # the LiSSA iteration, with limit (eta H)^{-1} b.
  rng = np.random.default_rng(1)
  x = rng.normal(size=(20, 3))
  y = x @ np.array([0.5, -1.0, 2.0])  # fitted exactly at theta
  theta, b = np.array([0.5, -1.0, 2.0]), rng.normal(size=3)
  losses = lambda p, batch: jnp.square(batch["x"] @ p - batch["y"]) / 2  # noqa: E731
  num_steps, eta = 200, 0.4
  batches = {k: np.repeat(v[None], num_steps, axis=0) for k, v in (("x", x), ("y", y))}
  got = pmp_scores(losses, lambda p: jnp.vdot(b, p), optax.sgd(eta), theta, batches, None,
                   keep_costates=True)
  hessian = x.T @ x / 20
  costate, power = np.zeros(3), b
  for k in range(num_steps):
    costate, power = costate + power, power - eta * hessian @ power
    np.testing.assert_allclose(got.costates[num_steps - 1 - k], costate, rtol=1e-9)
  limit = np.linalg.solve(eta * hessian, b)
  np.testing.assert_allclose(got.costates[0], limit, rtol=1e-6)
  batches = {"x": x[None], "y": y[None]}
  for method in ("cg", "lissa"):
    direction = influence_direction(losses, b, theta, batches, damping=0.0, method=method,
                                    iterations=200, scale=eta)
    np.testing.assert_allclose(direction / eta, limit, rtol=1e-4)


def test_an_indefinite_curvature_is_reported(x64):
  losses = lambda p, batch: batch["a"] * p["x"] ** 2 - p["y"] ** 2  # noqa: E731
  with pytest.raises(FloatingPointError, match="relative residual"):
    influence_direction(losses, {"x": 1.0, "y": 1.0}, {"x": 0.0, "y": 0.0},
                        {"a": np.ones((1, 2))}, damping=0.0, method="lissa", iterations=50)


@pytest.mark.parametrize("change, message", [
  (dict(method="newton"), "method must be one of 'cg', 'lissa'"),
  (dict(curvature="kfac"), "curvature must be one of"),
  (dict(damping=-1.0), "damping must be finite"),
  (dict(iterations=0), "iterations must be an integer >= 1"),
  (dict(micro_batch_size=3), "micro_batch_size=3 does not divide"),
  (dict(target_grad={"w": np.zeros(2), "b": 0.0}), "structure and shapes of params"),
])
def test_bad_arguments(convex, change, message):
  params, batches, target_grad, _ = convex
  kw = dict(target_grad=target_grad, params=params, batches=batches) | change
  with pytest.raises(ValueError, match=message):
    influence_direction(_losses, **kw)
