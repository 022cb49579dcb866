"""Greedy search and sampling: the same tokens as without cache, padding, batch or mesh."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding import loop as loop_lib
from lmops_jax.decoding.generate import bucket
from lmops_jax.mesh.meshes import MeshConfig

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 4, 4, 21, 0]]
GREEDY = GenerationOptions(max_new_tokens=9)


@pytest.fixture(scope="module")
def generator(tiny):
  return Generator(tiny.model, tiny.params)


def _naive(tiny, prompt, num_new, eos_ids=()):
  """Greedy without cache; ids, log-probabilities, and the smallest lead of a best token."""
  ids, log_probs, lead = [], [], np.inf
  while len(ids) < num_new and not (ids and ids[-1] in eos_ids):
    row = tiny.log_probs(prompt + ids)
    second, first = np.sort(row)[-2:]
    lead = min(lead, first - second)
    ids.append(int(row.argmax()))
    log_probs.append(first)
  return ids, log_probs, lead


def test_greedy_equals_a_loop_without_cache(tiny, generator):
  for prompt, got in zip(PROMPTS, generator.generate_ids(PROMPTS, GREEDY), strict=True):
    ids, log_probs, lead = _naive(tiny, prompt, 9)
    assert lead > 1e-4  # else the test could not tell
    assert (got.ids, got.finish_reason, got.score) == (ids, "length", None)
    np.testing.assert_allclose(got.logprobs, log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [
  dict(positions="learned", norm="layer"), dict(positions="alibi"), dict(sliding_window=4),
  dict(tied_embeddings=True, scan_layers=False), dict(positions="learned", max_length=20),
  dict(momentum=0.6),
])
def test_greedy_with_other_positions(make_tiny, changes):
  tiny = make_tiny(**changes)
  got = Generator(tiny.model, tiny.params).generate_ids(PROMPTS, GREEDY)
  for prompt, result in zip(PROMPTS, got, strict=True):
    ids, _, lead = _naive(tiny, prompt, 9)
    assert lead > 1e-4
    assert result.ids == ids


@pytest.mark.parametrize("options", [
  GREEDY,
  GenerationOptions(max_new_tokens=9, repetition_penalty=1.4, no_repeat_ngram=2),
  GenerationOptions(max_new_tokens=9, temperature=0.7, top_k=9, top_p=0.9, min_p=0.02),
  GenerationOptions(max_new_tokens=9, num_beams=3, eos_ids=(4, 9)),
])
def test_padding_on_either_side_and_alone_give_the_same(tiny, generator, options):
  want = generator.generate_ids(PROMPTS, options)
  right = Generator(tiny.model, tiny.params, padding="right").generate_ids(PROMPTS, options)
  _assert_same(right, want)
  for i, prompt in enumerate(PROMPTS):
    _assert_same(generator.generate_ids([prompt], options, row_ids=[i]), want[i : i + 1])


@pytest.mark.parametrize("beams", [1, 3])
def test_momentum_attention_with_padding_on_either_side_and_alone(make_tiny, beams):
  tiny = make_tiny(momentum=0.6)
  options = GenerationOptions(max_new_tokens=9, num_beams=beams, eos_ids=(4, 9))
  left, right = (Generator(tiny.model, tiny.params, padding=side) for side in ("left", "right"))
  want = left.generate_ids(PROMPTS, options)
  _assert_same(right.generate_ids(PROMPTS, options), want)
  for i, prompt in enumerate(PROMPTS):
    _assert_same(left.generate_ids([prompt], options), want[i : i + 1])


def _assert_same(got, want):
  assert [(g.ids, g.finish_reason) for g in got] == [(w.ids, w.finish_reason) for w in want]
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g.logprobs, w.logprobs, rtol=1e-4, atol=1e-4)


def test_batches_are_cut_and_put_together_in_order(tiny, generator):
  small = Generator(tiny.model, tiny.params, batch_size=2)
  options = GenerationOptions(max_new_tokens=4, temperature=1.0)
  prompts = [*PROMPTS, [3, 3, 3]]
  _assert_same(small.generate_ids(prompts, options), generator.generate_ids(prompts, options))
  assert small.generate_ids([], options) == []


@pytest.mark.parametrize("options", [
  GREEDY,
  GenerationOptions(max_new_tokens=6, temperature=0.8, top_p=0.9, num_return_sequences=2),
  GenerationOptions(max_new_tokens=6, num_beams=4, eos_ids=(4,), num_return_sequences=2),
  GenerationOptions(max_new_tokens=6, num_beams=4, num_beam_groups=2, diversity_penalty=0.7),
], ids=["greedy", "sampled", "beams", "groups"])
def test_a_mesh_gives_the_same(tiny, generator, options):
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
  sharded = Generator(tiny.model, tiny.params, partitioner=mesh)
  kernel = sharded.params["layers"][0]["attention"]["query"]["kernel"]
  assert not kernel.sharding.is_fully_replicated
  _assert_same(sharded.generate_ids(PROMPTS, options), generator.generate_ids(PROMPTS, options))
  programs = sharded.num_programs
  pieces = []
  sharded.generate_ids(PROMPTS[:3], dataclasses.replace(options, seed=9))
  if options.num_beams == 1:  # in chunks the state goes in and out several times
    sharded.generate_ids(
      PROMPTS, dataclasses.replace(options, max_new_tokens=14), lambda i, ids: pieces.append(i)
    )
  assert sharded.num_programs == programs


def test_a_vocabulary_that_the_mesh_does_not_divide_lies_whole_on_every_device(make_tiny):
  tiny = make_tiny(vocab_size=33)
  mesh = MeshConfig(data=4, tensor=2).build()
  got, want = (
    Generator(tiny.model, tiny.params, partitioner=on).generate_ids(
      PROMPTS[:4], GenerationOptions(max_new_tokens=4))
    for on in (mesh, None))
  _assert_same(got, want)


def test_prompts_of_similar_length_share_programs(tiny):
  generator = Generator(tiny.model, tiny.params)
  sampled = GenerationOptions(max_new_tokens=5, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
  for options in (GREEDY, sampled):
    generator.generate_ids([[1, 2, 3]], options)
    programs = generator.num_programs
    generator.generate_ids([[4] * 14], dataclasses.replace(options, max_new_tokens=16))
    generator.generate_ids([[4]], options, lambda i, ids: None)
    generator.generate_ids([[4]], dataclasses.replace(options, seed=3, min_new_tokens=1))
    assert generator.num_programs == programs
  generator.generate_ids([[7]], dataclasses.replace(
    sampled, temperature=1.5, top_p=0.2, repetition_penalty=0.9
  ))
  assert generator.num_programs == programs
  generator.generate_ids([[1] * 17], GREEDY)
  assert generator.num_programs == programs + 2  # another bucket: prefill and decode


def test_buckets():
  assert [bucket(n) for n in (0, 1, 16, 17, 70, 128, 129, 257, 300, 513, 1025)] == [
    16, 16, 16, 32, 80, 128, 160, 320, 320, 640, 1152
  ]
  assert all(n <= bucket(n) <= max(1.25 * n + 1, 16 + n) for n in range(1, 3000))


def test_the_cache_is_donated_and_decoding_is_one_loop(generator):
  plan, knobs = loop_lib.plan_of(GREEDY, ()), loop_lib.knobs_of(GREEDY, 16)
  tokens = jnp.ones((2, 16), jnp.int32)
  state = generator._prefill(
    plan, 16, generator.params, knobs, tokens, tokens == 1, jnp.arange(2), jnp.ones(2, bool)
  )
  arguments = (plan, generator.params, knobs, state, np.int32(9), jnp.zeros((2, 1), bool))
  assert generator._decode.lower(*arguments).as_text().count("stablehlo.while") == 1
  after = generator._decode(*arguments)
  assert state.cache.keys[0].is_deleted() and state.cache.values[-1].is_deleted()
  assert int(after.step) == 9


def test_an_end_token_ends_a_row_and_min_new_tokens_delays_it(tiny, generator):
  free = [_naive(tiny, p, 9)[0] for p in PROMPTS]
  eos = (free[0][2], free[1][4])
  options = dataclasses.replace(GREEDY, eos_ids=eos)
  for prompt, got in zip(PROMPTS, generator.generate_ids(PROMPTS, options), strict=True):
    ids = _naive(tiny, prompt, 9, eos)[0]
    assert got.ids == ids
    assert got.finish_reason == ("eos" if ids[-1] in eos else "length")
  reasons = {g.finish_reason for g in generator.generate_ids(PROMPTS, options)}
  late = generator.generate_ids(PROMPTS, dataclasses.replace(options, min_new_tokens=6))
  assert "eos" in reasons
  for got in late:
    assert not set(got.ids[:6]) & set(eos) and len(got.ids) >= 6


def test_no_ngram_repeats(generator):
  prompt = [3, 4, 3, 4, 5]
  options = GenerationOptions(max_new_tokens=30, no_repeat_ngram=2)
  ids = prompt + generator.generate_ids([prompt], options)[0].ids
  new = list(zip(ids, ids[1:]))[len(prompt) - 1 :]
  assert len(set(new)) == len(new) and (3, 4) not in new


def test_log_probs_are_those_of_the_model_not_of_the_filters(tiny, generator):
  options = GenerationOptions(max_new_tokens=5, temperature=2.0, top_k=3, repetition_penalty=2.0)
  for prompt, got in zip(PROMPTS, generator.generate_ids(PROMPTS, options), strict=True):
    want = [tiny.log_probs(prompt + got.ids[:n])[t] for n, t in enumerate(got.ids)]
    np.testing.assert_allclose(got.logprobs, want, rtol=1e-4, atol=1e-4)


def test_seeds_reproduce_and_differ(generator):
  options = GenerationOptions(max_new_tokens=8, temperature=3.0, num_return_sequences=3)
  first = generator.generate_ids(PROMPTS, options)
  assert len(first) == 12 and len({tuple(g.ids) for g in first}) == 12
  assert generator.generate_ids(PROMPTS, options) == first
  assert generator.generate_ids(PROMPTS, dataclasses.replace(options, seed=1)) != first
  same = generator.generate_ids([[5, 6], [5, 6]], options, row_ids=[7, 7])
  assert [g.ids for g in same[:3]] == [g.ids for g in same[3:]]


def test_samples_follow_the_models_distribution(tiny):
  generator = Generator(tiny.model, tiny.params, batch_size=512)
  options = GenerationOptions(max_new_tokens=1, temperature=2.0, num_return_sequences=512)
  drawn = [g.ids[0] for s in range(4) for g in generator.generate_ids(
    [[5, 9, 3]], dataclasses.replace(options, seed=s)
  )]
  weights = np.exp(tiny.log_probs([5, 9, 3]).astype(np.float64) / 2)
  expected = weights / weights.sum() * len(drawn)
  counts = np.bincount(drawn, minlength=32)
  common = expected > 5
  observed, wanted = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
  kept = wanted > 0.5
  chi2 = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum()
  assert scipy.stats.chi2.sf(chi2, kept.sum() - 1) > 1e-3


def test_the_callback_sees_all_ids_and_can_end_a_row(generator):
  options = dataclasses.replace(GREEDY, max_new_tokens=20)
  want = generator.generate_ids(PROMPTS, options)
  seen, calls = {i: [] for i in range(4)}, []

  def callback(i, ids):
    calls.append(len(ids))
    seen[i] += ids
    return i == 2 and len(seen[2]) >= 9

  got = generator.generate_ids(PROMPTS, options, callback)
  assert set(calls) == {1, 8, 3} and calls.count(1) == 4
  assert [got[i].ids for i in range(4)] == [seen[i] for i in range(4)]
  assert [g.finish_reason for g in got] == ["length", "length", "stop", "length"]
  assert got[2].ids == want[2].ids[:9]
  assert [got[i] for i in (0, 1, 3)] == [want[i] for i in (0, 1, 3)]


def test_bfloat16_products_take_cast_matrices(make_tiny):
  tiny = make_tiny(dtype="bfloat16")
  generator = Generator(tiny.model, tiny.params)
  assert generator.params["embedding"].dtype == jnp.bfloat16
  assert generator.params["final_norm"]["scale"].dtype == jnp.float32
  got = generator.generate_ids([[5, 9, 3]], GREEDY)[0]
  assert np.isfinite(got.logprobs).all() and len(got.ids) == 9


def test_boxed_and_unstacked_parameters_do(tiny, generator, make_tiny):
  from lmops_jax.models.transformer import unstack_layers

  want = generator.generate_ids(PROMPTS, GREEDY)
  boxed = jax.tree.map(lambda p: nn.Partitioned(p, (None,) * p.ndim), tiny.params)
  for params in (boxed, unstack_layers(tiny.params)):
    assert Generator(tiny.model, params).generate_ids(PROMPTS, GREEDY) == want


@pytest.mark.parametrize(("prompts", "options", "message"), [
  ([[1], []], GREEDY, "prompt 1 is empty and there is no BOS"),
  ([[1] * 60], GREEDY, "prompt 0 has 60 tokens, and the model's context is 48"),
  ([[1] * 44], GREEDY, "has 44 tokens and .*max_new_tokens=9 more, and .* context is 48"),
  ([[1, 32]], GREEDY, "token id 32, which is not among the model's 32"),
  ([[1, -3]], GREEDY, "token id -3"),
])
def test_a_bad_prompt_is_named(generator, prompts, options, message):
  programs = generator.num_programs
  with pytest.raises(ValueError, match=message):
    generator.generate_ids(prompts, options)
  assert generator.num_programs == programs


def test_the_context_may_be_filled(tiny, generator):
  prompt = [1, 5] * 20
  got = generator.generate_ids([prompt], dataclasses.replace(GREEDY, max_new_tokens=8))
  assert got[0].ids == _naive(tiny, prompt, 8)[0]
  more = generator.generate_ids([prompt], dataclasses.replace(GREEDY, max_new_tokens=9))
  assert more[0].ids == _naive(tiny, prompt, 9)[0]  # the last new token is not read
  with pytest.raises(ValueError, match="has 40 tokens and .*max_new_tokens=10 more"):
    generator.generate_ids([prompt], dataclasses.replace(GREEDY, max_new_tokens=10))


def test_what_cannot_generate_is_refused(tiny, make_tiny):
  model = type(tiny.model)(dataclasses.replace(tiny.model.config, causal=False))
  with pytest.raises(ValueError, match="encoder cannot continue"):
    Generator(model, tiny.params)
  with pytest.raises(ValueError, match="padding='middle'"):
    Generator(tiny.model, tiny.params, padding="middle")
  with pytest.raises(ValueError, match="no tokenizer"):
    Generator(tiny.model, tiny.params).generate(["a"])
  broken = {**tiny.params, "final_norm": {"scale": tiny.params["final_norm"]["scale"] * np.nan}}
  with pytest.raises(ValueError, match="after prompt 0 are not finite"):
    Generator(tiny.model, broken).generate_ids([[1]], GREEDY)
