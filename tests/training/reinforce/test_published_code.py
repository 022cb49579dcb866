"""What Promptist's code does otherwise, each behind a setting, against it written out by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.models.heads import TokenValues
from lmops_jax.training.reinforce import advantages, networks, updates
from lmops_jax.training.reinforce.algorithms import PPO
from lmops_jax.training.reinforce.kl_control import AdaptiveKL
from tests.training.reinforce import setup
from tests.training.reinforce.setup import END, MODEL

LAYERS = MODEL.config.num_layers
SGD = optax.sgd(0.05)


@pytest.fixture(scope="module")
def batch():
  return setup.rollouts(group_size=4).batch(0, setup.params(1))


def _step(algorithm, batch):
  learner = updates.learner(algorithm, MODEL, SGD)
  state = nn.unbox(jax.jit(learner.init)(jax.random.key(0), setup.params(1)))
  inputs = {name: value for name, value in batch.items() if name != "example_id"}
  return jax.jit(learner.step)(state, inputs, jax.random.key(1))


def test_late_values_are_of_the_text_that_ends_in_the_token(batch):
  """Of whole rows without padding; the last slot, which `tokens` lacks, among them."""
  nets = networks.Networks(MODEL, "separate")
  params = nn.unbox(nets.init(jax.random.key(0), setup.params(1)))
  evaluate = jax.jit(nets.evaluate, static_argnums=2)
  late, early = (evaluate(params, batch, of) for of in (True, False))
  np.testing.assert_array_equal(late.log_probs, early.log_probs)
  values = jax.jit(lambda tokens: TokenValues(MODEL.config).apply(
    {"params": params["value"]}, tokens))
  full = 0
  for row, mask in enumerate(batch["loss_mask"]):
    length, first = int(mask.sum()), int(np.argmax(batch["segment_ids"][row]))
    ids = [*batch["tokens"][row, first : setup.P], *batch["targets"][row, :length]]
    alone = values(np.array([ids + [END] * (setup.P + mask.size - len(ids))], np.int32))[0]
    start = setup.P - first
    np.testing.assert_allclose(
      late.values[row, :length], alone[start : start + length], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      early.values[row, :length], alone[start - 1 : start + length - 1], rtol=1e-4, atol=1e-5)
    full += length == mask.size
  assert full, "no response fills its room"


def test_late_values_are_those_that_the_loss_reads(batch):
  """Before the first update nothing is clipped in the policy's loss, so only the values' moves."""
  _, late = _step(PPO(num_epochs=1, late_values=True, value_clip=None), batch)
  _, early = _step(PPO(num_epochs=1, value_clip=None), batch)
  nets = networks.Networks(MODEL, "separate")
  params = nn.unbox(nets.init(jax.random.key(0), setup.params(1)))
  rows, _ = PPO().prepare(nets, params, batch, jnp.float32(0.2))
  mask = batch["loss_mask"]
  for sums, of in ((late, True), (early, False)):
    values = nets.evaluate(params, batch, of).values
    want = (0.5 * np.square(values - rows["returns"]) * mask).sum() / mask.sum()
    assert float(sums["value_loss"]) == pytest.approx(float(want), rel=1e-4)
  assert float(late["value_loss"]) != pytest.approx(float(early["value_loss"]), rel=1e-3)
  assert float(late["policy_loss"]) == pytest.approx(float(early["policy_loss"]), abs=1e-6)


def test_whitening_may_count_what_stands_behind_ends():
  """As with rows that are filled up with 0 to the longest one, not to the room that there is."""
  values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  mask = (np.arange(6)[None] < np.array([[1], [3], [4], [2]])).astype(np.float32)
  filled = (values * mask)[:, :4].astype(float)
  want = (filled - filled.mean()) / np.sqrt(filled.var(ddof=1) + 1e-8)
  got = advantages.whiten(jnp.asarray(values * mask), advantages.with_padding(jnp.asarray(mask)))
  np.testing.assert_allclose(got[:, :4], want, rtol=1e-5, atol=1e-6)
  assert not np.any(got[:, 4:])


def test_ppo_whitens_over_what_it_is_told(batch):
  nets = networks.Networks(MODEL, "separate")
  params = nn.unbox(nets.init(jax.random.key(0), setup.params(1)))
  plain, padded, raw = (
    np.asarray(PPO(**settings).prepare(nets, params, batch, jnp.float32(0.2))[0]["advantages"])
    for settings in ({}, {"whiten_padding": True}, {"whiten": False}))
  counts = batch["loss_mask"] > 0
  columns = counts.any(axis=0)
  filled = np.where(counts, raw, 0)[:, columns].astype(float)
  want = (filled - filled.mean()) / np.sqrt(filled.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(padded[:, columns][counts[:, columns]], want[counts[:, columns]],
                             rtol=1e-4, atol=1e-5)
  assert np.abs(plain - padded)[counts].max() > 1e-2


def test_a_coefficient_may_follow_what_each_update_gained(batch):
  """Every optimizer step tells it once, of all places of its rows, and not of the reference."""
  algorithm = PPO(num_epochs=2, num_minibatches=2, accumulate=2, kl=AdaptiveKL(
    target=0.045, horizon=50.0, follows="updates"))
  state, _ = _step(algorithm, batch)
  learner = updates.learner(algorithm, MODEL, SGD)
  state_ = nn.unbox(jax.jit(learner.init)(jax.random.key(0), setup.params(1)))
  nets = networks.Networks(MODEL, algorithm.values)
  rows, _ = algorithm.prepare(nets, state_.params, batch, state_.coefficient)
  order = updates._order(
    jax.random.key(1), 8, algorithm.num_epochs, algorithm.num_minibatches)
  params, coefficient, errors = state_.params, algorithm.kl.coefficient, []
  nats = jax.jit(functools.partial(networks.log_probs, MODEL))
  gradient = jax.jit(jax.grad(
    lambda params, part: algorithm.objective(nets, params, part, state_.coefficient)[0]))
  for index in np.asarray(order):
    part = algorithm.weigh({name: value[index] for name, value in rows.items()})
    found = nats(params["policy"], part)
    gain = float((found - part["log_probs"]).sum() / len(index))
    errors.append(np.clip(gain / algorithm.kl.target - 1, -0.2, 0.2))
    coefficient *= 1 + errors[-1] * len(index) / algorithm.kl.horizon
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient(params, part))
  assert errors[0] == -0.2 and np.abs(errors).min() < 0.15, "every change is clipped"
  assert float(state.coefficient) == pytest.approx(coefficient, rel=1e-5)


def test_a_reference_on_the_live_trunk_drifts_with_the_embeddings():
  policy, reference = setup.params(1), setup.params()
  source = setup.rollouts(reference=reference, live_blocks=1)
  batch = source.batch(0, policy)
  plain = setup.rollouts(reference=reference).batch(0, policy)
  mixed = {**policy, "final_norm": reference["final_norm"],
           "layers": jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), policy["layers"],
                                  reference["layers"])}
  states = MODEL.apply({"params": mixed}, batch["tokens"], batch["positions"],
                       batch["segment_ids"])[:, -batch["targets"].shape[1]:]
  logits = states @ reference["unembedding"]
  want = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
  counts = batch["loss_mask"] > 0
  np.testing.assert_allclose(batch["reference"][counts], want[counts], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(batch["log_probs"], plain["log_probs"], rtol=1e-5, atol=1e-5)
  assert np.abs(batch["reference"] - plain["reference"])[counts].max() > 1e-2
  same = setup.rollouts(reference=policy, live_blocks=1).batch(0, policy)
  np.testing.assert_array_equal(same["reference"], same["log_probs"])


def test_a_live_trunk_needs_a_number_of_blocks():
  with pytest.raises(ValueError, match="num_unfrozen_blocks=None says of none how many"):
    updates.learner(PPO(live_trunk=True), MODEL, optax.sgd(0.1))
  assert updates.live_blocks(PPO(live_trunk=True, num_unfrozen_blocks=1)) == 1
  assert updates.live_blocks(PPO(num_unfrozen_blocks=LAYERS)) is None
