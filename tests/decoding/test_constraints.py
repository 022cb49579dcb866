"""Constrained decoding against scoring every allowed answer, and a machine of another kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.constraints import prefix_tree
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import OptionScorer, Request, total
from lmops_jax.mesh.meshes import MeshConfig

END = 2
NAMES = [[7], [7, 8], [7, 8, 9], [7, 30], [5, 6, 6, 11], [5, 6], [21], [22, 8]]  # and beginnings
TREE = prefix_tree(NAMES, END, 32)
VECTORS = np.random.default_rng(3).normal(0, 0.5, (6, 16)).astype(np.float32)
PROMPTS = [
  [5, 9, 3], Prompt([1, 0, 0, 4], VECTORS, [-1, 0, 1, -1]), [30, 4, 4, 21, 0],
  Prompt([1, 0, 0, 0, 4, 12], VECTORS, [-1, 2, 3, 5, -1, -1]),
]
SAMPLED = GenerationOptions(max_new_tokens=5, eos_ids=(END,), temperature=1.5)
GREEDY = dataclasses.replace(SAMPLED, temperature=0.0)
BEAMS = dataclasses.replace(GREEDY, num_beams=8, num_return_sequences=8, length_penalty=0.0)


@pytest.fixture(scope="module")
def generator(tiny):
  return Generator(tiny.model, tiny.params)


@pytest.fixture(scope="module")
def token_scores(tiny):
  """Of each prompt, log-probabilities of the tokens of every name with its end."""
  options = [[*name, END] for name in NAMES]
  return OptionScorer(tiny.model, tiny.params).score(
    [Request(prompt, options) for prompt in PROMPTS])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_for_all_names_rank_them_as_scoring_does(generator, token_scores, length_penalty):
  options = dataclasses.replace(BEAMS, length_penalty=length_penalty)
  got = generator.generate_ids(PROMPTS, options, constraint=TREE)
  for i, scores in enumerate(token_scores):
    sums = total(scores) / np.array([len(s) for s in scores]) ** length_penalty
    order = np.argsort(-sums)
    assert np.diff(np.sort(sums)).min() > 1e-3  # else the test could not tell
    mine = got[8 * i : 8 * (i + 1)]
    assert [g.ids for g in mine] == [[*NAMES[k], END] for k in order]
    assert {g.finish_reason for g in mine} == {"eos"}
    np.testing.assert_allclose([g.score for g in mine], sums[order], rtol=1e-4, atol=1e-4)
    for g, k in zip(mine, order):
      np.testing.assert_allclose(g.logprobs, scores[k], rtol=1e-4, atol=1e-4)


def _walk(log_probs, prompt, steps):
  """The allowed tokens after `steps`, and their log-probabilities, from the list of names."""
  whole = [[*name, END] for name in NAMES]
  n = len(steps)
  tokens = sorted({w[n] for w in whole if w[:n] == steps and len(w) > n})
  return tokens, log_probs([*prompt, *steps])[tokens]


def test_greedy_takes_the_best_allowed_token(tiny, generator):
  prompts = [PROMPTS[0], PROMPTS[2], [17, 3]]
  for prompt, got in zip(prompts, generator.generate_ids(prompts, GREEDY, constraint=TREE)):
    steps = []
    while steps[-1:] != [END]:
      tokens, scores = _walk(tiny.log_probs, prompt, steps)
      steps.append(tokens[int(scores.argmax())])
    assert got.ids == steps and got.finish_reason == "eos"
    assert got.ids[:-1] in NAMES


def test_groups_of_beams_return_names_and_padding_does_not_matter(generator, monkeypatch):
  options = dataclasses.replace(
    BEAMS, num_beams=4, num_beam_groups=2, diversity_penalty=0.5, num_return_sequences=4)
  want = generator.generate_ids(PROMPTS, options, constraint=TREE)
  assert all(g.ids[:-1] in NAMES and g.ids[-1] == END for g in want)
  monkeypatch.setattr(generator, "_padding", "right")  # by the same program
  assert [g.ids for g in generator.generate_ids(PROMPTS, options, constraint=TREE)] == [
    g.ids for g in want]


def test_a_search_of_beams_is_one_over_what_is_allowed(generator, token_scores):
  """More beams than names find all of them, and no more."""
  options = dataclasses.replace(BEAMS, num_beams=12)
  got = generator.generate_ids(PROMPTS, options, constraint=TREE)
  for i, scores in enumerate(token_scores):
    np.testing.assert_allclose(
      [g.score for g in got[8 * i : 8 * i + 8]], np.sort(total(scores))[::-1], rtol=1e-4, atol=1e-4)


def test_samples_follow_the_distribution_of_what_is_allowed(tiny):
  generator = Generator(tiny.model, tiny.params, batch_size=1024)
  options = dataclasses.replace(SAMPLED, num_return_sequences=1024)
  drawn = [tuple(g.ids[:-1]) for g in generator.generate_ids([[5, 9, 3]], options, constraint=TREE)]
  expected = []
  for name in NAMES:
    probability, steps = 1.0, []
    for token in [*name, END]:
      tokens, scores = _walk(tiny.log_probs, [5, 9, 3], steps)
      weights = np.exp(scores.astype(np.float64) / 1.5)
      probability *= weights[tokens.index(token)] / weights.sum()
      steps.append(token)
    expected.append(probability * len(drawn))
  expected = np.array(expected)
  assert expected.sum() == pytest.approx(len(drawn))
  counts = np.array([drawn.count(tuple(name)) for name in NAMES])
  assert counts.sum() == len(drawn)
  common = expected > 5
  assert common.sum() > 2
  observed, wanted = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
  kept = wanted > 0.5
  chi2 = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum()
  assert scipy.stats.chi2.sf(chi2, kept.sum() - 1) > 1e-3


def test_a_mesh_gives_the_same(tiny, generator):
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
  sharded = Generator(tiny.model, tiny.params, partitioner=mesh)
  want = generator.generate_ids(PROMPTS, BEAMS, constraint=TREE)
  assert [g.ids for g in sharded.generate_ids(PROMPTS, BEAMS, constraint=TREE)] == [
    g.ids for g in want]


def test_trees_of_a_size_share_a_program_and_none_is_as_before(tiny):
  generator = Generator(tiny.model, tiny.params)
  free = generator.generate_ids(PROMPTS, GREEDY)
  one = generator.num_programs
  generator.generate_ids(PROMPTS, GREEDY, constraint=TREE)
  two = generator.num_programs
  others = [[9, 10, 11, token] for token in range(12, 20)]
  got = generator.generate_ids(PROMPTS, GREEDY, constraint=prefix_tree(others, END, 32))
  assert all(g.ids[:-1] in others for g in got)
  assert generator.num_programs == two and generator.generate_ids(PROMPTS, GREEDY) == free
  assert generator.num_programs == two > one


def test_the_tree_is_the_list():
  """Walked over all sequences of its tokens."""
  whole = {(*name, END) for name in NAMES}
  alphabet = sorted({token for name in whole for token in name})
  mask, advance = jax.jit(TREE.mask), jax.jit(TREE.advance)
  open_states, found = {(): TREE.start()}, set()
  while open_states:
    steps, state = open_states.popitem()
    allowed = np.flatnonzero(mask(state)).tolist()
    assert set(allowed) == {w[len(steps)] for w in whole if w[: len(steps)] == steps != w}
    for token in alphabet:
      after = advance(state, jnp.int32(token))
      if token not in allowed:
        assert not np.asarray(mask(after)).any()
      elif token == END:
        found.add((*steps, token))
        assert not np.asarray(mask(after)).any()
      else:
        open_states[(*steps, token)] = after
  assert found == whole


@pytest.mark.parametrize(("answers", "end_id", "message"), [
  ([], END, "list of answers is empty"),
  ([[3], []], END, "answer 1 of the tree has no token"),
  ([[3], [4], [3]], END, "answers 0 and 2 of the tree have the same tokens"),
  ([[3], [4, 32]], END, "answer 1 of the tree holds token id 32, outside .* vocabulary of 32"),
  ([[3]], 40, "holds token id 40"),
])
def test_bad_answers_are_named(answers, end_id, message):
  with pytest.raises(ValueError, match=message):
    prefix_tree(answers, end_id, 32)


@pytest.mark.parametrize(("tree", "changes", "message"), [
  (prefix_tree([[3]], END, 31), {}, "made for 31 tokens, and the model has 32"),
  (TREE, {"eos_ids": (4,)}, "end with the token 2, and generation with 4"),
  (TREE, {"eos_ids": ()}, "and generation with none"),
  (TREE, {"eos_ids": (END, 8)}, "answers without any"),
  (TREE, {"max_new_tokens": 4}, "max_new_tokens=4 would cut .* has 5 tokens"),
  (TREE, {"min_new_tokens": 3}, "min_new_tokens=3 may forbid all"),
  (TREE, {"no_repeat_ngram": 1}, "no_repeat_ngram=1 may forbid all"),
  (TREE, {"num_beams": 9, "num_return_sequences": 9}, "=9 is more than the 8 answers"),
])
def test_options_that_do_not_go_with_a_tree_are_refused(generator, tree, changes, message):
  programs = generator.num_programs
  with pytest.raises(ValueError, match=message):
    generator.generate_ids(PROMPTS, dataclasses.replace(GREEDY, **changes), constraint=tree)
  assert generator.num_programs == programs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """Free text, but after 3 come two tokens of 20..27, the second not below the first, and 4."""

  offset: int = 20  # of the first of the eight
  begins: int = 0  # the step, of 0 in free text, 1, 2, and 3 before the 4
  is_silent: bool = False  # then it allows the end token alone

  def check(self, config, options, eos_ids):
    del config, options, eos_ids

  def start(self):
    return {"step": jnp.int32(self.begins), "first": jnp.int32(0)}

  def mask(self, state):
    ids = jnp.arange(32)
    location = (ids >= self.offset) & (ids < self.offset + 8)
    allowed = jnp.select(
      [state["step"] == i for i in range(4)],
      [~location & (ids != 4) & (ids != END), location, location & (ids >= state["first"]),
       ids == 4])
    return jnp.where(self.is_silent, (ids == END) & (state["step"] == 0), allowed)

  def advance(self, state, token):
    opened = (state["step"] == 0) & (token != 3) & ~jnp.bool_(self.is_silent)
    step = jnp.where(opened, 0, (state["step"] + 1) % 4)
    return {"step": step, "first": jnp.where(state["step"] == 1, token, state["first"])}


@pytest.mark.parametrize("beams", [1, 4])
def test_another_machine_holds_its_grammar(generator, beams):
  options = GenerationOptions(max_new_tokens=24, num_beams=beams, eos_ids=(END,))
  if beams == 1:
    options = dataclasses.replace(options, temperature=4.0, num_return_sequences=6)
  pairs, machine = 0, Pairs(begins=int(beams > 1))
  for got in generator.generate_ids(PROMPTS, options, constraint=machine):
    text = [*([3] if beams > 1 else []), *got.ids]
    assert len(got.ids) == 24
    while 3 in text:
      start = text.index(3) + 1
      first, second, close = [*text[start : start + 3], 27, 27, 4][:3]
      pairs += len(text) > start + 2
      assert start == len(text) or 20 <= first <= second <= 27
      assert close == 4 or start + 2 >= len(text)
      assert not set(text[: start - 1]) & {*range(20, 28), 4}
      text = text[start + 3 :]
    assert not set(text) & {*range(20, 28), 4}
  assert pairs


def test_fewer_answers_than_asked_for_are_no_answer(generator):
  one = GenerationOptions(max_new_tokens=24, num_beams=4, eos_ids=(END,))
  silent = Pairs(is_silent=True)
  got = generator.generate_ids(PROMPTS, one, constraint=silent)
  assert [g.ids for g in got] == [[END]] * len(PROMPTS)
  two = dataclasses.replace(one, num_return_sequences=2)
  with pytest.raises(ValueError, match="the constraint leaves 1 answers to prompt 0"):
    generator.generate_ids(PROMPTS, two, constraint=silent)
