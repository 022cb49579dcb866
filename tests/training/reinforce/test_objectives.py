"""The losses against NumPy and torch on the same logits, and their gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.training.reinforce import objectives
from lmops_jax.training.reinforce.advantages import whiten
from lmops_jax.training.reinforce.objectives import (
  clipped_policy_loss,
  clipped_share,
  clipped_value_loss,
  mean_weights,
  reference_penalty,
)

B, R, V = 3, 4, 6


@pytest.fixture
def wide():
  with jax.enable_x64(True):
    yield


def _drawn(seed=0):
  rng = np.random.default_rng(seed)
  logits, old, reference = rng.normal(size=(3, B, R, V))
  tokens = rng.integers(0, V, (B, R))
  mask = (np.arange(R)[None] <= np.array([3, 1, 2])[:, None]).astype(float)
  advantages, values, old_values, returns = rng.normal(size=(4, B, R))
  return dict(logits=logits, old=_taken(old, tokens), reference=_taken(reference, tokens),
              tokens=tokens, mask=mask, advantages=advantages, values=values,
              old_values=old_values, returns=returns)


def _taken(logits, tokens):
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]


def _ppo(logits, values, d):
  """The whole objective of PPO from logits, as the algorithms assemble it."""
  log_probs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), jnp.asarray(d["tokens"])[..., None], -1)[..., 0]
  weights = mean_weights(jnp.asarray(d["mask"]))
  policy = jnp.sum(weights * clipped_policy_loss(log_probs, d["old"], d["advantages"]))
  value = jnp.sum(weights * clipped_value_loss(values, d["old_values"], d["returns"]))
  return policy + 2.3 * value - 0.01 * jnp.sum(weights * objectives.entropy(logits))


def _grpo(logits, d, over, low, high):
  log_probs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), jnp.asarray(d["tokens"])[..., None], -1)[..., 0]
  losses = clipped_policy_loss(log_probs, d["old"], d["advantages"], low, high)
  losses += 0.04 * reference_penalty(log_probs, d["reference"])
  return jnp.sum(mean_weights(jnp.asarray(d["mask"]), over) * losses)


def test_ppo_is_what_numpy_computes(wide):
  d = _drawn()
  log_probs = _taken(d["logits"], d["tokens"])
  total = {"policy": 0.0, "value": 0.0, "entropy": 0.0}
  for b, t in np.argwhere(d["mask"]):
    ratio, advantage = np.exp(log_probs[b, t] - d["old"][b, t]), d["advantages"][b, t]
    total["policy"] += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
    old = d["old_values"][b, t]
    near = min(max(d["values"][b, t], old - 0.2), old + 0.2)
    total["value"] += 0.5 * max((d["values"][b, t] - d["returns"][b, t]) ** 2,
                                (near - d["returns"][b, t]) ** 2)
    p = np.exp(d["logits"][b, t]) / np.exp(d["logits"][b, t]).sum()
    total["entropy"] -= (p * np.log(p)).sum()
  want = (total["policy"] + 2.3 * total["value"] - 0.01 * total["entropy"]) / d["mask"].sum()
  assert float(_ppo(d["logits"], d["values"], d)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("over", ["token", "sequence"])
def test_losses_and_gradients_are_those_of_torch(wide, over):
  """Torch differentiates the written objective on its own."""
  torch = pytest.importorskip("torch")
  d = _drawn(1)
  t = {name: torch.tensor(value) for name, value in d.items()}
  logits = t["logits"].requires_grad_()
  log_probs = torch.log_softmax(logits, -1).gather(-1, t["tokens"][..., None])[..., 0]
  ratio = torch.exp(log_probs - t["old"])
  losses = -torch.minimum(
    t["advantages"] * ratio, t["advantages"] * ratio.clamp(1 - 0.2, 1 + 0.28))
  q = torch.exp(t["reference"] - log_probs)
  losses = losses + 0.04 * (q - torch.log(q) - 1)
  if over == "token":
    loss = (losses * t["mask"]).sum() / t["mask"].sum()
  else:
    loss = ((losses * t["mask"]).sum(1) / t["mask"].sum(1)).mean()
  loss.backward()
  got, grad = jax.value_and_grad(_grpo)(jnp.asarray(d["logits"]), d, over, 0.2, 0.28)
  assert float(got) == pytest.approx(loss.item(), abs=1e-9)
  np.testing.assert_allclose(grad, logits.grad.numpy(), atol=1e-9)


def test_gradients_are_those_of_finite_differences(wide):
  d = _drawn(2)
  loss = jax.jit(lambda logits, values: _ppo(logits, values, d))
  grads = jax.grad(loss, argnums=(0, 1))(jnp.asarray(d["logits"]), jnp.asarray(d["values"]))
  for name, grad in zip(("logits", "values"), grads):
    for place in np.ndindex(grad.shape):
      moved = []
      for by in (1e-6, -1e-6):
        there = d[name].copy()
        there[place] += by
        args = {"logits": d["logits"], "values": d["values"], name: there}
        moved.append(float(loss(args["logits"], args["values"])))
      assert float(grad[place]) == pytest.approx((moved[0] - moved[1]) / 2e-6, abs=1e-7)


def test_before_the_first_update_the_gradient_is_the_plain_policy_gradient(wide):
  """The loss of whitened advantages is 0 there, and its gradient is not."""
  d = _drawn(3)
  advantages = whiten(jnp.asarray(d["advantages"]), d["mask"])
  weights = mean_weights(jnp.asarray(d["mask"]))
  old = _taken(d["logits"], d["tokens"])

  def chosen(logits):
    return jnp.take_along_axis(
      jax.nn.log_softmax(logits), jnp.asarray(d["tokens"])[..., None], -1)[..., 0]

  def clipped(logits):
    return jnp.sum(weights * clipped_policy_loss(chosen(logits), old, advantages))

  def plain(logits):
    return -jnp.sum(weights * advantages * chosen(logits))

  logits = jnp.asarray(d["logits"])
  assert float(clipped(logits)) == pytest.approx(0, abs=1e-9)
  grad = jax.grad(clipped)(logits)
  np.testing.assert_allclose(grad, jax.grad(plain)(logits), atol=1e-12)
  assert np.abs(grad).max() > 1e-2


@pytest.mark.parametrize("ratio, advantage, loss, flows", [
  (1.5, 1.0, -1.2, False), (0.5, -1.0, 0.8, False), (1.5, -1.0, 1.5, True), (0.5, 1.0, -0.5, True),
  (1.5, 0.0, 0.0, False), (1.1, 1.0, -1.1, True),
])
def test_the_gradient_is_cut_off_only_where_it_leads_further_away(ratio, advantage, loss, flows):
  def of(log_prob):
    return clipped_policy_loss(log_prob, 0.0, advantage)

  got, grad = jax.value_and_grad(of)(jnp.log(ratio))
  assert float(got) == pytest.approx(loss, abs=1e-6)
  assert (abs(float(grad)) > 0.1) == flows
  if advantage:
    assert bool(clipped_share(jnp.log(ratio), 0.0, jnp.asarray(advantage))) != flows


def test_the_upper_end_of_the_clip_may_be_further_away():
  assert float(clipped_policy_loss(jnp.log(1.26), 0.0, 1.0, 0.2, 0.28)) == pytest.approx(-1.26)
  assert float(clipped_policy_loss(jnp.log(1.5), 0.0, 1.0, 0.2, 0.28)) == pytest.approx(-1.28)


def test_values_near_the_old_ones_have_the_plain_loss():
  old = jnp.array([[0.0, 1.0]])
  values, returns = old + jnp.array([[0.15, -0.19]]), jnp.array([[2.0, -1.0]])
  np.testing.assert_allclose(
    clipped_value_loss(values, old, returns), 0.5 * (values - returns) ** 2, rtol=1e-6)
  far = clipped_value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]))
  np.testing.assert_allclose(far, [0.5 * 0.8**2], rtol=1e-6)
  np.testing.assert_allclose(
    clipped_value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), None), [0.0])


def test_k3_estimates_one_divergence_and_its_gradient_descends_the_other(wide):
  """Exact sums over a vocabulary take the place of samples."""
  rng = np.random.default_rng(4)
  logits, reference = rng.normal(size=(2, V))
  p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, reference))
  values = reference_penalty(jnp.log(p), jnp.log(q))
  assert (np.asarray(values) >= 0).all()
  assert float(p @ values) == pytest.approx(float(p @ np.log(p / q)), abs=1e-12)

  def sampled(logits):  # the samples' probabilities are no function of the logits
    return jnp.sum(p * reference_penalty(jax.nn.log_softmax(logits), jnp.log(q)))

  def forward(logits):
    return jnp.sum(q * (jnp.log(q) - jax.nn.log_softmax(logits)))

  np.testing.assert_allclose(
    jax.grad(sampled)(jnp.asarray(logits)), jax.grad(forward)(jnp.asarray(logits)), atol=1e-12)


def test_the_two_means(wide):
  mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], float)
  np.testing.assert_allclose(mean_weights(mask), mask / 4)
  np.testing.assert_allclose(
    mean_weights(mask, "sequence"), [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0]])
