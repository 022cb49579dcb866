"""Answers of a policy: one program for all lengths and steps, and what a step's seed decides."""

import jax
import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.rollouts import Exploration, Responder
from tests import model_folders

PROMPTS = [[0, 40, 41], [0, 50], [0, 60, 61, 62, 63]]
SAMPLED = Exploration(GenerationOptions(max_new_tokens=20, temperature=1.0), shortest=2)
SEARCHED = Exploration(GenerationOptions(
  max_new_tokens=20, num_beams=4, num_beam_groups=4, diversity_penalty=1.0,
  num_return_sequences=4), shortest=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return pretrained.load(str(model_folders.write(tmp_path_factory.mktemp("model"), spread=3.0)))


@pytest.fixture(scope="module")
def params(source):
  return source.params()


@pytest.mark.parametrize("exploration, count", [
  (SEARCHED, 4), pytest.param(SAMPLED, 1, marks=pytest.mark.slow)], ids=["beams", "draw"])
def test_one_program_serves_all_lengths_and_parameters(source, params, exploration, count):
  respond = Responder(exploration, source.model, source.tokenizer())
  limits, programs = set(), []
  for seed in range(6):
    moved = jax.tree.map(lambda p, seed=seed: p * (1 + 0.1 * seed), params)
    answers = respond(moved, PROMPTS, seed)
    limit = exploration.limit(seed)
    limits.add(limit)
    programs.append(respond.num_programs)
    assert [len(row) for row in answers] == [count] * 3
    for answer in (answer for row in answers for answer in row):
      assert len(answer.ids) == limit if answer.is_cut else len(answer.ids) <= limit
      assert (answer.ids[-1] == 1) != answer.is_cut
  assert len(limits) > 3 and programs == [2] * 6


def test_answers_are_those_of_a_generator_made_for_the_parameters(source, params):
  tokenizer = source.tokenizer()
  respond = Responder(SAMPLED, source.model, tokenizer)
  respond(params, PROMPTS, 1)
  moved = jax.tree.map(lambda p: p * 1.3, params)
  got = respond(moved, PROMPTS, 12345)
  options = GenerationOptions(
    max_new_tokens=SAMPLED.limit(12345), temperature=1.0, seed=12345)
  want = Generator(source.model, moved, tokenizer).generate_ids(PROMPTS, options)
  assert [list(row[0].ids) for row in got] == [one.ids for one in want]
  again = respond(moved, PROMPTS, 12345)
  assert got == again and got != respond(moved, PROMPTS, 12346)


def test_limits_are_spread_evenly():
  counts = np.bincount([SAMPLED.limit(seed) for seed in range(1900)], minlength=21)
  assert not counts[:2].any() and counts[2:].min() > 60 and counts[2:].max() < 145
  assert Exploration(SAMPLED.options).limit(5) == 20


@pytest.mark.parametrize("options, shortest, said", [
  (dict(max_new_tokens=8, temperature=1.0), 9, "shortest=9 is outside of min_new_tokens=0"),
  (dict(max_new_tokens=8, min_new_tokens=4, temperature=1.0), 3, "shortest=3 is outside"),
  (dict(max_new_tokens=8), None, "temperature=0.0 and num_beams=1"),
])
def test_what_explores_nothing_or_has_no_room_is_refused(options, shortest, said):
  with pytest.raises(ValueError, match=said):
    Exploration(GenerationOptions(**options), shortest)
