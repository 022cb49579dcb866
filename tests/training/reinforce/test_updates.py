"""The learners: one step by hand, meshes, freezing, resume, and problems with a known answer."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.training import loop
from lmops_jax.training.reinforce import networks, updates
from lmops_jax.training.reinforce.algorithms import GRPO, PPO
from lmops_jax.training.reinforce.kl_control import AdaptiveKL, FixedKL
from lmops_jax.training.reinforce.rollouts import Answer, Question, Rollouts
from lmops_jax.training.sources import Batches
from tests.training.reinforce import setup
from tests.training.reinforce.setup import MODEL, V

QUIET = loop.Records(tensorboard=False, log_every=1)
SGD = optax.sgd(0.05)
ADAM = optax.adamw(3e-2, weight_decay=0.1)
learner_of = functools.cache(updates.learner)  # runs of one learner share the compiled step


@pytest.fixture(scope="module")
def batch():
  found = setup.rollouts(group_size=4).batch(0, setup.params(1))
  return found | {"reference": found["reference"] - np.float32(0.1)}


def _train(directory, algorithm, source, num_steps, optimizer=ADAM, partitioner=None, **records):
  return loop.train(
    learner_of(algorithm, MODEL, optimizer, partitioner), source, num_steps, 0, directory,
    partitioner, records=dataclasses.replace(QUIET, **records), initial_params=setup.params(1))


def _by_hand(params, batch, values_of):
  """The objective of PPO written out on whole logits and loops, for one step from `params`."""
  b, r = batch["targets"].shape
  mask, beta = np.asarray(batch["loss_mask"], float), 0.2
  kl = (batch["log_probs"] - batch["reference"]).astype(float)
  old = np.asarray(jax.jit(values_of)(params), float)
  advantages = np.zeros((b, r))
  for row in range(b):
    end = int(mask[row].sum()) - 1
    later = after = 0.0
    for t in range(end, -1, -1):
      reward = -beta * kl[row, t] + (batch["score"][row] if t == end else 0)
      later = reward + after - old[row, t] + 0.95 * later
      advantages[row, t], after = later, old[row, t]
  returns = advantages + old
  real = advantages[mask > 0]
  whitened = (advantages - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8)

  def loss(params):
    logits = MODEL.apply(
      {"params": params["policy"]}, batch["tokens"], batch["positions"], batch["segment_ids"],
      method="logits")[:, -r:]
    log_probs = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    ratio = jnp.exp(log_probs - batch["log_probs"])
    policy = -jnp.minimum(whitened * ratio, whitened * jnp.clip(ratio, 0.8, 1.2))
    value = 0.5 * (values_of(params) - returns) ** 2  # nothing is clipped before the first update
    return jnp.sum((policy + 2.3 * value) * mask) / mask.sum()

  return loss


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_ppo_is_the_one_written_out_by_hand(tmp_path, batch, shared):
  algorithm = PPO(num_epochs=1, shared_trunk=shared)
  learner = learner_of(algorithm, MODEL, SGD)
  state = jax.jit(learner.init)(jax.random.key(0), setup.params(1))
  state = nn.unbox(state)
  nets = networks.Networks(MODEL, algorithm.values)
  loss = _by_hand(state.params, batch, lambda params: nets.value(params, batch))
  want, grads = jax.jit(jax.value_and_grad(loss))(state.params)
  inputs = {name: value for name, value in batch.items() if name != "example_id"}
  after, sums = jax.jit(learner.step)(state, inputs, jax.random.key(1))
  assert float(sums["objective"]) == pytest.approx(float(want), rel=1e-5, abs=1e-6)
  jax.tree.map(lambda new, old, grad: np.testing.assert_allclose(
    new, old - 0.05 * grad, rtol=1e-5, atol=1e-6), after.params, state.params, grads)
  assert float(sums["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)


def test_the_value_model_begins_as_the_policy_and_apart_from_it():
  learner = learner_of(PPO(num_epochs=1), MODEL, SGD)
  state = nn.unbox(jax.jit(learner.init)(jax.random.key(0), setup.params(1)))
  policy, trunk = state.params["policy"], state.params["value"]["trunk"]
  np.testing.assert_array_equal(trunk["embedding"], policy["embedding"])
  assert set(trunk) == set(policy) - {"unembedding"}
  jax.tree.map(np.testing.assert_array_equal, learner.params(state), setup.params(1))


@pytest.mark.parametrize("algorithm, meshes", [
  (GRPO(group_size=4, mean="token", kl=AdaptiveKL()), [(8, 1, 1)]),
  pytest.param(PPO(num_epochs=2, num_minibatches=2), [(8, 1, 1), (2, 2, 2)],
               marks=pytest.mark.slow),
])
def test_meshes_and_micro_batches_give_the_numbers_of_one_device(
    tmp_path, batch, algorithm, meshes):
  rows = {name: np.concatenate([value] * 2) for name, value in batch.items()}
  source = Batches(lambda step: rows)
  want = _train(tmp_path / "one", algorithm, source, 2)
  split = dataclasses.replace(algorithm, accumulate=2)
  for sizes in meshes:
    got = _train(tmp_path / str(sizes), split if sizes[0] == 2 else algorithm, source, 2,
                 partitioner=MeshConfig(*sizes).build())
    for one, other in zip(got.history, want.history, strict=True):
      assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 got.state.params, want.state.params)


def test_only_the_top_blocks_learn():
  """Clipping counts their gradients alone, and weight decay passes the frozen block over."""
  params = {"policy": setup.params(1), "value": {"layers": {"w": jnp.ones((2, 3))}}}
  grads = jax.tree.map(jnp.ones_like, params)
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.5))
  optimizer = networks.top_blocks_only(inner, 1)
  updates_, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  for update in jax.tree.leaves(updates_["policy"]["layers"]):
    assert not np.any(update[0]) and np.all(update[1])
  for name in ("embedding", "final_norm"):
    assert all(np.all(leaf) for leaf in jax.tree.leaves(updates_["policy"][name]))
  assert np.all(updates_["value"]["layers"]["w"])

  grads["policy"]["layers"] = jax.tree.map(
    lambda g: g.at[0].set(0), grads["policy"]["layers"])
  want, _ = jax.jit(inner.update)(grads, inner.init(params), params)
  np.testing.assert_allclose(
    updates_["policy"]["embedding"], want["policy"]["embedding"], rtol=1e-6)
  with pytest.raises(ValueError, match="num_unfrozen_blocks=3 is more than the 2 blocks"):
    updates.learner(PPO(num_unfrozen_blocks=3), MODEL, SGD)


@pytest.mark.parametrize("learned", [True, False])
def test_ends_that_the_policy_did_not_choose_may_be_left_out(learned):
  mask = jnp.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]], jnp.float32)
  batch = {"score": jnp.array([1.0, 2.0, 5.0, 5.0]), "loss_mask": mask,
           "is_cut": jnp.array([1.0, 0.0, 0.0, 1.0])}
  rows, figures = GRPO(group_size=2, learn_cut_ends=learned).prepare(None, None, batch, 0.1)
  want = mask if learned else mask - jnp.array([[0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]])
  np.testing.assert_array_equal(rows["policy_mask"], want)
  assert float(figures["level_groups"]) == 0.5
  np.testing.assert_allclose(rows["advantages"][:, 0], [-0.70701, 0.70701, 0, 0], atol=1e-4)


def test_batches_that_do_not_split_are_refused(tmp_path, batch):
  for algorithm, said in (
      (PPO(num_minibatches=3), "8 rollouts does not split into num_minibatches=3"),
      (GRPO(group_size=3), "does not split into groups of group_size=3")):
    with pytest.raises(ValueError, match=said):
      _train(tmp_path, algorithm, Batches(lambda step: batch), 1)


class _Interrupt(Exception):
  pass


@pytest.mark.parametrize("algorithm, stop_before", [
  (GRPO(group_size=4, kl=AdaptiveKL(horizon=50.0)), 1),
  pytest.param(PPO(num_epochs=2, num_minibatches=2, kl=AdaptiveKL(horizon=50.0)), 1,
               marks=pytest.mark.slow),
  pytest.param(PPO(num_epochs=2, num_minibatches=2, kl=AdaptiveKL(horizon=50.0)), 3,
               marks=pytest.mark.slow),
  pytest.param(GRPO(group_size=4), 2, marks=pytest.mark.slow),
])
def test_resume_between_rollouts_gives_the_same_bits(tmp_path, algorithm, stop_before):
  """The journal included; the batch that was asked for again is made once."""
  made = []

  def source(journal, stop=None):
    def respond(params, prompts, seed):
      if len(made) == stop:
        raise _Interrupt
      made.append(seed)
      return setup.respond(params, prompts, seed)
    return setup.rollouts(
      setup.params(1), respond=respond, group_size=algorithm.group_size, journal=journal)

  def run(name, stop=None):
    made.clear()
    return _train(tmp_path / name, algorithm, source(tmp_path / name / "r.jsonl", stop), 4,
                  checkpoint_every=2)

  want = run("whole")
  with pytest.raises(_Interrupt):
    run("cut", stop_before)
  got = run("cut")
  assert len(made) == 4 - stop_before // 2 * 2
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)
  assert got.history == want.history
  coefficient = algorithm.kl.coefficient
  for record in want.history:
    assert record["coefficient"] == pytest.approx(coefficient, rel=1e-6)
    coefficient = float(algorithm.kl.after(coefficient, record["kl"], 8))
  assert float(want.state.coefficient) == pytest.approx(coefficient, rel=1e-6)
  texts = [(tmp_path / name / "r.jsonl").read_text() for name in ("cut", "whole")]
  assert texts[0] == texts[1]
  steps = [json.loads(line)["step"] for line in texts[0].splitlines()]
  assert steps == sorted([0, 1, 2, 3] * 8)
  run("cut")
  assert not made, "a finished run writes no rollouts"
  assert want.history[0]["kl"] == 0.0 != want.history[1]["kl"], "the first policy pays nothing"
  epochs = algorithm.num_epochs
  algorithm = dataclasses.replace(algorithm, num_epochs=7)
  with pytest.raises(ValueError, match=f"num_epochs={epochs} and this one has num_epochs=7"):
    run("cut")


# ------------------------------------------------------------------ a bandit with a known optimum

ARMS = np.array([0.3, -0.5, 1.0, 0.0, 0.4, 0.2, -0.1, 0.7, 0.5, -0.3, 0.1, 0.6])


def _pull(params, prompts, seed):
  """One token an answer, at even distances of the policy's distribution function."""
  logits = np.asarray(setup._first_logits(
    params, np.array([[*prompts[0], 0, 0, 0]], np.int32), np.zeros(1, np.int32)), np.float64)[0]
  p = np.exp(logits - logits.max())
  start = np.random.default_rng(seed).uniform()
  count = NUM_PULLS // len(prompts)
  arms = np.searchsorted(np.cumsum(p / p.sum()), (np.arange(NUM_PULLS) + start) / NUM_PULLS)
  arms = np.minimum(arms, V - 1).reshape(len(prompts), count)
  return [[Answer(str(arm), [int(arm)], False) for arm in row] for row in arms]


