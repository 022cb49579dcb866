"""The adjoint of any optax chain: against autodiff, the papers' formulas, and at its poles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import check_result, finite_derivatives, pmp_scores, update_pullback
from lmops_jax.control.dynamics import State, init_state

OPTIMIZERS = {
  "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam_clip_schedule": optax.chain(
    optax.clip_by_global_norm(0.5), optax.adam(optax.cosine_decay_schedule(0.1, 6))),
  "adamw_masked_decay": optax.adamw(
    0.05, weight_decay=0.2, mask={"w": True, "b": False, "v": True, "scale": False}),
  "adagrad": optax.adagrad(0.1),
  "rmsprop_centered": optax.rmsprop(0.05, centered=True, momentum=0.9),
  "lamb": optax.lamb(0.05),
  "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=2),
  "injected_hyperparameters": optax.inject_hyperparams(optax.adam)(
    # optax's own linear schedule divides whole numbers, which gives float32
    learning_rate=lambda step: 0.02 * jnp.minimum(step, 5).astype(jnp.result_type(float))),
  "two_optimizers": optax.multi_transform(
    {"fast": optax.adam(0.05), "slow": optax.sgd(0.1), "frozen": optax.set_to_zero()},
    {"w": "fast", "b": "frozen", "v": "slow", "scale": "fast"}),
  "masked": optax.chain(optax.masked(optax.scale(3.0), {"w": True, "b": False, "v": True,
                                                        "scale": False}), optax.sgd(0.05)),
  "gradient_accumulation": optax.MultiSteps(optax.adamw(0.05), 2),
  "noise": optax.noisy_sgd(0.1, key=0),
  "schedule_free": optax.contrib.schedule_free_sgd(0.1),
  "muon": optax.contrib.muon(0.05),
}


# The others show that nothing is special about these.
COMMON = ("nesterov", "adam_clip_schedule", "adagrad", "injected_hyperparameters", "two_optimizers",
          "gradient_accumulation")


@pytest.mark.parametrize("name", [
  name if name in COMMON else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS])
def test_scores_are_the_gradient_for_any_optimizer(x64, toy, name):
  problem = toy.regression()
  _, want, want_proxy = toy.unrolled(problem, OPTIMIZERS[name], with_proxy=True)
  got = check_result(pmp_scores(problem.example_losses, problem.target_loss, OPTIMIZERS[name],
                                *problem.args, proxy=problem.proxy))
  tolerance = 1e-6 if name == "adafactor" else 1e-9  # it holds its statistics in float32
  assert np.abs(want).max() > 1e-3
  np.testing.assert_allclose(got.scores, want, atol=tolerance)
  np.testing.assert_allclose(got.proxy_scores, want_proxy.sum(0), atol=tolerance)


def test_rectified_adam_has_finite_scores_in_its_first_steps(x64, toy):
  # Autodiff gives nan: the rectification term is the root of a negative number until step 5.
  problem, optimizer = toy.regression(num_steps=7), optax.radam(0.1, eps_root=1e-10)
  got = check_result(pmp_scores(
    problem.example_losses, problem.target_loss, optimizer, *problem.args))
  assert np.isnan(toy.unrolled(problem, optimizer)[1]).any()
  for t, n in ((0, 1), (6, 2)):
    area = {}
    for sign in (1, -1):
      weights = np.array(problem.weights)
      weights[t, n] += sign * 1e-6
      area[sign] = pmp_scores(problem.example_losses, problem.target_loss, optimizer,
                              problem.params, problem.batches, weights).target_losses[1:].sum()
    np.testing.assert_allclose(got.scores[t, n], -(area[1] - area[-1]) / 2e-6, rtol=1e-5)


def test_adam_with_coordinates_that_never_have_a_gradient(x64, toy):
  # v stays 0 there and sqrt has no slope; stock autodiff answers nan.
  problem = toy.regression()
  params = {**problem.params, "unused": np.array([0.3, -0.2]), "unused_scalar": 1.0}
  def losses(p, batch):
    return problem.example_losses(p, batch) + 0 * jnp.sum(p["unused"]) + 0 * p["unused_scalar"]
  def target(p):  # the unused coordinates matter for J, and decay moves them
    return problem.target_loss(p) + jnp.sum(jnp.square(p["unused"]))
  optimizer = optax.adamw(0.05, weight_decay=0.3)
  dead = problem._replace(params=params, example_losses=losses, target_loss=target)
  assert np.isnan(toy.unrolled(dead, optimizer)[1]).any()
  got = check_result(pmp_scores(losses, target, optimizer, *dead.args, keep_costates=True))
  want = toy.unrolled(problem, optimizer)[1]
  np.testing.assert_allclose(got.scores, want, atol=1e-9)
  # lambda_t = (1 - lr wd) lambda_{t+1} + 2 unused_t, by hand.
  shrink = 1 - 0.05 * 0.3
  later = np.zeros(2)
  for t in range(4, -1, -1):
    later = 2 * params["unused"] * shrink ** (t + 1) + shrink * later
    np.testing.assert_allclose(got.costates["unused"][t], later, rtol=1e-12)


def test_vocabulary_rows_that_never_occur_stay_finite_under_adam(toy):
  problem = toy.language_model()  # its last two token ids never occur as inputs
  untied = {**problem.params, "unembedding": np.array(problem.params["embedding"])}
  def losses(p, batch):  # embedding rows of unseen tokens have gradient exactly 0
    looked_up = {**p, "embedding": p["unembedding"]}
    shift = (p["embedding"][batch["tokens"]] ** 2).sum((1, 2))
    return problem.example_losses({k: looked_up[k] for k in problem.params}, batch) + shift
  got = check_result(pmp_scores(
    losses, lambda p: jnp.mean(losses(p, jax.tree.map(lambda x: x[0], problem.batches))),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, eps=1e-6)),
    untied, problem.batches, problem.weights, proxy=problem.proxy, keep_costates=True))
  assert np.isfinite(got.costates["embedding"]).all()
  np.testing.assert_array_equal(got.params["embedding"][-2:] != 0, True)
  np.testing.assert_array_equal(np.abs(got.costates["embedding"][:, -2:]).max(), 0)
  assert np.abs(got.costates["embedding"][:, 0]).max() > 0


def test_clipping_a_zero_gradient(x64, toy):
  # All weights of a step are 0: no clipping happens there, so the score is plain SGD's.
  problem = toy.regression()
  weights = np.array(problem.weights)
  weights[2] = 0
  problem = problem._replace(weights=weights)
  clipped = optax.chain(optax.clip_by_global_norm(1e6), optax.sgd(0.2))
  got = check_result(pmp_scores(
    problem.example_losses, problem.target_loss, clipped, *problem.args))
  want = toy.unrolled(problem, optax.sgd(0.2))[1]
  np.testing.assert_allclose(got.scores, want, atol=1e-10)


def _random_state(update, init, shapes, seed=0, **overrides):
  rng = np.random.default_rng(seed)
  draw = lambda: {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}  # noqa: E731
  params, grads, costate = draw(), draw(), draw()
  state = init_state(init, update, params)
  return state, grads, costate, draw


SHAPES = {"a": (3,), "b": (2, 2)}


def test_momentum_pullback_is_the_formula(x64):
  # m' = mu m + g + w theta; theta' = theta - eta m'.
  eta, mu, decay = 0.1, 0.9, 0.3
  optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(eta, mu))
  state, grads, p, draw = _random_state(optimizer.update, optimizer.init, SHAPES)
  leaves, treedef = jax.tree.flatten(state.opt_state)
  q = list(jax.tree.leaves(draw()))
  assert len(q) == len(leaves) == 2
  d, q_new, u = update_pullback(optimizer.update, state, grads, p, q)
  q = dict(zip("ab", q))
  for i, k in enumerate("ab"):
    tilde = q[k] - eta * p[k]
    np.testing.assert_allclose(u[k], tilde, rtol=1e-12)
    np.testing.assert_allclose(d[k], p[k] + decay * tilde, rtol=1e-12)
    np.testing.assert_allclose(q_new[i], mu * tilde, rtol=1e-12)


def test_clipping_pullback_is_the_formula(x64):
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
  state, grads, p, _ = _random_state(optimizer.update, optimizer.init, SHAPES)
  _, _, u = update_pullback(optimizer.update, state, grads, p, [])
  flat = lambda tree: np.concatenate([np.ravel(tree[k]) for k in "ab"])  # noqa: E731
  norm = np.linalg.norm(flat(grads))
  assert norm > 0.5
  unit, plain = flat(grads) / norm, -0.1 * flat(p)
  np.testing.assert_allclose(flat(u), 0.5 / norm * (plain - unit * (unit @ plain)), rtol=1e-10)


def test_adamw_pullback_is_the_formula(x64):
  eta, b1, b2, eps, decay, t = 0.1, 0.9, 0.98, 1e-6, 0.3, 4
  optimizer = optax.adamw(eta, b1, b2, eps, weight_decay=decay)
  state, g, p, draw = _random_state(optimizer.update, optimizer.init, SHAPES)
  mu, nu, q_m, q_v = draw(), jax.tree.map(jnp.square, draw()), draw(), draw()
  nu["a"] = nu["a"].at[0].set(0.0)
  g["a"] = g["a"].at[0].set(0.0)  # a coordinate whose second moment stays 0
  adam = state.opt_state[0]._replace(count=jnp.array(t, jnp.int32), mu=mu, nu=nu)
  state = State(state.params, (adam, *state.opt_state[1:]))
  d, q_new, u = update_pullback(
    optimizer.update, state, g, p, [*jax.tree.leaves(q_m), *jax.tree.leaves(q_v)])
  c1, c2 = 1 / (1 - b1 ** (t + 1)), 1 / (1 - b2 ** (t + 1))
  for i, k in enumerate("ab"):
    m, v = b1 * mu[k] + (1 - b1) * g[k], b2 * nu[k] + (1 - b2) * g[k] ** 2
    r = np.sqrt(c2 * v)
    half = np.where(r > 0, 1 / (2 * np.where(r > 0, r, 1)), 0)
    tilde_m = q_m[k] - eta * c1 * p[k] / (r + eps)
    tilde_v = q_v[k] + eta * p[k] * c1 * m / (r + eps) ** 2 * c2 * half
    np.testing.assert_allclose(
      u[k], (1 - b1) * tilde_m + 2 * (1 - b2) * g[k] * tilde_v, rtol=1e-9)
    np.testing.assert_allclose(q_new[i], b1 * tilde_m, rtol=1e-9)
    np.testing.assert_allclose(q_new[2 + i], b2 * tilde_v, rtol=1e-9)
    np.testing.assert_allclose(d[k], (1 - eta * decay) * p[k], rtol=1e-12)


def test_finite_derivatives_keep_values_and_other_slopes(x64):
  def fn(x):
    y = jax.lax.cond(x[0] > -1, jnp.sqrt, lambda v: v, x)
    z, _ = jax.lax.scan(lambda c, v: (c + jnp.sqrt(v), None), 0.0, x)
    return jnp.sum(y) + z + jnp.sum(x ** 0.5) + jax.jit(lambda v: jnp.sum(v / (v + 1)))(x)
  x = jnp.array([0.0, 0.25, 4.0])
  guarded = finite_derivatives(fn)
  np.testing.assert_array_equal(guarded(x), fn(x))
  got = jax.grad(guarded)(x)
  np.testing.assert_allclose(got[1:], jax.grad(fn)(x)[1:], rtol=1e-12)
  assert not np.isfinite(jax.grad(fn)(x)[0])
  np.testing.assert_allclose(got[0], 1.0)  # only the slope of v / (v + 1) is left at the pole


def test_state_starts_in_the_dtype_that_steps_keep():
  def update(grads, state, params=None):
    return grads, state * jnp.float32(0.5)
  optimizer = optax.GradientTransformation(lambda p: jnp.zeros((), jnp.bfloat16), update)
  state = init_state(optimizer.init, optimizer.update, {"w": 1.0})
  assert state.opt_state.dtype == jnp.float32
  assert not state.params["w"].weak_type


def test_state_that_changes_shape_is_refused():
  optimizer = optax.GradientTransformation(
    lambda p: jnp.zeros(1), lambda g, s, p=None: (g, jnp.concatenate([s, s])))
  with pytest.raises(ValueError, match="structure or shapes differ"):
    init_state(optimizer.init, optimizer.update, {"w": 1.0})
