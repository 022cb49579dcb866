"""Replaced-token detection: its draws, both losses, its gradients, and that it learns."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.encoders import TextEncoderConfig, encoder_params
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained.text_encoders import without_heads
from lmops_jax.training.learner import supervised
from lmops_jax.training.optimizers import sgd
from lmops_jax.training.replaced_tokens import (
  ReplacedTokenLosses,
  ReplacedTokens,
  chosen_positions,
  generator_params,
)

VOCAB, MASK, START, LENGTH = 23, 2, 1, 20
_ENCODER = dict(
  vocab_size=VOCAB, num_layers=1, num_heads=2, max_length=LENGTH, causal=False, norm="layer",
  norm_placement="post", final_norm=False, positions="learned", gated_mlp=False, qkv_bias=True,
  out_bias=True, mlp_bias=True, embedding_norm=True, activation="gelu", tied_embeddings=True,
  initialization="xavier",
)
GENERATOR = TransformerConfig(
  width=16, mlp_width=24, embedding_width=24, narrow_embeddings=True, head_transform=True,
  unembedding_bias=True, **_ENCODER)
DISCRIMINATOR = TransformerConfig(width=24, mlp_width=48, detector=True, **_ENCODER)
CONFIG = ReplacedTokens(generator=GENERATOR, discriminator=DISCRIMINATOR)
LOSSES = ReplacedTokenLosses(CONFIG, MASK, never_masked=(0, START))


def _batch(rows=5, seed=0):
  """Rows of unequal lengths behind a start, some with two segments."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, VOCAB, (rows, LENGTH)).astype(np.int32)
  tokens[:, 0] = START
  lengths = np.linspace(4, LENGTH, rows).astype(int)
  segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
  segments[-1, 12:] = 2
  positions = np.where(segments == 2, np.arange(LENGTH) - 12, np.arange(LENGTH))
  return {
    "tokens": np.where(segments > 0, tokens, 0), "segment_ids": segments,
    "positions": positions.astype(np.int32), "key": jax.random.split(jax.random.key(7), rows)}


@jax.jit
def _run(params, batch):
  return LOSSES.parts(params, batch), LOSSES.corrupted(params, batch), LOSSES(params, batch)


@pytest.fixture(scope="module")
def params():
  drawn = jax.jit(lambda key: unboxed(LOSSES.init_params(key)))(jax.random.key(0))
  shift = iter(np.random.default_rng(1).normal(0, 0.2, (200, 1)))
  return jax.tree.map(lambda x: x + jnp.float32(next(shift)[0]), drawn)


@pytest.fixture(scope="module")
def found(params):
  batch = _batch()
  *found, losses = jax.tree.map(np.asarray, _run(params, batch))
  return found, losses, batch


def test_the_share_of_each_row_is_masked_and_nothing_that_must_not(found):
  (parts, corrupted), _, batch = found
  real = batch["segment_ids"] != 0
  maskable = real & (batch["tokens"] != START)
  for row, num in enumerate(maskable.sum(1)):
    chosen = corrupted.index[row][corrupted.counts[row]]
    assert len(chosen) == len(set(chosen)) == math.ceil(num * 15 / 100) == parts.num_masked[row]
    assert maskable[row][chosen].all()
    is_chosen = np.isin(np.arange(LENGTH), chosen)
    np.testing.assert_array_equal(
      corrupted.masked[row], np.where(is_chosen, MASK, batch["tokens"][row]))
    np.testing.assert_array_equal(  # all else stays
      corrupted.tokens[row][~is_chosen], batch["tokens"][row][~is_chosen])


def test_the_share_is_of_the_number_as_it_is_written():
  for num, want in ((20, 3), (40, 6), (140, 21), (7, 2), (1, 1)):
    counts = chosen_positions(jax.random.key(0), jnp.arange(160) < num, 0.15)[1]
    assert counts.sum() == want, num


def test_every_position_is_masked_as_often_as_any_other():
  can_mask = jnp.arange(8) != 3
  index, counts = jax.vmap(lambda key: chosen_positions(key, can_mask, 0.3))(
    jax.random.split(jax.random.key(0), 4000))
  often = np.bincount(np.asarray(index)[np.asarray(counts)], minlength=8)
  assert often[3] == 0 and often.sum() == 4000 * 3  # ceil(0.3 * 7)
  expected, deviation = 4000 * 3 / 7, math.sqrt(4000 * 3 / 7 * 4 / 7)
  assert np.abs(np.delete(often, 3) - expected).max() < 4 * deviation


