"""`pmp_scores` against autodiff through the run, finite differences, closed forms and mutations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from lmops_jax.control import check_result, mean_target_loss, pmp_scores
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training.losses import lm_example_losses

# One object each: the compiled solve is shared by all tests that pass the same functions.
SGD = optax.sgd(0.5)
SLOW_SGD = optax.sgd(0.2)
RATES = np.array([0.6, 0.5, 0.4, 0.3, 0.2])
SCHEDULED_SGD = optax.sgd(lambda count: jnp.asarray(RATES)[count])
# Clipping is active (checked below). eps_root only so that the independent gradient exists: some
# entries never have a gradient.
CLIPPED = optax.chain(optax.clip_by_global_norm(0.2), optax.sgd(1.0))
ADAMW = optax.adamw(0.03, b2=0.98, eps_root=1e-10, weight_decay=0.1)
MOMENTUM = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3, 0.9))

# name -> (optimizer, objective, weights, batch repetition)
CASES = {
  "full_batch_uniform": (SGD, "area", "uniform", "same"),
  "full_batch_uneven": (SGD, "area", "uneven", "same"),
  "mini_batches_with_repeats": (SGD, "area", "uneven", "repeats"),
  "schedule": (optax.sgd(lambda count: jnp.asarray(np.linspace(0, 1, 5))[count]), "area", "uneven",
               "fresh"),
  "momentum_and_decay": (MOMENTUM, "area", "uneven", "fresh"),
  "active_clipping": (CLIPPED, "area", "uneven", "fresh"),
  "adamw": (ADAMW, "area", "uneven", "fresh"),
  "terminal": (SGD, "terminal", "uneven", "fresh"),
}


def _case(toy, name):
  optimizer, objective, weights, repetition = CASES[name]
  problem = toy.language_model()
  batches = problem.batches
  if repetition == "same":
    batches = jax.tree.map(lambda x: np.repeat(x[:1], 5, axis=0), batches)
  elif repetition == "repeats":  # an example twice in a batch, a batch twice in the run
    batches = jax.tree.map(lambda x: x[[0, 1, 0, 2, 1]][:, [0, 1, 1, 3]], batches)
  problem = problem._replace(batches=batches)
  if weights == "uneven":
    uneven = np.random.default_rng(1).uniform(size=problem.weights.shape)
    if repetition == "same":
      uneven = np.repeat(uneven[:1], 5, axis=0)
    problem = problem._replace(weights=uneven / uneven.sum(1, keepdims=True))
  return problem, optimizer, objective


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_gradient_through_the_run_in_float64(x64, toy, name):
  problem, optimizer, objective = _case(toy, name)
  value, want, _ = toy.unrolled(problem, optimizer, objective)
  got = check_result(pmp_scores(problem.example_losses, problem.target_loss, optimizer,
                                *problem.args, objective=objective))
  assert got.scores.dtype == jnp.float64
  assert np.abs(want).max() > 1e-3
  np.testing.assert_allclose(got.scores, want, rtol=0, atol=1e-9)
  total = got.target_losses[1:].sum() if objective == "area" else got.target_losses[-1]
  np.testing.assert_allclose(total, value, rtol=1e-12)


def test_the_clipping_case_clips(x64, toy):
  problem, _, _ = _case(toy, "active_clipping")
  batch = jax.tree.map(lambda x: x[0], problem.batches)
  grads = jax.grad(lambda p: problem.weights[0] @ problem.example_losses(p, batch))(problem.params)
  assert optax.tree.norm(grads) > 0.2


@pytest.mark.parametrize("name", CASES)
def test_scores_in_float32_are_close_to_float64(toy, name):
  problem, optimizer, objective = _case(toy, name)
  with jax.enable_x64(True):
    _, want, _ = toy.unrolled(problem, optimizer, objective)
  got = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                   objective=objective)
  assert got.scores.dtype == jnp.float32
  np.testing.assert_allclose(got.scores, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_scores_are_finite_differences(x64, toy):
  problem, optimizer, _ = _case(toy, "momentum_and_decay")
  got = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args)
  step = 1e-5
  for t, n in ((0, 1), (2, 3), (4, 0)):
    area = {}
    for sign in (1, -1):
      weights = np.array(problem.weights)
      weights[t, n] += sign * step
      area[sign] = pmp_scores(problem.example_losses, problem.target_loss, optimizer,
                              problem.params, problem.batches, weights).target_losses[1:].sum()
    np.testing.assert_allclose(got.scores[t, n], -(area[1] - area[-1]) / (2 * step), rtol=1e-4)


def test_the_two_hessian_paths_agree(x64, toy):
  problem, optimizer = toy.regression(), MOMENTUM
  run = lambda mode: pmp_scores(  # noqa: E731
    problem.example_losses, problem.target_loss, optimizer, *problem.args, proxy=problem.proxy,
    hvp_mode=mode)
  got, want = run("vjp_of_grad"), run("jvp_of_grad")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


def test_costates_are_gradients_of_the_remaining_area(x64, toy):
  problem = toy.regression()
  optimizer = SLOW_SGD
  result = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                      keep_costates=True)

  def remaining_area(params, start):  # J(params_start) + ... + J(params_T)
    total = problem.target_loss(params)
    for t in range(start, 5):
      batch = jax.tree.map(lambda x: x[t], problem.batches)  # noqa: B023
      grads = jax.grad(lambda p: jnp.sum(
        problem.weights[t] * problem.example_losses(p, batch)))(params)  # noqa: B023
      params = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
      total += problem.target_loss(params)
    return total

  params = jax.tree.map(jnp.asarray, problem.params)
  for t in range(5):
    batch = jax.tree.map(lambda x: x[t], problem.batches)  # noqa: B023
    grads = jax.grad(lambda p: jnp.sum(
      problem.weights[t] * problem.example_losses(p, batch)))(params)  # noqa: B023
    params = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
    want = jax.grad(remaining_area)(params, t + 1)
    got = jax.tree.map(lambda x: x[t], result.costates)  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, want)
    np.testing.assert_allclose(result.costate_norms[t], optax.tree.norm(want), rtol=1e-10)
    np.testing.assert_allclose(result.target_losses[t + 1], problem.target_loss(params))
  jax.tree.map(np.testing.assert_allclose, result.params, params)


@functools.lru_cache(maxsize=1)
def _dense_functions(example_losses, target_loss, unravel):
  """Target gradient, Jacobian of the losses, and Hessian, on flat parameters."""
  losses = lambda p, batch: example_losses(unravel(p), batch)  # noqa: E731
  return (jax.jit(jax.grad(lambda p: target_loss(unravel(p)))), jax.jit(jax.jacobian(losses)),
          jax.jit(jax.hessian(lambda p, batch, weights: weights @ losses(p, batch))))


def _dense_recursion(problem, rates, mutation=None):
  """Costate recursion of SGD with a dense Hessian, spec 1.2 and 1.3, optionally made wrong."""
  flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, problem.params))
  rates = np.broadcast_to(rates, len(problem.weights))
  target_grad, slopes_of, hessian_of = _dense_functions(
    problem.example_losses, problem.target_loss, unravel)
  batch = lambda t: jax.tree.map(lambda x: x[t], problem.batches)  # noqa: E731
  slopes = lambda p, t: slopes_of(p, batch(t))  # noqa: E731
  hessian = lambda p, t: hessian_of(p, batch(t), problem.weights[t])  # noqa: E731
  states = [flat]
  for t, rate in enumerate(rates):
    states.append(states[-1] - rate * problem.weights[t] @ slopes(states[-1], t))
  num_steps = len(rates)
  costate = target_grad(states[-1]) * (2 if mutation == "target_twice_at_the_end" else 1)
  scores = np.zeros((num_steps, problem.weights.shape[1]))
  adjoint_rates = rates if mutation != "constant_rate" else np.full(num_steps, rates[0])
  for t in range(num_steps - 1, -1, -1):
    rate, later = adjoint_rates[t], costate
    costate = later + (0 if mutation == "terminal_only" else target_grad(states[t]))
    if mutation != "no_hessian":
      costate -= rate * hessian(states[t], t) @ later
    scores[t] = rate * slopes(states[t], t) @ (costate if mutation == "earlier_costate" else later)
  return -scores if mutation == "wrong_sign" else scores


@pytest.mark.parametrize("mutation", [
  "no_hessian", "earlier_costate", "wrong_sign", "terminal_only", "constant_rate",
  "target_twice_at_the_end"])
def test_problem_detects_a_wrong_recursion(x64, toy, mutation):
  problem = toy.regression()
  got = np.asarray(pmp_scores(problem.example_losses, problem.target_loss, SCHEDULED_SGD,
                              *problem.args).scores)
  np.testing.assert_allclose(got, _dense_recursion(problem, RATES), atol=1e-10)
  wrong = _dense_recursion(problem, RATES, mutation)
  error = np.abs(wrong - got).max() / np.abs(got).max()
  assert error > (0.3 if mutation == "no_hessian" else 0.1), error


def test_without_hessian_is_the_ablated_recursion(x64, toy):
  problem = toy.regression()
  got = pmp_scores(problem.example_losses, problem.target_loss, SLOW_SGD, *problem.args,
                   hessian=False)
  np.testing.assert_allclose(got.scores, _dense_recursion(problem, 0.2, "no_hessian"), atol=1e-10)


def _quadratic_losses(theta, batch):
  return batch["a"] * jnp.square(theta - batch["c"]) / 2


def _quadratic_target(theta):
  return jnp.square(theta - 0.4) / 2


def test_scalar_quadratic_closed_form(x64):
  rng = np.random.default_rng(0)
  num_steps, eta, theta = 6, 0.3, 1.5
  a, c = rng.uniform(0.5, 2, size=4), rng.normal(size=4)
  gamma = np.array([0.1, 0.2, 0.3, 0.4])
  batches = {k: np.repeat(v[None], num_steps, axis=0) for k, v in (("a", a), ("c", c))}
  got = pmp_scores(_quadratic_losses, _quadratic_target, optax.sgd(eta), theta, batches,
                   np.repeat(gamma[None], num_steps, axis=0))
  # theta_t = m + rho^t (theta_0 - m), lambda_s = sum_{j >= s} rho^{j - s} (theta_j - 0.4).
  curvature = gamma @ a
  rho, mean = 1 - eta * curvature, gamma @ (a * c) / curvature
  states = mean + rho ** np.arange(num_steps + 1) * (theta - mean)
  want = np.zeros((num_steps, 4))
  for t in range(num_steps):
    j = np.arange(t + 1, num_steps + 1)
    costate = np.sum(rho ** (j - t - 1.0) * (states[j] - 0.4))
    want[t] = eta * costate * a * (states[t] - c)
  np.testing.assert_allclose(got.scores, want, atol=1e-13)
  np.testing.assert_allclose(got.params, states[-1], atol=1e-13)


def test_one_step_is_gradient_similarity(x64, toy):
  problem = toy.regression(num_steps=1)
  got = pmp_scores(problem.example_losses, problem.target_loss, SLOW_SGD, *problem.args)
  params = jax.tree.map(jnp.asarray, problem.params)
  batch = jax.tree.map(lambda x: x[0], problem.batches)
  grads = jax.jacobian(problem.example_losses)(params, batch)
  target = jax.grad(problem.target_loss)(got.params)
  want = 0.2 * sum(jnp.tensordot(g, t, t.ndim)
                   for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(target)))
  np.testing.assert_allclose(got.scores[0], want, atol=1e-12)


def test_small_rates_give_the_initial_gradient_similarity(x64, toy):
  problem = toy.regression()
  batches = jax.tree.map(lambda x: np.repeat(x[:1], 5, axis=0), problem.batches)
  eta = 1e-7
  got = pmp_scores(problem.example_losses, problem.target_loss, optax.sgd(eta), problem.params,
                   batches, problem.weights)
  params = jax.tree.map(jnp.asarray, problem.params)
  grads = jax.jacobian(problem.example_losses)(params, jax.tree.map(lambda x: x[0], batches))
  target = jax.grad(problem.target_loss)(params)
  similarity = sum(jnp.tensordot(g, t, jnp.ndim(t))
                   for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(target)))
  np.testing.assert_allclose(got.scores.sum(0) / eta, 5 * 6 / 2 * similarity, rtol=1e-5)


def test_scale_identity(x64, toy):
  # Scaling all weights is scaling the rate: sum gamma s = -eta dA/deta.
  problem = toy.regression()

  def area(eta):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=eta)
    return toy.unrolled(problem, optimizer)[0]

  got = pmp_scores(problem.example_losses, problem.target_loss, SLOW_SGD, *problem.args)
  slope = (area(0.2 + 1e-6) - area(0.2 - 1e-6)) / 2e-6
  np.testing.assert_allclose(np.sum(problem.weights * got.scores), -0.2 * slope, rtol=1e-6)


def test_adam_does_not_see_a_common_scale_of_the_weights(x64, toy):
  problem = toy.regression()
  optimizer = optax.adamw(0.05, eps=0.0, weight_decay=0.1)
  got = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args)
  terms = problem.weights * got.scores
  assert np.abs(terms).max() > 1e-2
  assert abs(terms.sum()) < 1e-10


def test_scores_are_linear_in_the_target(x64, toy):
  problem = toy.regression()
  other = lambda p: jnp.sum(jnp.square(p["v"]))  # noqa: E731
  mixed = lambda p: 2 * problem.target_loss(p) - 3 * other(p)  # noqa: E731
  optimizer = optax.sgd(0.2, momentum=0.5)
  a, b, c = (pmp_scores(problem.example_losses, target, optimizer, *problem.args).scores
             for target in (problem.target_loss, other, mixed))
  np.testing.assert_allclose(c, 2 * a - 3 * b, atol=1e-12)


def test_symmetries_of_the_examples(x64, toy):
  problem = toy.regression(batch_size=5)
  batches = jax.tree.map(np.array, problem.batches)
  for leaf in batches.values():
    leaf[:, 3] = leaf[:, 1]  # a duplicate
  weights = np.array(problem.weights)
  weights[:, 2] = 0  # never drawn
  def losses(p, batch):  # the fourth kind of example has a constant loss
    return jnp.where(batch["constant"], 1.0, problem.example_losses(p, batch))
  batches["constant"] = np.zeros((5, 5), bool)
  batches["constant"][:, 4] = True
  run = lambda batches, weights, proxy=None: pmp_scores(  # noqa: E731
    losses, problem.target_loss, SLOW_SGD, problem.params, batches, weights, proxy=proxy)
  # Examples of weight 0 do not change the run, only their own sensitivity is measured.
  got = run(batches, weights).scores
  np.testing.assert_allclose(got[:, 3], got[:, 1], rtol=1e-12)
  np.testing.assert_array_equal(got[:, 4], 0)
  assert np.abs(got[:, 2]).min() > 0
  order = np.array([3, 0, 4, 2, 1])
  permuted = run(jax.tree.map(lambda x: x[:, order], batches), weights[:, order]).scores
  np.testing.assert_allclose(permuted, got[:, order], atol=1e-13)


def test_examples_never_drawn_get_zero(x64, toy):
  # Scores by example: what is in no batch receives nothing.
  problem = toy.regression(batch_size=3)
  rows = np.random.default_rng(0).integers(0, 6, size=(5, 3))
  data = {"x": np.random.default_rng(1).normal(size=(8, 3)),
          "y": np.random.default_rng(2).normal(size=8)}
  got = pmp_scores(problem.example_losses, problem.target_loss, SLOW_SGD, problem.params,
                   jax.tree.map(lambda x: x[rows], data), problem.weights).scores
  def area(gamma):
    drawn = problem._replace(batches=jax.tree.map(lambda x: x[rows], data), weights=gamma[rows])
    return toy.unrolled(drawn, SLOW_SGD)[0]
  gamma = np.full(8, 1 / 8)
  by_example = np.zeros(8)
  uniform = pmp_scores(problem.example_losses, problem.target_loss, SLOW_SGD, problem.params,
                       jax.tree.map(lambda x: x[rows], data), gamma[rows]).scores
  np.add.at(by_example, rows, uniform)
  assert got.shape == (5, 3)
  np.testing.assert_array_equal(by_example[6:], 0)
  n = int(rows[0, 0])
  bump = np.where(np.arange(8) == n, 1e-6, 0)
  np.testing.assert_allclose(
    by_example[n], -(area(gamma + bump) - area(gamma - bump)) / 2e-6, rtol=1e-5)


def test_micro_batches_change_nothing(x64, toy):
  problem = toy.regression(num_steps=3, batch_size=6)
  run = lambda **kw: pmp_scores(  # noqa: E731
    problem.example_losses, problem.target_loss, CLIPPED, *problem.args,
    proxy=problem.proxy, **kw)
  want = run()
  for kw in (dict(micro_batch_size=3, proxy_batch_size=2),
             dict(micro_batch_size=1, hvp_mode="vjp_of_grad", proxy_batch_size=100)):
    got = run(**kw)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, want)


def test_padding_and_masked_tokens_change_nothing(x64, toy):
  problem = toy.language_model()
  batches = jax.tree.map(np.array, problem.batches)
  batches["loss_mask"][..., -2:] = 0
  run = lambda batches: pmp_scores(  # noqa: E731
    problem.example_losses, problem.target_loss, SGD, problem.params, batches,
    problem.weights).scores
  want = run(batches)
  changed = jax.tree.map(np.array, batches)
  changed["tokens"][..., -2:] = (changed["tokens"][..., -2:] + 1) % 7
  changed["targets"][..., -2:] = (changed["targets"][..., -2:] + 3) % 7
  np.testing.assert_allclose(run(changed), want, rtol=1e-12)


@pytest.mark.parametrize("padding", [1, 7])
def test_the_amount_of_padding_changes_nothing(x64, padding):
  """Scores of all three kinds of data, each with positions appended that do not count."""
  model = Transformer(TransformerConfig(
    vocab_size=16, num_layers=1, width=8, num_heads=2, mlp_width=12, dtype="float64",
    param_dtype="float64"))
  losses = lm_example_losses(model)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
  rng = np.random.default_rng(0)

  def sequences(*shape):
    tokens = rng.integers(0, 16, (*shape, 6)).astype(np.int32)
    return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:],
            "loss_mask": np.ones((*shape, 5))}

  def padded(rows, num):
    width = lambda x: [(0, 0)] * (x.ndim - 1) + [(0, num)]  # noqa: E731
    return {k: np.pad(v, width(v), constant_values=0 if k == "loss_mask" else 3)
            for k, v in rows.items()}

  data = sequences(2, 4), sequences(6), sequences(5)
  def run(num):
    batches, proxy, target = (padded(rows, num) for rows in data)
    return pmp_scores(losses, mean_target_loss(losses, target), SLOW_SGD, params, batches, None,
                      proxy=proxy)
  got, want = run(padding), run(0)
  assert np.abs(want.scores).min() > 0
  for a, b in ((got.scores, want.scores), (got.proxy_scores, want.proxy_scores),
               (got.target_losses, want.target_losses)):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
