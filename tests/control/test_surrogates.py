"""Optimizers that pass no costate on: told before the solve, and scored with a surrogate."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

from lmops_jax.control import (
  ProjectedGradient,
  SolveOptions,
  check_optimizer,
  check_result,
  controlled_run,
  improve_policy,
  mean_target_loss,
  pmp_scores,
  pmp_scores_by_target,
  policy_gradient,
  simulate,
  solve_weights,
  update_pullback,
)
from lmops_jax.control.dynamics import State
from lmops_jax.control.piecewise import optimizer_name
from lmops_jax.sizing.solve_cost import solve_passes
from lmops_jax.training import optimizers

CLIPPED = "clipped_straight_through"
PARAMS = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32), "b": jax.ShapeDtypeStruct((2,), float)}


def _of_gradient(fn):
  return optax.stateless(lambda grads, params: jax.tree.map(fn, grads))


# ----------------------------------------------------------------------- told before the solve


SIGNS = {  # the name that the refusal must hold, and the optimizer
  "lion": optax.lion(0.1),
  "lion_ours": optimizers.lion(0.1, clip_norm=1.0),
  "scale_by_sign": optax.sign_sgd(0.1),
  "rprop": optax.rprop(0.1),
  "trace, scale_by_sign": optax.chain(
    optax.trace(0.9, nesterov=True), optax.scale_by_sign(), optax.scale(-0.1)),
  "scale_by_sign, trace": optax.chain(optax.scale_by_sign(), optax.trace(0.9), optax.scale(-0.1)),
  "scale_by_sign, scale_by_adam": optax.chain(optax.scale_by_sign(), optax.adam(0.1)),
  "inject_hyperparams, lion": optax.inject_hyperparams(optax.lion)(
    learning_rate=optax.linear_schedule(0.0, 0.1, 5)),
  "MultiSteps, scale_by_rprop": optax.MultiSteps(optax.rprop(0.1), 2),
  "masked": optax.masked(optax.lion(0.1), {"w": True, "b": True}),
  "apply_if_finite": optax.apply_if_finite(optax.lion(0.1), 3),
  "set_to_zero": optax.multi_transform(
    {"sign": optax.sign_sgd(0.1), "frozen": optax.set_to_zero()}, {"w": "sign", "b": "frozen"}),
  "stateless": _of_gradient(lambda g: -0.1 * jnp.sign(g)),
}


@pytest.mark.parametrize("name", SIGNS)
def test_an_optimizer_without_derivative_is_refused_by_name(name):
  with pytest.raises(ValueError, match="Every score would be 0") as error:
    check_optimizer(SIGNS[name], PARAMS)
  for word in (name.removesuffix("_ours"), "piecewise constant", f"set surrogate='{CLIPPED}'"):
    assert word in str(error.value)
  assert "\n" not in str(error.value)
  assert check_optimizer(SIGNS[name], PARAMS, CLIPPED) == CLIPPED


@pytest.mark.parametrize("fn", [
  lambda g: jnp.where(g > 0, -0.1, 0.1), lambda g: -0.1 * jnp.round(g), jnp.floor], ids=range(3))
def test_a_surrogate_is_for_signs(fn):
  with pytest.raises(ValueError, match=f"set surrogate='{CLIPPED}'"):
    check_optimizer(_of_gradient(fn), PARAMS)
  with pytest.raises(ValueError, match=r"is for signs \(jnp.sign\) only"):
    check_optimizer(_of_gradient(fn), PARAMS, CLIPPED)


def test_an_optimizer_that_never_moves_is_refused():
  for surrogate in (None, CLIPPED):
    with pytest.raises(ValueError, match=r"set_to_zero\) does not depend on the gradient"):
      check_optimizer(optax.set_to_zero(), PARAMS, surrogate)


@pytest.mark.parametrize("optimizer", [
  optax.sgd(0.1), optax.adamw(0.1), optax.yogi(0.1), optax.radam(0.1), optax.adafactor(0.1),
  optax.contrib.muon(0.1), optax.MultiSteps(optax.adam(0.1), 20),
  optax.chain(optax.clip(0.1), optax.sgd(optax.linear_schedule(0.0, 0.1, 5))),
  optax.scale_by_lion(0.9, 0.99, mode="smooth"),
  optax.multi_transform({"sgd": optax.sgd(0.1), "frozen": optax.set_to_zero()},
                        {"w": "sgd", "b": "frozen"}),
], ids=range(10))
def test_other_optimizers_stay_exact(optimizer):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert check_optimizer(optimizer, PARAMS) is None
    assert check_optimizer(optimizer, PARAMS, CLIPPED) is None  # also Yogi's, which has a sign


def test_parameters_that_scores_do_not_count_are_named():
  halves = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(
    {"adam": optax.adam(0.1), "lion": optax.lion(0.1)}, {"w": "adam", "b": "lion"}))
  with pytest.warns(UserWarning, match=r"1 of 2 parameters \(\['b'\]\)") as told:
    assert check_optimizer(halves, PARAMS, owner="pds.PMP.") is None
  assert "set pds.PMP.surrogate=" in str(told[0].message)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert check_optimizer(halves, PARAMS, CLIPPED) == CLIPPED


def test_an_unknown_optimizer_has_some_name():
  assert optimizer_name(lambda grads, state, params: (grads, state)).endswith("<lambda>")
  assert optimizer_name(optax.lion(0.1).update) == "scale_by_lion, add_decayed_weights, scale"


def test_every_solver_refuses_before_it_compiles(toy):
  problem, lion = toy.regression(), optax.lion(0.1)
  functions = problem.example_losses, problem.target_loss, lion
  data = jax.tree.map(lambda x: x[0], problem.batches)
  run = controlled_run(*functions, problem.params, data, 3)
  message = "Every score would be 0"
  for solve in (
      lambda: pmp_scores(*functions, *problem.args),
      lambda: jax.jit(lambda params: pmp_scores(*functions, params, problem.batches, None))(
        problem.params),
      lambda: pmp_scores_by_target(
        problem.example_losses, [problem.target_loss] * 2, lion, *problem.args),
      lambda: solve_weights(*functions, problem.params, data, 3, outer_lr=0.1),
      lambda: improve_policy(run, run.uniform(), ProjectedGradient(), 0.1),
      lambda: policy_gradient(run, run.uniform())):
    with pytest.raises(ValueError, match=message):
      solve()
  assert np.isfinite(simulate(run).target_losses).all()  # training alone needs no derivative
  with pytest.raises(ValueError, match=f"surrogate='straight' must be '{CLIPPED}'"):
    pmp_scores(*functions, *problem.args, surrogate="straight")


# --------------------------------------------------------------------------------- the derivative


def test_the_derivative_is_the_formula(x64):
  # x = (1, -2, 0, 9): the mean of |x| over three entries is 4, the width 16. Then one outside.
  for x, slope in (([1.0, -2.0, 0.0, 9.0], [1 / 16] * 4),
                   ([0.1] * 9 + [10.0], [1 / (4 * 1.09)] * 9 + [0.0]),
                   ([1e-300, 0.0], [1 / 4e-300] * 2), ([0.0, 0.0], [0.0, 0.0]), ([-3.0], [1 / 12])):
    x = jnp.array(x)
    costate = jnp.arange(1.0, 1.0 + len(x))
    d, q, u = update_pullback(
      optax.sign_sgd(0.5).update, State(x, optax.sign_sgd(0.5).init(x)), x, costate, [], CLIPPED)
    np.testing.assert_allclose(u, -0.5 * costate * np.array(slope), rtol=1e-12)
    np.testing.assert_array_equal(d, costate)
    assert q == []


@jax.custom_vjp
def _own_sign(x):
  return jnp.sign(x)


def _width(x):
  return 4 * jnp.mean(jnp.abs(x))


_own_sign.defvjp(lambda x: (jnp.sign(x), x),
                 lambda x, ct: (jnp.where(jnp.abs(x) <= _width(x), ct / _width(x), 0),))


def _own_lion(rate, b1=0.9, b2=0.99, decay=1e-3):
  def update(grads, momentum, params):
    new = jax.tree.map(lambda g, m, p: -rate * (
      _own_sign((1 - b1) * g + b1 * m) + decay * p), grads, momentum, params)
    return new, jax.tree.map(lambda g, m: (1 - b2) * g + b2 * m, grads, momentum)

  return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def test_scores_are_autodiff_through_the_run_with_that_derivative(x64, toy):
  # The momentum, the decay and the Hessian in between are differentiated exactly.
  problem = toy.regression()
  _, want, want_proxy = toy.unrolled(problem, _own_lion(0.02), with_proxy=True)
  kw = dict(proxy=problem.proxy, surrogate=CLIPPED)
  functions = problem.example_losses, problem.target_loss
  got = pmp_scores(*functions, optax.lion(0.02), *problem.args, **kw)
  assert np.abs(want).max() > 1e-2
  np.testing.assert_allclose(got.scores, want, atol=1e-10)
  np.testing.assert_allclose(got.proxy_scores, want_proxy.sum(0), atol=1e-10)
  # Slots, micro-batches and jit: the same.
  again = jax.jit(lambda params: pmp_scores(
    *functions, optax.lion(0.02), params, problem.batches, problem.weights, trajectory=2,
    micro_batch_size=2, **kw))(jax.tree.map(jnp.asarray, problem.params))
  np.testing.assert_allclose(again.scores, want, atol=1e-10)
  double = pmp_scores_by_target(
    problem.example_losses, [problem.target_loss, lambda p: 2 * problem.target_loss(p)],
    optax.lion(0.02), *problem.args, surrogate=CLIPPED)
  np.testing.assert_allclose(double.scores, [want, 2 * want], atol=1e-10)


def test_the_setting_changes_nothing_for_an_exact_optimizer(toy):
  problem = toy.regression()
  for optimizer in (optax.adamw(0.05), optax.yogi(0.05)):
    exact, same = (
      pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                 proxy=problem.proxy, surrogate=surrogate) for surrogate in (None, CLIPPED))
    jax.tree.map(np.testing.assert_array_equal, exact, same)


def test_only_the_reverse_pass_knows_the_surrogate(toy):
  # With it the gradient is read again, to know where the sign is steep.
  problem = toy.regression()
  params = jax.tree.map(jnp.asarray, problem.params)
  exact, with_one = (
    solve_passes(optax.sign_sgd(0.1), params, 5, SolveOptions(surrogate=s))
    for s in (None, CLIPPED))
  assert with_one.batch - exact.batch == 3 * 5
  run = controlled_run(
    problem.example_losses, problem.target_loss, optax.sign_sgd(0.1), params,
    jax.tree.map(lambda x: x[0], problem.batches), 4,
    options=SolveOptions(surrogate=CLIPPED))
  found = policy_gradient(run, run.uniform())
  np.testing.assert_array_equal(found.target_losses, simulate(run).target_losses)
  assert np.abs(found.scores).min() > 0
  better = improve_policy(run, run.uniform(), ProjectedGradient(), 1e-3)
  assert simulate(run, better.gamma).target_losses[1:].sum() <= better.objective + 1e-6


# ------------------------------------------------------------------------- a classifier's labels


NUM, DIM, HIDDEN = 200, 8, 16


def _losses(params, batch):
  """Logistic loss of a network with one hidden layer."""
  logit = jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["v"]
  return jax.nn.softplus(logit) - batch["y"] * logit


@pytest.fixture(scope="module")
def flipped():
  """`(params, batches [T,N], target loss, [N] bool)`: a fifth of the labels is wrong."""
  rng = np.random.default_rng(0)
  centre = rng.normal(size=DIM)
  centre *= 1.5 / np.linalg.norm(centre)

  def blobs(num):
    y = rng.integers(0, 2, num)
    x = rng.normal(size=(num, DIM)) + np.where(y[:, None] > 0, centre, -centre)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}

  train, dev = blobs(NUM), blobs(100)
  is_flipped = rng.permutation(NUM) < NUM // 5
  train["y"] = np.where(is_flipped, 1 - train["y"], train["y"]).astype(np.float32)
  params = {"w": 0.3 * rng.normal(size=(DIM, HIDDEN)), "b": np.zeros(HIDDEN),
            "v": 0.3 * rng.normal(size=HIDDEN)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  batches = jax.tree.map(lambda x: np.broadcast_to(x, (40, *x.shape)), train)
  return params, batches, mean_target_loss(_losses, dev), is_flipped


@pytest.mark.parametrize(("optimizer", "surrogate"), [
  (optax.sgd(0.5), None), (optax.adamw(0.01, eps_root=1e-8), None),
  (optax.lion(0.01), CLIPPED), (optax.lion(0.001), CLIPPED), (optax.sign_sgd(0.01), CLIPPED),
  (optax.rprop(0.01), CLIPPED),
], ids=["sgd", "adamw", "lion", "lion_slow", "sign_sgd", "rprop"])
def test_wrong_labels_have_low_scores(flipped, optimizer, surrogate):
  params, batches, target, is_flipped = flipped
  found = check_result(pmp_scores(
    _losses, target, optimizer, params, batches, None, surrogate=surrogate))
  assert roc_auc_score(~is_flipped, np.asarray(found.scores).sum(0)) > 0.8


# -------------------------------------------------------------------------- zeros that are left


def test_scores_that_are_all_zero_are_told(toy):
  problem = toy.regression()
  losses = problem.example_losses

  def solve(target=problem.target_loss, optimizer=None, **kw):
    return check_result(pmp_scores(
      losses, target, optimizer or optax.sgd(0.1), *problem.args, **kw))

  with pytest.raises(ValueError, match="the gradient of the target loss is 0"):
    solve(lambda p: jnp.sum(jnp.sign(p["w"])))
  with pytest.raises(ValueError, match="are fewer steps taken than the optimizer accumulates"):
    solve(optimizer=optax.MultiSteps(optax.sgd(0.1), 6))
  with pytest.raises(ValueError, match="is the learning rate 0"):
    solve(optimizer=optax.sgd(lambda step: 0.0 * step))
  far = {"x": 0 * problem.proxy["x"], "y": 0 * problem.proxy["y"]}
  losses = lambda p, b: problem.example_losses(p, b) * jnp.any(b["x"] != 0, axis=-1)  # noqa: E731
  with pytest.raises(ValueError, match="Every proxy score is 0"):
    solve(proxy=far)