def test_losses_equal_a_recomputation_of_the_same_draws(params, found):
  """Both networks run by themselves; the rest is NumPy in float64."""
  (parts, corrupted), losses, batch = found
  place = batch["positions"], batch["segment_ids"]

  @jax.jit
  def networks(params):
    logits = Transformer(GENERATOR).apply(
      {"params": generator_params(params)}, corrupted.masked, *place, method="logits")
    own, detector = {"params": params["discriminator"]}, Transformer(DISCRIMINATOR)
    hidden = detector.apply(own, corrupted.tokens, *place)
    return logits, detector.apply(own, hidden, method="detected")

  logits, detected = (np.asarray(x, np.float64) for x in networks(params))
  num_replaced = 0
  for row, key in enumerate(batch["key"]):
    index, counts = corrupted.index[row], corrupted.counts[row]
    noise = jax.random.gumbel(jax.random.fold_in(key, 1), (len(index), VOCAB))
    samples = np.argmax(logits[row, index] + np.asarray(noise), axis=-1)
    original = batch["tokens"][row]
    want = original.copy()
    want[index[counts]] = samples[counts]
    np.testing.assert_array_equal(corrupted.tokens[row], want)
    nats = np.log(np.exp(logits[row]).sum(-1)) - logits[row, np.arange(LENGTH), original]
    replaced = want != original  # a sample that is the original counts as original
    assert parts.num_replaced[row] == replaced.sum()
    probability = 1 / (1 + np.exp(-detected[row]))
    own = -np.log(np.where(replaced, probability, 1 - probability))
    real = batch["segment_ids"][row] != 0
    assert parts.num_right[row] == ((probability > 0.5) == replaced)[real].sum()
    loss = nats[index[counts]].mean() + 50 * own[real].mean()
    np.testing.assert_allclose(losses[row], loss, rtol=2e-5)
    num_replaced += replaced.sum()
  assert 0 < num_replaced <= parts.num_masked.sum()


def test_a_sample_that_is_the_original_counts_as_original(params):
  """A generator that is sure of one token puts it everywhere; rows of that token stay."""
  sure = {**params, "generator": {
    **params["generator"],
    "unembedding_bias": jnp.where(jnp.arange(VOCAB) == 9, 100.0, 0.0)}}
  batch = _batch()
  batch["tokens"] = np.where(batch["tokens"] > 2, 9, batch["tokens"])
  parts = _run(sure, batch)[0]
  assert parts.num_masked.sum() > 5 and parts.num_replaced.sum() == 0


def test_the_discriminators_loss_reaches_nothing_that_only_the_generator_has(params):
  batch = _batch()

  def detector(params):
    return LOSSES.parts(params, batch).detector_nats.sum()

  def masked(params):
    return LOSSES.parts(params, batch).masked_nats.sum()

  of_detector, of_masked = jax.jit(lambda p: (jax.grad(detector)(p), jax.grad(masked)(p)))(params)
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(of_detector["generator"]))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(of_masked["generator"]))
  shared = {"embedding", "position_embedding", "embedding_norm"}
  for name, tree in of_masked["discriminator"].items():  # what they share learns from both
    is_moved = any(np.abs(x).max() > 0 for x in jax.tree.leaves(tree))
    assert is_moved == (name in shared), name
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(of_detector["discriminator"][name]))
  assert shared.isdisjoint(params["generator"])


def test_an_examples_draws_are_its_own(params, found):
  """Rows in another order, and beside others, give the same losses."""
  _, losses, batch = found
  some = np.array([3, 1, 1, 4, 3])
  beside = _run(params, {name: value[some] for name, value in batch.items()})[2]
  np.testing.assert_allclose(beside, losses[some], rtol=1e-5)


@pytest.mark.slow
def test_accumulation_changes_nothing(params):
  batch = {name: value[:4] for name, value in _batch().items() if name != "key"}
  steps = [
    supervised(lambda key: params, LOSSES, sgd(0.1), keyed=True, accumulate=n) for n in (1, 2)]
  states = [
    jax.jit(learner.step)(learner.init(jax.random.key(0)), batch, jax.random.key(3))[0]
    for learner in steps]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *(
      state.params for state in states))


def _language(rng, rows):
  """The words in the order of a cycle, from anywhere."""
  return (3 + (rng.integers(0, 20, (rows, 1)) + np.arange(LENGTH)) % 20).astype(np.int32)