NUM_PULLS = 512


def _bandit(directory, algorithm, num_steps=150):
  questions = [Question(i, "pull", [2]) for i in range(NUM_PULLS)]
  source = Rollouts(
    MODEL, setup.params(1), questions, _pull,
    lambda rollouts: ARMS[[int(r.response) for r in rollouts]], batch_size=NUM_PULLS, seed=0,
    prompt_length=1, response_length=1, end_id=setup.END, group_size=algorithm.group_size)
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, num_steps * algorithm.num_epochs))
  result = _train(directory, algorithm, source, num_steps, optimizer, log_every=num_steps)
  token = jnp.array([[2]])
  return [np.asarray(jax.nn.softmax(MODEL.apply({"params": p}, token, method="logits")[0, 0]))
          for p in (result.state.params["policy"], setup.params(1))]


@pytest.mark.slow
def test_ppo_finds_the_regularised_optimum_of_a_bandit(tmp_path):
  """`pi = reference exp(reward / beta)`, normalised."""
  algorithm = PPO(num_epochs=2, kl=FixedKL(0.5), whiten=False, value_clip=None)
  got, reference = _bandit(tmp_path, algorithm)
  want = reference * np.exp(ARMS / 0.5)
  want /= want.sum()
  assert np.abs(reference - want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=0.01)


@pytest.mark.slow
def test_grpo_finds_the_optimum_of_the_other_divergence(tmp_path):
  """Its penalty descends KL(reference||policy), so `pi = beta reference / (constant - reward)`."""
  size, beta = NUM_PULLS, 0.5
  algorithm = GRPO(group_size=size, kl=FixedKL(beta), by_spread=False)
  got, reference = _bandit(tmp_path, algorithm)
  rewards = ARMS * (1 - 1 / size)  # a response's own score is in its baseline

  def sums_to(constant):
    return (beta * reference / (constant - rewards)).sum()

  low, high = rewards.max() + 1e-9, rewards.max() + 100
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if sums_to(middle) > 1 else (low, middle)
  want = beta * reference / (low - rewards)
  assert np.abs(reference - want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=0.01)
