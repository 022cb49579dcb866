"""Policies against autodiff through the plainly unrolled run, plain training and brute force.

The problems are the perceptron of arXiv 2402.17759 (section 4.1) at small sizes: labels of a
teacher, training inputs of variance 3, desired inputs shifted by 0.5, binary cross-entropy.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmops_jax.control import (
  ExponentiatedGradient,
  FrankWolfe,
  ProjectedGradient,
  SolveOptions,
  check_policy,
  controlled_run,
  improve_policy,
  mean_target_loss,
  policy_gradient,
  project_simplex,
  simulate,
)
from lmops_jax.evaluation import contributions, learning_speed
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training.losses import lm_example_losses

# One object each: compiled programs are shared by the tests that pass the same functions.
SGD = optax.sgd(0.1)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
ADAMW = optax.adamw(0.05, b2=0.98, weight_decay=0.1)
RULES = {"projected": ProjectedGradient(), "bisect": ProjectedGradient("bisect"),
         "exponentiated": ExponentiatedGradient(), "frank_wolfe": FrankWolfe()}


def _losses(params, batch):
  """Binary cross-entropy; a second parameter, if there is one, plays no part."""
  logits = batch["x"] @ (params["theta"] if isinstance(params, dict) else params)
  return jax.nn.softplus(logits) - batch["y"] * logits


class Perceptron(NamedTuple):
  """Arrays are NumPy float64, so that they follow the precision of the test."""
  train: dict
  dev: dict
  test: dict
  theta: np.ndarray
  is_flipped: np.ndarray


def _perceptron(seed=0, num_train=64, dim=16, num_desired=32, flips=0.0):
  rng = np.random.default_rng(seed)
  teacher = rng.normal(size=dim)
  def examples(x):
    return {"x": x, "y": (x @ teacher > 0).astype(np.float64)}
  train = examples(rng.normal(size=(num_train, dim)) * 3**0.5)
  dev, test = (examples(0.5 + rng.normal(size=(num_desired, dim))) for _ in range(2))
  is_flipped = rng.random(num_train) < flips
  train["y"] = np.where(is_flipped, 1 - train["y"], train["y"])
  return Perceptron(train, dev, test, rng.uniform(-1, 1, dim) / dim**0.5, is_flipped)


def _run(data, num_steps, optimizer=SGD, params=None, mask=None, monitor=None, **kw):
  return controlled_run(
    _losses, mean_target_loss(_losses, data.dev), optimizer,
    data.theta if params is None else params, data.train, num_steps, mask=mask,
    monitor=monitor, options=SolveOptions(**kw))


def _policy(num_steps, num_examples, seed=0):
  return np.random.default_rng(seed).dirichlet(np.ones(num_examples), size=num_steps)


def _unrolled(losses, optimizer, params, train, dev, gamma):
  """`(J, -dJ/dgamma, [L], params_T)` by reverse mode through a Python loop."""
  def area(gamma):
    state, at, values = optimizer.init(params), params, []
    for weights in gamma:
      grads = jax.grad(lambda p, w: jnp.sum(w * losses(p, train)))(at, weights)
      updates, state = optimizer.update(grads, state, at)
      at = optax.apply_updates(at, updates)
      values.append(jnp.mean(losses(at, dev)))
    return sum(values), (jnp.stack(values), at)

  (value, (losses_seen, last)), grad = jax.jit(jax.value_and_grad(area, has_aux=True))(gamma)
  return value, -grad, losses_seen, last


def _assert_close(got, want, relative):
  """Within a fraction of the largest entry."""
  want = np.asarray(want)
  np.testing.assert_allclose(got, want, rtol=0, atol=relative * np.abs(want).max())


# ------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("optimizer, num_steps", [(SGD, 20), (MOMENTUM, 20), (ADAMW, 10)],
                         ids=["sgd", "momentum", "adamw"])
def test_the_gradient_is_autodiff_through_the_unrolled_loop(x64, optimizer, num_steps):
  data, gamma = _perceptron(), _policy(num_steps, 64)
  # The gradient of `idle` is 0 throughout: Adam's is 0 / sqrt(0), which autodiff makes NaN, so the
  # reference goes without.
  run = _run(data, num_steps, optimizer, {"theta": data.theta, "idle": np.ones(3)})
  got = policy_gradient(run, gamma)
  area, scores, losses, last = _unrolled(
    _losses, optimizer, data.theta, data.train, data.dev, gamma)
  assert got.scores.dtype == np.float64
  _assert_close(got.scores, scores, 1e-12)
  np.testing.assert_allclose(got.target_losses[1:], losses, rtol=1e-13)
  np.testing.assert_allclose(got.target_losses[1:].sum(), area, rtol=1e-13)
  _assert_close(got.params["theta"], last, 1e-13)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got) if leaf is not None)


@pytest.fixture(scope="module")
def sgd_case():
  """A run, a policy and what both passes make of them, in float64."""
  with jax.enable_x64(True):
    data, gamma = _perceptron(), _policy(20, 64)
    run = _run(data, 20)
    return data, run, gamma, policy_gradient(run, gamma)


def test_the_gradient_is_central_differences(x64, sgd_case):
  _, run, gamma, found = sgd_case
  step = 1e-5
  for t, n in ((0, 3), (7, 60), (12, 0), (19, 31)):
    area = {}
    for sign in (1, -1):
      moved = gamma.copy()
      moved[t, n] += sign * step
      area[sign] = simulate(run, moved).target_losses[1:].sum()
    slope = (area[1] - area[-1]) / (2 * step)
    np.testing.assert_allclose(found.scores[t, n], -slope, rtol=0, atol=1e-7)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("kw", [
  dict(trajectory="sqrt"), dict(trajectory="host"), dict(trajectory=1), dict(trajectory=3),
  dict(trajectory=7, micro_batch_size=16), dict(micro_batch_size=1),
  dict(hvp_mode="vjp_of_grad", trajectory=20),
], ids=str)
def test_how_it_is_computed_does_not_matter(x64, sgd_case, kw):
  data, _, gamma, want = sgd_case
  got = policy_gradient(_run(data, 20, **kw), gamma)
  _assert_close(got.scores, want.scores, 1e-10)
  np.testing.assert_allclose(got.target_losses, want.target_losses, rtol=1e-12)


def _on_mesh(data):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  place = lambda x, *axes: jax.device_put(  # noqa: E731
    x, NamedSharding(mesh, PartitionSpec(*axes)))
  return data._replace(train=place(data.train, "data"), dev=place(data.dev, "data")), place


@pytest.mark.parametrize("trajectory", ["all", 3])
def test_examples_over_eight_devices(x64, sgd_case, trajectory):
  data, _, gamma, want = sgd_case
  sharded, place = _on_mesh(data)
  run = _run(sharded, 20, trajectory=trajectory, micro_batch_size=16)
  placed = place(gamma, None, "data")
  got = improve_policy(run, placed, ProjectedGradient("bisect"), 0.5)
  _assert_close(got.scores, want.scores, 1e-10)
  np.testing.assert_allclose(got.target_losses, want.target_losses, rtol=1e-12)
  new = project_simplex(gamma + 0.5 * np.asarray(want.scores))
  np.testing.assert_allclose(got.gamma, new, rtol=0, atol=1e-12)
  trained = simulate(run, placed)
  np.testing.assert_allclose(trained.target_losses, want.target_losses, rtol=1e-12)


@pytest.mark.parametrize("num_examples", [1, 5])
def test_one_step_has_a_closed_form(x64, num_examples):
  data = _perceptron(num_train=num_examples)
  gamma = _policy(1, num_examples)
  run = _run(data, 1)
  found = policy_gradient(run, gamma)

  def slopes(theta, batch):  # of the cross-entropy
    return (1 / (1 + np.exp(-batch["x"] @ theta)) - batch["y"])[:, None] * batch["x"]

  before = slopes(data.theta, data.train)
  theta = data.theta - 0.1 * gamma[0] @ before
  _assert_close(found.scores[0], 0.1 * before @ slopes(theta, data.dev).mean(0), 1e-12)
  np.testing.assert_allclose(found.params, theta, rtol=1e-13)
  step = improve_policy(run, gamma, ProjectedGradient(), 1.0, line_search=True)
  if num_examples == 1:
    np.testing.assert_array_equal(step.gamma, 1)
    np.testing.assert_array_equal(step.gap, 0)
  else:
    assert improve_policy(run, step.gamma, ProjectedGradient(), 0).objective < step.objective


@pytest.mark.slow
def test_the_gradient_of_a_transformer(x64):
  model = Transformer(TransformerConfig(
    vocab_size=11, num_layers=1, width=8, num_heads=2, mlp_width=12, max_length=5,
    norm="rms_outside", positions="learned", activation="relu", gated_mlp=False,
    attention_scale=8**-0.5, initialization="fan_in", dtype="float64", param_dtype="float64"))
  losses = lm_example_losses(model)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))["params"]
  tokens = np.random.default_rng(0).integers(0, 9, (10, 6)).astype(np.int32)  # two never occur
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": np.ones((10, 5))}
  train, dev = ({k: v[rows] for k, v in batch.items()} for rows in (slice(6), slice(6, 10)))
  gamma = _policy(3, 6)
  run = controlled_run(losses, mean_target_loss(losses, dev), SGD, params, train, 3,
                       options=SolveOptions(trajectory=2, micro_batch_size=3))
  got = policy_gradient(run, gamma)
  _, scores, seen, _ = _unrolled(losses, SGD, params, train, dev, gamma)
  _assert_close(got.scores, scores, 1e-12)
  np.testing.assert_allclose(got.target_losses[1:], seen, rtol=1e-12)


# ------------------------------------------------------------------------------- training under one


def test_uniform_weights_are_plain_training_on_the_mean_loss(x64, full_compile):
  """Bit for bit: 1 / 64 is a power of two."""
  data = _perceptron()
  run = _run(data, 20, monitor=jax.tree_util.Partial(_sum_of_theta))

  @jax.jit
  def train(theta, batch):
    def step(theta, _):
      grad = jax.grad(lambda p: jnp.mean(_losses(p, batch)))(theta)
      return theta - 0.1 * grad, theta
    last, before = jax.lax.scan(step, theta, length=20)
    return jnp.append(before, last[None], axis=0)

  with full_compile():
    curve = np.asarray(train(data.theta, data.train))
    results = [simulate(run, policy) for policy in (None, np.full((20, 64), 1 / 64))]
  for got in results:
    np.testing.assert_array_equal(got.params, curve[-1])
    np.testing.assert_allclose(got.monitors, curve.sum(axis=1), rtol=1e-13)
    np.testing.assert_allclose(
      got.target_losses, [_losses(p, data.dev).mean() for p in curve], rtol=1e-13)
    np.testing.assert_allclose(
      got.step_losses, [_losses(p, data.train).mean() for p in curve[:-1]], rtol=1e-13)
    np.testing.assert_array_equal(got.weights, 1 / 64)


def _sum_of_theta(theta):
  return jnp.sum(theta)


def _keep(signals):
  return signals


def test_an_observer_sees_the_step_before_it_happens(x64):
  data, gamma = _perceptron(num_train=12, dim=5), _policy(6, 12)
  run = _run(data, 6, micro_batch_size=4)
  dev, test = run.target_loss, mean_target_loss(_losses, data.test)
  result = simulate(run, gamma, directions={"dev": dev, "test": test}, observe=_keep)
  seen = result.statistics
  np.testing.assert_array_equal(seen.step, np.arange(6))
  np.testing.assert_array_equal(seen.weights, gamma)
  np.testing.assert_array_equal(result.weights, gamma)
  theta = jnp.asarray(data.theta)
  each = jax.jit(jax.vmap(jax.grad(lambda p, x, y: _losses(p, {"x": x, "y": y})), (None, 0, 0)))
  for t in range(6):
    grads = each(theta, data.train["x"], data.train["y"])
    for name, loss in (("dev", dev), ("test", test)):
      _assert_close(seen.contributions[name][t], grads @ jax.grad(loss)(theta), 1e-13)
    np.testing.assert_allclose(seen.losses[t], _losses(theta, data.train), rtol=1e-12)
    np.testing.assert_allclose(result.step_losses[t], gamma[t] @ seen.losses[t], rtol=1e-13)
    theta = theta - 0.1 * gamma[t] @ grads
  np.testing.assert_allclose(result.params, theta, rtol=1e-12)


def _choose(mask, signals):
  """Loss and contribution together, sharper with time."""
  values = (1 + signals.step) * signals.losses * jnp.exp(signals.contributions["dev"])
  values = jnp.where(mask, values, 0)
  return values / jnp.sum(values)


def test_a_policy_that_chooses_as_training_goes_is_the_policy_it_chose(x64):
  run = _run(_perceptron(num_train=12, dim=5), 6, MOMENTUM)
  chosen = simulate(run, jax.tree_util.Partial(_choose, jnp.ones(12, bool)),
                    directions={"dev": run.target_loss})
  check_policy(run, chosen.weights)
  assert np.ptp(chosen.weights, axis=0).max() > 0.01
  again = simulate(run, chosen.weights)
  for name in ("params", "target_losses", "step_losses"):
    np.testing.assert_allclose(getattr(again, name), getattr(chosen, name), rtol=1e-13)


def test_training_never_evaluates_more_than_a_micro_batch():
  sizes = []
  def losses(params, batch):
    sizes.append(batch["x"].shape[0])
    return _losses(params, batch)

  data = _perceptron(num_train=12, dim=5)
  run = controlled_run(losses, mean_target_loss(_losses, data.dev), SGD, data.theta, data.train, 3,
                       options=SolveOptions(micro_batch_size=4))
  sizes.clear()  # the check of the arguments looks at shapes only
  simulate(run, directions={"dev": run.target_loss})
  simulate(run)
  assert set(sizes) == {4}


def test_weighted_contributions_are_the_rate_of_improvement(x64):
  """|sum_n gamma_n CT_n - (L_t - L_{t+1}) / eta| is in proportion to eta."""
  data, gamma = _perceptron(), _policy(1, 64)
  errors = []
  for rate in (0.02, 0.01, 0.005):
    run = _run(data, 1, optax.sgd(rate))
    result = simulate(run, gamma, directions={"dev": run.target_loss}, observe=_keep)
    speed = gamma[0] @ np.asarray(result.statistics.contributions["dev"][0])
    fall = -np.diff(result.target_losses)[0] / rate
    errors.append(abs(speed - fall))
  assert errors[0] > 1e-4
  np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, rtol=0.05)


# ------------------------------------------------------------------------------ improving a policy


@pytest.fixture(scope="module")
def case():
  """A run of 6 steps on 12 examples, a policy, and its scores, in float32."""
  data = _perceptron(num_train=12, dim=5)
  run, gamma = _run(data, 6), np.float32(_policy(6, 12))
  return data, run, gamma, np.asarray(policy_gradient(run, gamma).scores, np.float64)


def _by_hand(name, gamma, scores, rate):
  if name == "exponentiated":
    new = gamma * np.exp(rate * scores)
    return new / new.sum(1, keepdims=True)
  if name == "frank_wolfe":
    vertex = np.eye(gamma.shape[1])[np.argmax(scores, axis=1)]
    return gamma + min(rate, 1) * (vertex - gamma)
  with jax.enable_x64(True):
    return np.asarray(project_simplex(np.float64(gamma) + rate * scores))


@pytest.mark.parametrize("name", RULES)
def test_a_step_of_each_rule(case, name):
  _, run, gamma, scores = case
  for rate in (0.3, 3.0):
    step = improve_policy(run, gamma, RULES[name], rate)
    assert step.gamma.dtype == np.float32
    np.testing.assert_allclose(step.gamma, _by_hand(name, gamma, scores, rate), atol=2e-6)
    check_policy(run, step.gamma)
    assert step.rate == pytest.approx(min(rate, 1) if name == "frank_wolfe" else rate)
  np.testing.assert_allclose(step.scores, scores, atol=1e-6)
  np.testing.assert_allclose(step.objective, step.target_losses[1:].sum(), rtol=1e-6)
  np.testing.assert_allclose(
    step.gap, scores.max(1) - (gamma * scores).sum(1), atol=1e-6 * np.abs(scores).max())


@pytest.mark.parametrize("name", RULES)
def test_no_rate_and_frozen_steps_leave_the_bits(case, name):
  _, run, gamma, _ = case
  for rate in (0, 0.0):
    step = improve_policy(run, gamma, RULES[name], rate)
    np.testing.assert_array_equal(step.gamma, gamma)
    assert step.rate == 0
  step = improve_policy(run, gamma, RULES[name], 0.5, frozen_steps=4)
  np.testing.assert_array_equal(step.gamma[:4], gamma[:4])
  full = improve_policy(run, gamma, RULES[name], 0.5)
  np.testing.assert_allclose(step.gamma[4:], full.gamma[4:], rtol=0, atol=1e-7)
  assert np.abs(step.gamma[4:] - gamma[4:]).max(1).min() > 1e-3


@pytest.mark.parametrize("name", ["projected", "exponentiated", "frank_wolfe"])
def test_a_line_search_lowers_the_objective_every_time(x64, case, name):
  data, *_ = case
  run = _run(data, 6)
  gamma, values, gaps = run.uniform(), [], []
  for _ in range(8):
    step = improve_policy(run, gamma, RULES[name], 20.0, line_search=True)
    values.append(float(step.objective))
    gaps.append(float(step.gap.sum()))
    gamma = step.gamma
    check_policy(run, gamma)
  assert (np.diff(values) < 0).all()
  assert gaps[-1] < 0.2 * gaps[0]


def test_a_line_search_takes_the_first_rate_that_satisfies_armijo(x64):
  data = _perceptron(seed=3, num_train=12, dim=5)
  run = _run(data, 6, optax.sgd(2.0))
  gamma = _policy(6, 12, seed=3)
  first = improve_policy(run, gamma, FrankWolfe(), 1.0)
  rate, falls = 1.0, False
  while not falls:
    new = improve_policy(run, gamma, FrankWolfe(), rate).gamma
    promised = float(jnp.sum(first.scores * (new - gamma)))
    falls = simulate(run, new).target_losses[1:].sum() <= first.objective - 1e-4 * promised
    rate = rate if falls else rate / 2
  assert rate < 1  # else nothing is searched
  step = improve_policy(run, gamma, FrankWolfe(), 1.0, line_search=True)
  assert step.rate == rate
  np.testing.assert_array_equal(step.gamma, new)


def test_the_gap_is_the_steepest_way_to_a_vertex(x64):
  """By central differences of J towards all vertices of each row."""
  data = _perceptron(num_train=4, dim=3)
  run, gamma = _run(data, 2), _policy(2, 4)
  gap = improve_policy(run, gamma, FrankWolfe(), 0.0).gap
  for t in range(2):
    falls = []
    for n in range(4):
      towards = np.zeros_like(gamma)
      towards[t] = np.eye(4)[n] - gamma[t]
      plus, minus = (float(simulate(run, gamma + h * towards).target_losses[1:].sum())
                     for h in (1e-5, -1e-5))
      falls.append((minus - plus) / 2e-5)
    np.testing.assert_allclose(gap[t], max(falls), rtol=1e-7)


def test_exponentiated_weights_of_zero_are_no_trap(case):
  """A far better example without weight must not make the others underflow."""
  gamma = jnp.asarray([[0.0, 0.25, 0.75]])
  new = ExponentiatedGradient().move(gamma, jnp.asarray([[1e6, 1.0, 0.0]]), 2.0)
  odds = np.exp(2) / 3
  np.testing.assert_allclose(new, [[0, odds / (1 + odds), 1 / (1 + odds)]], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_rows_that_are_no_examples_change_nothing(x64, name):
  data = _perceptron(num_train=10, dim=5)
  train = {"x": np.concatenate([data.train["x"], 50 * np.ones((6, 5))]),
           "y": np.concatenate([data.train["y"], np.ones(6)])}
  mask = np.arange(16) < 10
  plain, padded = _run(data, 4), _run(data._replace(train=train), 4, mask=mask)
  np.testing.assert_array_equal(padded.uniform()[:, :10], plain.uniform())
  np.testing.assert_array_equal(padded.uniform()[:, 10:], 0)
  gamma = plain.uniform()
  wide = padded.uniform()
  for _ in range(2):
    want = improve_policy(plain, gamma, RULES[name], 0.7)
    got = improve_policy(padded, wide, RULES[name], 0.7)
    np.testing.assert_allclose(got.target_losses, want.target_losses, rtol=1e-13)
    np.testing.assert_allclose(got.gap, want.gap, rtol=1e-11)
    np.testing.assert_allclose(got.scores[:, :10], want.scores, rtol=0, atol=1e-14)
    np.testing.assert_allclose(got.gamma[:, :10], want.gamma, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(got.gamma[:, 10:], 0)
    gamma, wide = want.gamma, got.gamma
  if name == "projected":
    chosen = [simulate(run, jax.tree_util.Partial(_choose, keep),
                       directions={"dev": run.target_loss})
              for run, keep in ((plain, mask[:10]), (padded, mask))]
    np.testing.assert_allclose(chosen[1].target_losses, chosen[0].target_losses, rtol=1e-13)


def test_epochs_share_one_compiled_program():
  count = 0
  def losses(params, batch):
    nonlocal count
    count += 1
    return _losses(params, batch)

  data = _perceptron(num_train=16, dim=4)
  sharded, place = _on_mesh(data)
  uniform = np.full((3, 16), 1 / 16, np.float32)
  for case, gamma in ((data, uniform), (sharded, place(uniform, None, "data"))):
    run = controlled_run(
      losses, mean_target_loss(_losses, case.dev), SGD, case.theta, case.train, 3)
    for epoch, rate in enumerate((0.4, 0.3, np.float32(0.2), 0.0, 0)):
      gamma = improve_policy(run, gamma, ProjectedGradient("bisect"), rate).gamma
      simulate(run, gamma)
      if epoch == 0:
        once = count
    assert count == once


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("change, message", [
  (dict(example_losses=3), "example_losses must be a function, got 3"),
  (dict(target_loss=None), "target_loss must be a function, got None"),
  (dict(target_loss=lambda p: p), "target_loss returned an array of shape"),
  (dict(example_losses=lambda p, b: jnp.sum(p)), "expected one loss an example"),
  (dict(optimizer="sgd"), "optimizer must be an optax.GradientTransformation"),
  (dict(params=np.arange(3)), "must be real floating point"),
  (dict(data={"x": np.zeros((0, 5)), "y": np.zeros(0)}), "each must be at least 1"),
  (dict(data={"x": np.zeros((3, 5)), "y": np.zeros(4)}), r"all leaves of data must share \[N\]"),
  (dict(num_steps=0), "num_steps must be an integer >= 1, got 0"),
  (dict(num_steps=1.5), "num_steps must be an integer >= 1, got 1.5"),
  (dict(mask=np.ones(5, bool)), r"mask has shape \(5,\); expected one flag for each of the 12"),
  (dict(mask=np.zeros(12, bool)), "at least one of them True"),
  (dict(monitor=1.0), "monitor must be a function of params or None, got 1.0"),
  (dict(options=SolveOptions(micro_batch_size=5)),
   "micro_batch_size=5 does not divide the batch of 12"),
  (dict(options=SolveOptions(trajectory="auto")), "trajectory"),
  (dict(options=SolveOptions(objective="terminal")), "not with objective='terminal'"),
])
def test_arguments_of_a_run(change, message):
  data = _perceptron(num_train=12, dim=5)
  kw = dict(example_losses=_losses, target_loss=mean_target_loss(_losses, data.dev),
            optimizer=SGD, params=data.theta, data=data.train, num_steps=6) | change
  with pytest.raises(ValueError, match=message):
    controlled_run(**kw)


def test_a_run_needs_desired_examples():
  with pytest.raises(ValueError, match="each must be at least 1"):
    mean_target_loss(_losses, {"x": np.zeros((0, 5)), "y": np.zeros(0)})


def _spoilt(t, n, value):
  gamma = np.full((6, 12), 1 / 12)
  gamma[t, n] = value
  return gamma


@pytest.mark.parametrize("gamma, message", [
  (np.full((5, 12), 1 / 12), r"the policy has shape \(5, 12\); expected \[T, N\] = \(6, 12\)"),
  (np.full(12, 1 / 12), r"the policy has shape \(12,\)"),
  (_spoilt(2, 7, np.nan), "the policy has the weight nan at step 2, example 7"),
  (_spoilt(5, 0, np.inf), "the policy has the weight inf at step 5, example 0"),
  (_spoilt(0, 1, -0.1), "the policy has the weight -0.1.* at step 0, example 1"),
  (_spoilt(4, 1, 0.5), "the policy's row of step 4 sums to 1.41667, not 1; project it with"),
])
def test_what_is_no_policy(case, gamma, message):
  _, run, _, _ = case
  for use in (check_policy, simulate):
    with pytest.raises(ValueError, match=message):
      use(run, gamma)
  if gamma.shape != (6, 12):
    for use in (policy_gradient, lambda run, gamma: improve_policy(run, gamma, FrankWolfe(), 0.1)):
      with pytest.raises(ValueError, match=message):
        use(run, gamma)


def test_policies_that_are_accepted(case):
  data, run, gamma, _ = case
  assert check_policy(run, gamma).dtype == np.float32
  one_hot = np.eye(12, dtype=int)[:6]  # integers are numbers
  assert check_policy(run, one_hot).dtype == np.float32
  padded = _run(data, 6, mask=np.arange(12) < 11)
  check_policy(padded, one_hot)
  with pytest.raises(ValueError, match="weight to rows that the mask says are no examples"):
    check_policy(padded, gamma)


@pytest.mark.parametrize("change, message", [
  (dict(rate=-0.1), "rate must be finite and >= 0, got -0.1"),
  (dict(rate=float("inf")), "rate must be finite and >= 0, got inf"),
  (dict(frozen_steps=7), r"frozen_steps must be an integer in \[0, 6\], got 7"),
  (dict(frozen_steps=-1), r"frozen_steps must be an integer in \[0, 6\], got -1"),
])
def test_arguments_of_an_improvement(case, change, message):
  _, run, gamma, _ = case
  with pytest.raises(ValueError, match=message):
    improve_policy(run, gamma, **(dict(rule=ProjectedGradient(), rate=0.1) | change))


def test_a_chosen_row_has_one_weight_for_each_example(case):
  _, run, _, _ = case
  with pytest.raises(ValueError, match=r"weights of shape \(3,\) for a step; expected one for each"
                                       " of the 12"):
    simulate(run, lambda signals: jnp.ones(3) / 3)


# -------------------------------------------------------------------------------- the learning law


def test_a_tiny_problem_reaches_first_order_optimality(x64):
  """The exact law: at a gap of 0, adjoint contributions of the used examples are equal."""
  run = _run(_perceptron(num_train=64, dim=8, num_desired=64), 20)
  gamma = run.uniform()
  for _ in range(400):
    step = improve_policy(run, gamma, ProjectedGradient(), 100.0, line_search=True)
    if step.gap.sum() / 20 <= 1e-7:
      break
    gamma = step.gamma
  assert step.gap.sum() / 20 <= 1e-6
  used = np.asarray(gamma) > 0
  assert used.sum(axis=1).max() >= 2  # else nothing is compared
  for row, scores in zip(used, np.asarray(step.scores)):
    assert np.ptp(scores[row]) <= 1e-2 * np.abs(scores[row]).max()
    assert scores[~row].max(initial=-np.inf) <= scores[row].min() + 1e-2 * np.abs(scores).max()


class Outer(NamedTuple):
  data: Perceptron
  dev: np.ndarray  # [E + 1] AUC under the policy after e updates
  test: np.ndarray
  gap: np.ndarray
  adjoint_similarity: np.ndarray  # at both ends
  first: Any  # what `_law` saw under uniform weights
  last: Any
  gamma: np.ndarray
  path: list  # (AUC, SIM) on dev, along the way


def _law(signals):
  return {name: (contributions.similarity(signals.weights, values),
                 contributions.exclusion(signals.weights, values))
          for name, values in signals.contributions.items()}


def _optimised(flips):
  """The small case: 200 epochs of projected steps with a rate of 1 / T on J that decays to 0."""
  epochs, steps = 200, 200
  data = _perceptron(num_train=256, dim=16, num_desired=1024, flips=flips)
  test = mean_target_loss(_losses, data.test)
  run = _run(data, steps, monitor=test)
  directions = {"dev": run.target_loss, "test": test}
  gamma, dev, held_out, gap, similar, path, seen = run.uniform(), [], [], [], [], [], []
  similarity = jax.jit(jax.vmap(contributions.similarity))
  for epoch in range(epochs + 1):
    step = improve_policy(run, gamma, ProjectedGradient(), 1 / steps * (1 - epoch / epochs))
    dev.append(learning_speed.loss_auc(step.target_losses))
    held_out.append(learning_speed.loss_auc(step.monitors))
    gap.append(float(step.gap.mean()))
    if epoch % 20 == 0:
      seen.append(simulate(run, gamma, directions=directions, observe=_law).statistics)
      path.append((dev[-1], contributions.mean_similarity(seen[-1]["dev"][0])[0]))
      similar.append(contributions.mean_similarity(similarity(gamma, step.scores))[0])
    last, gamma = gamma, step.gamma
  return Outer(data, np.array(dev), np.array(held_out), np.array(gap), np.array(similar), seen[0],
               seen[-1], np.asarray(last), path)


@pytest.fixture(scope="module")
def clean(full_compile):
  with jax.enable_x64(True), full_compile():
    return _optimised(0.0)


@pytest.fixture(scope="module")
def noisy(full_compile):
  with jax.enable_x64(True), full_compile():
    return _optimised(0.2)


def test_the_small_case_becomes_nearly_optimal(clean):
  assert clean.gap[-1] <= clean.gap[0] / 20
  assert clean.adjoint_similarity[-1] >= 5 * clean.adjoint_similarity[0]


def test_the_small_case_learns_faster(clean):
  assert (np.diff(clean.dev) <= 0).mean() >= 0.95
  assert clean.dev[-1] <= 0.85 * clean.dev[0]
  assert clean.test[-1] <= 0.9 * clean.test[0]


def test_contributions_become_more_alike_as_the_paper_says(clean):
  """A trend, not an equality: the law of the paper replaces the costate by the gradient."""
  aucs, similarities = np.array(clean.path).T
  assert similarities[-1] >= 3 * similarities[0]
  assert scipy.stats.spearmanr(aucs, similarities).statistic <= -0.9


def test_flipped_labels_lose_their_weight(noisy):
  flipped = noisy.gamma @ noisy.data.is_flipped
  assert 0.15 < noisy.data.is_flipped.mean() < 0.25
  assert flipped.mean() <= 0.03
  assert flipped[:100].mean() <= 0.01
  assert contributions.excluded_share(noisy.first["dev"][1]) == 0
  assert contributions.excluded_share(noisy.last["dev"][1]) >= 0.8
