"""Optimizers against their formulas written out in NumPy, schedules, masks, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.training import optimizers

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 2)).astype(np.float32), "b": np.ones(2, np.float32)}
GRADS = [jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS) for _ in "123"]


def _run(tx, grads=GRADS):
  params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
  update = jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _reference(rule, grads=GRADS):
  """`rule(theta, g, memory, t) -> theta` on every leaf, float64."""
  out = {}
  for name, value in PARAMS.items():
    theta, memory = np.asarray(value, np.float64), {}
    for t, g in enumerate(grads):
      theta = rule(theta, np.asarray(g[name], np.float64), memory, t)
    out[name] = theta
  return out


def _check(tx, rule, grads=GRADS):
  got, want = _run(tx, grads), _reference(rule, grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_and_decay(nesterov):
  def rule(theta, g, memory, t):
    g = g + 0.1 * theta
    m = memory["m"] = 0.8 * memory.get("m", 0) + g
    return theta - 0.3 * (0.8 * m + g if nesterov else m)

  _check(optimizers.sgd(0.3, 0.8, weight_decay=0.1, nesterov=nesterov), rule)
  _check(optimizers.momentum(0.3, 0.8, weight_decay=0.1, nesterov=nesterov), rule)


def test_plain_sgd_has_no_memory():
  _check(optimizers.sgd(0.3), lambda theta, g, memory, t: theta - 0.3 * g)
  assert not jax.tree.leaves(optimizers.sgd(0.3).init(PARAMS))


def test_adamw_with_schedule():
  def rate(t):
    return 0.1 / (t + 1)

  def rule(theta, g, memory, t):
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    v = memory["v"] = 0.98 * memory.get("v", 0) + 0.02 * g * g
    m, v = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.98 ** (t + 1))
    return theta - rate(t) * (m / (np.sqrt(v + 1e-3) + 1e-2) + 0.2 * theta)

  tx = optimizers.adamw(rate, eps=1e-2, eps_root=1e-3, weight_decay=0.2, clip_norm=None)
  _check(tx, rule)


def test_adamw_defaults_are_those_of_the_paper():
  def rule(theta, g, memory, t):
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    v = memory["v"] = 0.98 * memory.get("v", 0) + 0.02 * g * g
    m, v = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.98 ** (t + 1))
    return theta - 6e-4 * (m / (np.sqrt(v) + 1e-6) + 1e-2 * theta)

  small = [jax.tree.map(lambda g: g * 0.01, g) for g in GRADS]  # below the clipping norm
  _check(optimizers.adamw(6e-4), rule, small)


def test_lion():
  def rule(theta, g, memory, t):
    m = memory.get("m", np.zeros_like(theta))
    memory["m"] = 0.99 * m + 0.01 * g
    return theta - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * theta)

  _check(optimizers.lion(0.01), rule)


@pytest.mark.parametrize("make", [optimizers.sgd, optimizers.adamw, optimizers.lion])
def test_clipping_scales_by_the_global_norm(make):
  clipped = make(0.1, clip_norm=0.5)
  by_hand = [
    jax.tree.map(lambda x, g=g: x * min(1, 0.5 / float(optax.tree.norm(g))), g) for g in GRADS
  ]
  got, want = _run(clipped), _run(make(0.1, clip_norm=None), by_hand)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@pytest.mark.parametrize("make", [optimizers.sgd, optimizers.adamw, optimizers.lion])
def test_decay_mask_spares_stacked_norm_scales_and_biases(make):
  params = {
    "embedding": jnp.ones((4, 2)),
    "layers": {"mlp_norm": {"scale": jnp.ones((3, 2))}, "mlp": {"kernel": jnp.ones((3, 2, 2))}},
    "head": {"bias": jnp.ones((2, 2)), "kernel": jnp.ones(2)},
  }
  zeros = jax.tree.map(jnp.zeros_like, params)

  def moved(mask):
    tx = make(0.1, weight_decay=0.5, decay_mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    return jax.tree.map(lambda u: bool(np.any(np.asarray(u) != 0)), updates)

  assert moved("matrices") == {
    "embedding": True,
    "layers": {"mlp_norm": {"scale": False}, "mlp": {"kernel": True}},
    "head": {"bias": False, "kernel": False},
  }
  assert all(jax.tree.leaves(moved("all")))
  with pytest.raises(ValueError, match="decay_mask='none' must be 'all' or 'matrices'"):
    make(0.1, decay_mask="none")


def test_learning_rate_of_the_160m_run_at_published_steps():
  schedule = optimizers.warmup_cosine(6e-4, 2_000, 100_000, 6e-5)
  assert float(schedule(0)) == 0
  assert float(schedule(1)) == pytest.approx(6e-4 / 2_000, rel=1e-6)
  assert float(schedule(2_000)) == pytest.approx(6e-4, rel=1e-6)
  assert float(schedule(51_000)) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-5)
  assert float(schedule(100_000)) == pytest.approx(6e-5, rel=1e-5)
  for t in (500, 2_001, 20_000, 99_999):
    cosine = 6e-5 + (6e-4 - 6e-5) / 2 * (1 + np.cos(np.pi * (t - 2_000) / 98_000))
    assert float(schedule(t)) == pytest.approx(6e-4 * t / 2_000 if t < 2_000 else cosine, rel=1e-5)
  assert float(schedule(200_000)) == pytest.approx(6e-5, rel=1e-5)


def test_linear_decay_at_published_steps():
  schedule = optimizers.warmup_linear(3e-4, 20_000, 500_000)
  for step, want in {0: 0, 10_000: 1.5e-4, 20_000: 3e-4, 260_000: 1.5e-4, 500_000: 0,
                     600_000: 0}.items():
    assert float(schedule(step)) == pytest.approx(want, rel=1e-5, abs=1e-12)
  assert float(optimizers.warmup_linear(0.2, 0, 10, 0.1)(5)) == pytest.approx(0.15)


def test_schedule_without_warmup_starts_at_the_peak():
  schedule = optimizers.warmup_cosine(0.2, 0, 10)
  assert float(schedule(0)) == pytest.approx(0.2)
  assert float(schedule(10)) == pytest.approx(0, abs=1e-9)
  assert float(optimizers.constant(0.3)(12345)) == pytest.approx(0.3)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: optimizers.sgd(0.0), "sgd.learning_rate=0.0 must be a number above 0, or"),
    (lambda: optimizers.adamw(-1.0), "optim.adamw.learning_rate=-1.0 must be a number above 0"),
    (lambda: optimizers.lion(float("nan")), "lion.learning_rate=nan must be a number above 0"),
    (lambda: optimizers.sgd(0.1, momentum=1.0), "momentum=1.0 must be a number of at least 0 and"),
    (lambda: optimizers.sgd(0.1, nesterov=True), "nesterov=True needs a momentum"),
    (lambda: optimizers.sgd(0.1, weight_decay=-1.0), "weight_decay=-1.0 must be a number of"),
    (lambda: optimizers.adamw(0.1, clip_norm=0.0), "clip_norm=0.0 must be a number above 0"),
    (lambda: optimizers.adamw(0.1, b2=1.0), "adamw.b2=1.0 must be a number of at"),
    (lambda: optimizers.adamw(0.1, eps=0.0), "eps=0 and eps_root=0 divide by 0"),
    (lambda: optimizers.constant(0.0), "optim.constant.value=0.0 must be a number above 0"),
    (lambda: optimizers.warmup_cosine(0.0, 1, 2), "peak=0.0 must be a number above 0"),
    (lambda: optimizers.warmup_cosine(1.0, 5, 5), r"warmup_steps=5 must be in \[0, total_steps="),
    (lambda: optimizers.warmup_linear(0.0, 1, 2), "optim.warmup_linear.peak=0.0 must be"),
    (lambda: optimizers.warmup_cosine(1.0, 1, 5, 2.0), r"end=2.0 must be in \[0, peak=1.0\]"),
  ],
)
def test_values_out_of_range_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
