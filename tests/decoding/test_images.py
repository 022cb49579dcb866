"""Vectors in prompts: the same answers and scores as of a full pass over each row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding import GenerationOptions, Generator, prefixes
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import OptionScorer, Request
from lmops_jax.mesh.meshes import MeshConfig

CHANGES = {"positions": "sinusoidal", "embedding_scale": 4.0, "position_offset": 2}
WIDTH, SIZE = 16, 4  # of the model, and vectors a picture
PICTURES = np.random.default_rng(5).normal(0, 0.5, (4, SIZE, WIDTH)).astype(np.float32)
TABLE = PICTURES.reshape(-1, WIDTH)


def _prompt(*parts, placeholder=0):
  """Words as lists of ids, pictures as their numbers."""
  ids, index = [], []
  for part in parts:
    if isinstance(part, int):
      ids += [placeholder] * SIZE
      index += range(part * SIZE, (part + 1) * SIZE)
    else:
      ids += part
      index += [-1] * len(part)
  return Prompt(ids, TABLE, index)


LAYOUT = ([1, 5], 0, [6, 9]), ([1], 2, 1, [7]), ([3, 4, 5],), ([1], 3, [8, 8], 3, [8, 2, 9])
PROMPTS = [_prompt(*parts) for parts in LAYOUT]
GREEDY = GenerationOptions(max_new_tokens=7)
FILTERED = dataclasses.replace(GREEDY, repetition_penalty=1.4, no_repeat_ngram=2)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.8, top_p=0.9, num_return_sequences=2)
BEAMS = dataclasses.replace(GREEDY, num_beams=3, num_return_sequences=2, eos_ids=(4, 9))


@pytest.fixture(scope="module")
def tiny(make_tiny):
  return make_tiny(**CHANGES)


@pytest.fixture(scope="module")
def generator(tiny):
  return Generator(tiny.model, tiny.params)


@pytest.fixture(scope="module")
def log_probs(tiny):
  """`(prompt, ids) -> [n,V]` of the tokens behind each id and the prompt, without any cache."""
  forward = jax.jit(lambda *args: jax.nn.log_softmax(tiny.model.apply(
    {"params": tiny.params}, args[0], vectors=TABLE[None], vector_index=args[1], method="logits")))

  def run(prompt, ids=()):
    tokens, index = np.zeros((1, 48), np.int32), np.full((1, 48), -1, np.int32)
    n = len(prompt) + len(ids)
    tokens[0, :n] = [*prompt.ids, *ids]
    index[0, : len(prompt)] = prompt.index
    return np.asarray(forward(tokens, index))[0, len(prompt) - 1 : n]

  return run


def _assert_same(got, want):
  assert [(g.ids, g.finish_reason) for g in got] == [(w.ids, w.finish_reason) for w in want]
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g.logprobs, w.logprobs, rtol=1e-4, atol=1e-4)


def test_greedy_equals_a_loop_without_cache(generator, log_probs):
  for prompt, got in zip(PROMPTS, generator.generate_ids(PROMPTS, GREEDY), strict=True):
    rows = log_probs(prompt, got.ids)
    lead = np.diff(np.sort(rows[: len(got.ids)], axis=1)[:, -2:], axis=1)
    assert lead.min() > 1e-4 and len(got.ids) == 7  # else the test could not tell
    assert got.ids == rows[:-1].argmax(axis=1).tolist()
    np.testing.assert_allclose(
      got.logprobs, [rows[n, t] for n, t in enumerate(got.ids)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [
  FILTERED, pytest.param(SAMPLED, marks=pytest.mark.slow), BEAMS],
  ids=["filtered", "sampled", "beams"])
def test_batches_padding_and_placeholders_do_not_matter_and_pictures_do(
  generator, options, monkeypatch
):
  want = generator.generate_ids(PROMPTS, options)
  with monkeypatch.context() as patch:
    patch.setattr(generator, "_padding", "right")  # by the same programs
    _assert_same(generator.generate_ids(PROMPTS, options), want)
  per_prompt = options.num_return_sequences
  for i, parts in enumerate(LAYOUT):
    alone = generator.generate_ids([_prompt(*parts, placeholder=-7 - i)], options, row_ids=[i])
    _assert_same(alone, want[i * per_prompt : (i + 1) * per_prompt])
  swapped = generator.generate_ids([_prompt([1], 1, 2, [7])], options, row_ids=[1])
  assert swapped[0].logprobs != want[per_prompt].logprobs


def test_beams_equal_the_log_probabilities_of_full_passes(generator, log_probs):
  got = generator.generate_ids(PROMPTS, BEAMS)
  for i, prompt in enumerate(PROMPTS):
    for answer in got[2 * i : 2 * i + 2]:
      rows = log_probs(prompt, answer.ids)
      direct = [rows[n, t] for n, t in enumerate(answer.ids)]
      np.testing.assert_allclose(answer.logprobs, direct, rtol=1e-4, atol=2e-4)
      assert answer.score == pytest.approx(np.sum(direct) / len(direct), rel=1e-4)


@pytest.mark.slow  # the beams of test_constraints are on a mesh and see
@pytest.mark.parametrize("options", [SAMPLED, BEAMS], ids=["sampled", "beams"])
def test_a_mesh_gives_the_same(tiny, generator, options):
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
  sharded = Generator(tiny.model, tiny.params, partitioner=mesh)
  _assert_same(sharded.generate_ids(PROMPTS, options), generator.generate_ids(PROMPTS, options))


def test_words_alone_take_the_program_of_ids(tiny):
  generator = Generator(tiny.model, tiny.params)
  want = generator.generate_ids([[3, 4, 5], [6]], GREEDY)
  programs = generator.num_programs
  words = [Prompt([3, 4, 5]), Prompt(np.array([6]), TABLE, [-1])]
  assert generator.generate_ids(words, GREEDY) == want and generator.num_programs == programs
  generator.generate_ids(PROMPTS[:2], GREEDY)
  assert generator.num_programs == programs + 1  # a prefill of its own
  generator.generate_ids([_prompt([4], 3, [5]), Prompt([9])], GREEDY)
  assert generator.num_programs == programs + 1  # for all numbers of vectors up to a bucket


def test_texts_and_prompts_go_together(make_tiny, byte_tokenizer):
  tiny = make_tiny(vocab_size=260, **CHANGES)
  generator = Generator(tiny.model, tiny.params, byte_tokenizer)
  prompt = Prompt(byte_tokenizer.encode("ab") + [0] * SIZE + byte_tokenizer.encode("cd"), TABLE,
                  [-1, -1, *range(SIZE), -1, -1])
  pieces = {0: "", 1: ""}
  got = generator.generate(
    ["xy", prompt], GREEDY, callback=lambda i, piece: pieces.__setitem__(i, pieces[i] + piece))
  ids = generator.generate_ids([Prompt(byte_tokenizer.encode("xy")), prompt], GREEDY)
  assert [g.ids for g in got] == [g.ids for g in ids]
  assert [g.text for g in got] == [pieces[0], pieces[1]]


def test_a_bad_prompt_is_named(tiny, generator):
  for prompt, message in [
    (Prompt([1, 2], TABLE[:, :5], [0, -1]), r"prompt 1 has vectors of the shape \(16, 5\)"),
    (Prompt([1, 2], TABLE, [-1, 16]), "prompt 1 has index 16 at token 1"),
    (_prompt([1], *range(4), 0, 0, [2] * 20), "prompt 1 has 45 tokens and .*max_new_tokens=7 more"),
    (Prompt([32, 0], TABLE, [-1, 0]), "prompt 1 has token id 32, which is not among"),
  ]:
    with pytest.raises(ValueError, match=message):
      generator.generate_ids([[4], prompt], GREEDY)
  with pytest.raises(ValueError, match="request 1 has index 16 at token 1"):
    OptionScorer(tiny.model, tiny.params).score(
      [Request([1], [[2]]), Request(Prompt([1, 2], TABLE, [-1, 16]), [[2]])])


def _close(got, want):
  for row, wanted in zip(got, want, strict=True):
    for a, b in zip(row, wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def _requests(front=()):
  options = ([4], [9]), ([5], [8], [3]), ([7],), ([2, 2], [9, 9, 9, 4])  # three lie side by side
  return [Request(_prompt(*front, *parts), choices) for parts, choices in zip(LAYOUT, options)]


def _direct(log_probs, requests):
  return [
    [[log_probs(request.context, option)[n, t] for n, t in enumerate(option)]
     for option in request.options] for request in requests
  ]


@pytest.mark.parametrize("on_mesh", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scores_equal_full_passes(tiny, log_probs, on_mesh):
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).build() if on_mesh else None
  scorer = OptionScorer(tiny.model, tiny.params, mesh)
  for front in ((), ([1, 5, 6], 0, [9], 1, 2, [11])):
    requests = _requests(front)
    _close(scorer.score(requests), _direct(log_probs, requests))


def test_rows_with_equal_ids_share_no_picture_but_their_own(tiny, log_probs, monkeypatch):
  read, ends = prefixes.read_text, []
  monkeypatch.setattr(prefixes, "read_text", lambda *args: ends.append(len(args[2])) or read(*args))
  scorer = OptionScorer(tiny.model, tiny.params)
  same = [1, 2, 3], 0, [4, 5], 1, [6, 7, 8], 2, [9]
  requests = [Request(_prompt(*same, last, [5]), [[4], [6, 2]]) for last in (0, 1, 3)]
  assert len({tuple(request.context.ids) for request in requests}) == 1
  got = scorer.score(requests)
  assert ends == [21]  # up to the picture that differs
  _close(got, _direct(log_probs, requests))
  _close(scorer.score(requests[::-1])[::-1], got)
  _close(scorer.score([Request(r.context, r.options[::-1]) for r in requests]),
         [options[::-1] for options in got])
  assert np.abs(got[0][0] - got[1][0]).max() > 1e-2


def test_options_and_answers_behind_demonstrations_with_pictures(tiny, generator, log_probs):
  front = _prompt([1, 5], 2, [6], 1, [7, 9])
  prefix = prefixes.read_text(tiny.model, tiny.params, front)
  own = [Request(_prompt(*parts), [[4], [5, 6]]) for parts in LAYOUT[:3]]
  whole = [
    Request(_prompt([1, 5], 2, [6], 1, [7, 9], *parts), [[4], [5, 6]]) for parts in LAYOUT[:3]]
  scorer = OptionScorer(tiny.model, tiny.params)
  _close(scorer.score(own, prefix=prefix), _direct(log_probs, whole))
  _assert_same(generator.generate_ids([r.context for r in own], GREEDY, prefix=prefix),
               generator.generate_ids([r.context for r in whole], GREEDY))


def test_groups_with_pictures_go_in_any_order_padding_and_mesh(tiny, monkeypatch):
  groups = [_prompt([1], 0, [5]), _prompt([3, 4], 1, [2], 3), _prompt([8, 9, 7])]
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
  requests = [Request([5, 6], [[4], [7, 8]])]
  scorer = OptionScorer(tiny.model, tiny.params)

  def scores(order, width, partitioner=None):
    ids, index = np.full((3, width), 7, np.int32), np.full((3, width), 5, np.int32)
    mask, vectors = np.zeros((3, width), bool), np.stack([TABLE] * 3)
    for row, i in enumerate(order):
      n = len(groups[i])
      ids[row, width - n :], index[row, width - n :] = groups[i].ids, groups[i].index
      mask[row, width - n :] = True
    prefix = prefixes.read_groups(
      tiny.model, tiny.params, ids, mask, window=14, bos_id=1, partitioner=partitioner,
      vectors=vectors, vector_index=index)
    rows = OptionScorer(tiny.model, tiny.params, partitioner) if partitioner else scorer
    return rows.score(requests, prefix=prefix)

  want = scores((0, 1, 2), 11)
  monkeypatch.setattr(prefixes, "_TOKENS_AT_ONCE", 16)  # one group a call
  _close(scores((2, 0, 1), 13, mesh), want)
  with pytest.raises(ValueError, match=r"vector_index \(1, 4\) and vectors \(1, 16\)"):
    prefixes.read_groups(
      tiny.model, tiny.params, np.ones((1, 4), int), np.ones((1, 4), bool), vectors=TABLE[None, 0],
      vector_index=np.zeros((1, 4), int))
  with pytest.raises(ValueError, match="group 0 has index 16"):
    prefixes.read_groups(
      tiny.model, tiny.params, np.ones((1, 4), int), np.ones((1, 4), bool), vectors=TABLE[None],
      vector_index=np.full((1, 4), 16))


def test_a_constant_vector_is_the_word_that_it_stands_for(tiny):
  """Embeddings looked up by hand, on a device, are the words, in prompt and prefix."""
  words = [5, 9, 3, 7, 11, 2]
  same = Prompt([0] * 6, jnp.asarray(tiny.params["embedding"]), words)
  scorer = OptionScorer(tiny.model, tiny.params)
  options = [[4], [8, 3]]
  got = scorer.score([Request(same, options)])
  _close(got, scorer.score([Request(words, options)]))


def test_vectors_are_no_words_to_filters(generator, log_probs):
  """With no token twice, as a loop without cache chooses; the slots are not the token 0."""
  prompt, num_new = PROMPTS[1], 26
  options = GenerationOptions(max_new_tokens=num_new, no_repeat_ngram=1)
  got, = generator.generate_ids([prompt], options)
  ids, words = [], {1, 7}
  while len(ids) < num_new:
    row = log_probs(prompt, ids)[-1].copy()
    row[[*words, *ids]] = -np.inf
    ids.append(int(row.argmax()))
  assert got.ids == ids and 0 in ids