@pytest.mark.slow
def test_it_learns_to_tell_replaced_tokens():
  rng = np.random.default_rng(0)
  learner = supervised(
    LOSSES.init_params, LOSSES, optax.adam(3e-3), keyed=True, check_batch=LOSSES.check_batch)
  step, key = jax.jit(learner.step, donate_argnums=0), jax.random.key(0)
  state = jax.jit(lambda key: unboxed(learner.init(key)))(key)
  held_out = {"tokens": _language(rng, 200), "key": jax.random.split(jax.random.key(9), 200)}
  evaluate = jax.jit(LOSSES.parts)
  for i in range(500):
    state, sums = step(state, {"tokens": _language(rng, 32)}, jax.random.fold_in(key, i))
  assert not sums["nonfinite"]
  parts = evaluate(state.params, held_out)
  base = float(parts.num_replaced.sum() / parts.num_real.sum())
  guess = -base * math.log(base) - (1 - base) * math.log(1 - base)  # the best that knows no text
  assert base > 0.03, base  # it is not for lack of anything to find
  assert float(parts.detector_nats.mean()) < 0.6 * guess
  assert float(parts.num_right.sum() / parts.num_real.sum()) > 1 - 0.7 * base
  assert float(parts.masked_nats.mean()) < 0.6 * math.log(20)


@pytest.mark.parametrize("top_layers", [0, 1])
def test_a_trained_discriminator_is_an_encoder_of_text(top_layers):
  """Its states are the encoder's vectors, and of its head nothing is left."""
  deep = dataclasses.replace(
    DISCRIMINATOR, num_layers=2, embedding_width=12, narrow_embeddings=True)
  generator = dataclasses.replace(GENERATOR, embedding_width=12)
  losses = ReplacedTokenLosses(ReplacedTokens(generator, deep), MASK)
  params = jax.jit(lambda key: unboxed(losses.init_params(key)))(jax.random.key(0))
  batch = _batch()
  inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
  want = jax.jit(losses.discriminator.apply)({"params": params["discriminator"]}, *inputs)
  encoder = TextEncoderConfig(without_heads(deep), top_layers).module()
  found = encoder_params(params["discriminator"], top_layers)
  shapes = unboxed(jax.eval_shape(lambda: encoder.init(jax.random.key(0), inputs[0])["params"]))
  assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, shapes)
  got = jax.jit(lambda p: encoder.apply({"params": p}, *inputs, method="features"))(found)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part,change,sentence", [
  ("generator", {"causal": True}, "generator has causal=True"),
  ("discriminator", {"detector": False}, "discriminator has detector=False"),
  ("generator", {"tied_embeddings": False}, "generator has tied_embeddings=False"),
  ("generator", {"head_transform": False}, "narrow_embeddings=True and head_transform=False"),
  ("generator", {"embedding_width": 12}, "token_width=12 and the discriminator 24"),
  ("discriminator", {"max_length": 30}, "max_length=20 and the discriminator 30"),
])
def test_networks_that_do_not_go_together_are_refused(part, change, sentence):
  parts = {"generator": GENERATOR, "discriminator": DISCRIMINATOR}
  parts[part] = dataclasses.replace(parts[part], **change)
  with pytest.raises(ValueError, match=sentence):
    ReplacedTokens(**parts)


def test_ids_and_batches_that_cannot_be_learned_from_are_refused():
  with pytest.raises(ValueError, match="mask_id holds id 23, outside the vocabulary of 23"):
    ReplacedTokenLosses(CONFIG, 23)
  unset = dataclasses.replace(CONFIG, **{
    part: dataclasses.replace(getattr(CONFIG, part), vocab_size=None)
    for part in ("generator", "discriminator")})
  with pytest.raises(ValueError, match="need vocab_size"):
    ReplacedTokenLosses(unset, MASK)
  batch = {**_batch(), "example_id": np.arange(10, 15)}
  del batch["key"]
  LOSSES.check_batch(batch)
  tokens = batch["tokens"].copy()
  tokens[2, 3] = 23
  with pytest.raises(ValueError, match="tokens of example 12 holds id 23 at position 3"):
    LOSSES.check_batch({**batch, "tokens": tokens})
  tokens = batch["tokens"].copy()
  tokens[1] = START
  with pytest.raises(ValueError, match="can_mask is 0 at every position of example 11"):
    LOSSES.check_batch({**batch, "tokens": tokens})
