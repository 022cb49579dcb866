"""Beam search against a slow, direct one on lists, and against transformers."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.models.transformer import Transformer, TransformerConfig

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8], [30, 4, 4, 21, 0]]
EARLY = [False, True, "never"]


def _slow_search(log_probs, prompt, options):
  """Scores and ids of the best hypotheses; each group is (running, finished, done)."""
  size, eos = options.num_beams // options.num_beam_groups, set(options.eos_ids or ())
  groups = [([(0.0, [])], [], False) for _ in range(options.num_beam_groups)]
  for step in range(1, options.max_new_tokens + 1):
    taken = Counter()
    for g, (running, finished, done) in enumerate(groups):
      if done:
        continue
      candidates = sorted((
        (score + lp - options.diversity_penalty * taken[token], [*ids, token])
        for score, ids in running for token, lp in enumerate(log_probs(prompt + ids))
      ), key=lambda c: -c[0])[: max(2, 1 + len(eos)) * size]
      last = step == options.max_new_tokens
      for score, ids in candidates[:size]:
        if last or ids[-1] in eos:
          finished.append((score / step**options.length_penalty, ids))
      finished = sorted(finished, key=lambda c: -c[0])[:size]
      running = [c for c in candidates if c[1][-1] not in eos][:size]
      taken.update(ids[-1] for _, ids in running)
      length = step
      if options.early_stopping == "never" and options.length_penalty > 0:
        length = options.max_new_tokens
      if len(finished) == size:
        hopeless = running[0][0] / length**options.length_penalty <= finished[-1][0]
        done = hopeless or options.early_stopping is True
      groups[g] = (running, finished, done or last)
  found = sorted((f for _, finished, _ in groups for f in finished), key=lambda c: -c[0])
  return found[: options.num_return_sequences]


def _search_of_old(log_probs, prompt, options):
  """The search of transformers 4.23 on lists: pool and running hypotheses of one prompt."""
  size, eos, penalty = options.num_beams, set(options.eos_ids), options.length_penalty
  running, pool = [(0.0, [])], []

  def enter(score, ids, length):
    pool.append((score / length**penalty, ids))
    pool.sort(key=lambda found: -found[0])
    del pool[size:]

  for step in range(options.max_new_tokens):
    candidates = sorted((
      (score + lp, [*ids, token])
      for score, ids in running for token, lp in enumerate(log_probs(prompt + ids))
    ), key=lambda c: -c[0])[: 2 * size]
    running = []
    for rank, (score, ids) in enumerate(candidates):
      if ids[-1] not in eos:
        running.append((score, ids))
      elif rank < size:
        enter(score, ids, len(prompt) + step)  # the end token does not count
      if len(running) == size:
        break
    if len(pool) == size:
      bound = candidates[0][0] / (len(prompt) + step) ** penalty
      if options.early_stopping is True or pool[-1][0] >= bound:
        return pool
  for score, ids in running:
    enter(score, ids, len(prompt) + options.max_new_tokens)
  return pool


def _check(tiny, generator, options, search=_slow_search):
  got = generator.generate_ids(PROMPTS, options)
  per_prompt = options.num_return_sequences
  for i, prompt in enumerate(PROMPTS):
    want = search(tiny.log_probs, prompt, options)[:per_prompt]
    mine = got[i * per_prompt : (i + 1) * per_prompt]
    assert [g.ids for g in mine] == [ids for _, ids in want]
    np.testing.assert_allclose([g.score for g in mine], [s for s, _ in want], rtol=2e-4)
    for g in mine:
      assert g.finish_reason == ("eos" if g.ids[-1] in (options.eos_ids or ()) else "length")
      direct = [tiny.log_probs(prompt + g.ids[:n])[t] for n, t in enumerate(g.ids)]
      np.testing.assert_allclose(g.logprobs, direct, rtol=1e-4, atol=2e-4)


@pytest.fixture(scope="module")
def generator(tiny):
  return Generator(tiny.model, tiny.params)


@pytest.mark.parametrize("early", EARLY)
def test_equals_a_slow_search(tiny, generator, early):
  for penalty in (-0.5, 1.0, 2.0):
    _check(tiny, generator, GenerationOptions(
      max_new_tokens=7, num_beams=4, num_return_sequences=4, length_penalty=penalty,
      early_stopping=early, eos_ids=(9, 21),
    ))


@pytest.mark.parametrize("early", [False, True])
def test_total_lengths_are_those_of_an_older_search(tiny, generator, early):
  chosen = []
  for penalty in (-1.0, 0.0, 1.0, 3.0):
    options = GenerationOptions(
      max_new_tokens=6, num_beams=3, num_return_sequences=3, length_penalty=penalty,
      early_stopping=early, eos_ids=(9,), length_basis="total_unpadded")
    _check(tiny, generator, options, _search_of_old)
    other = generator.generate_ids(PROMPTS, dataclasses.replace(options, length_basis="generated"))
    chosen += [a.ids != b.ids for a, b in zip(generator.generate_ids(PROMPTS, options), other)]
  assert any(chosen)


def test_without_end_token_the_best_of_full_length_win(tiny, generator):
  _check(tiny, generator, GenerationOptions(max_new_tokens=5, num_beams=3, num_return_sequences=2))


@pytest.mark.parametrize("early", EARLY)
def test_groups_equal_a_slow_search(tiny, generator, early):
  for penalty in (0.0, 0.5, 3.0):
    _check(tiny, generator, GenerationOptions(
      max_new_tokens=6, num_beams=6, num_beam_groups=3, num_return_sequences=6,
      diversity_penalty=penalty, early_stopping=early, eos_ids=(9,),
    ))


def test_a_large_penalty_drives_groups_apart(generator):
  options = GenerationOptions(
    max_new_tokens=5, num_beams=3, num_beam_groups=3, num_return_sequences=3,
    diversity_penalty=50.0,
  )
  ids = np.array([g.ids for g in generator.generate_ids(PROMPTS[:1], options)])
  assert all(len(set(column)) == 3 for column in ids.T)


def test_one_wide_search_program_serves_other_numbers(generator):
  options = GenerationOptions(max_new_tokens=6, num_beams=4, eos_ids=(9,))
  generator.generate_ids([[1, 2]], options)
  programs = generator.num_programs
  generator.generate_ids([[3] * 9], dataclasses.replace(
    options, max_new_tokens=9, length_penalty=0.3, num_return_sequences=4
  ))
  assert generator.num_programs == programs


def test_the_callback_comes_once_at_the_end(generator):
  options = GenerationOptions(max_new_tokens=6, num_beams=4, num_return_sequences=2)
  seen = {}
  got = generator.generate_ids(PROMPTS, options, seen.__setitem__)
  assert seen == {i: g.ids for i, g in enumerate(got)}


def _llama(seed):
  """A tiny Llama of transformers and the same weights here."""
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  d, h, k, e, f, n = 24, 4, 2, 6, 40, 2
  config = TransformerConfig(
    vocab_size=61, num_layers=n, width=d, num_heads=h, num_kv_heads=k, mlp_width=f, max_length=64,
  )
  torch.manual_seed(seed)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=61, hidden_size=d, num_hidden_layers=n, num_attention_heads=h,
    num_key_value_heads=k, intermediate_size=f, max_position_embeddings=64, rms_norm_eps=1e-5,
    initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    attn_implementation="eager",
  )).float().eval()
  state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

  def stack(name, shape=None):
    leaves = [state[f"model.layers.{i}.{name}.weight"] for i in range(n)]
    return np.stack([w if shape is None else w.T.reshape(shape) for w in leaves])

  params = {
    "embedding": state["model.embed_tokens.weight"],
    "final_norm": {"scale": state["model.norm.weight"]},
    "unembedding": state["lm_head.weight"].T,
    "layers": {
      "attention_norm": {"scale": stack("input_layernorm")},
      "mlp_norm": {"scale": stack("post_attention_layernorm")},
      "attention": {
        name: {"kernel": stack(f"self_attn.{theirs}_proj", shape)} for name, theirs, shape in (
          ("query", "q", (d, h, e)), ("key", "k", (d, k, e)), ("value", "v", (d, k, e)),
          ("out", "o", (h, e, d)),
        )
      },
      "mlp": {
        name: {"kernel": stack(f"mlp.{name}_proj", shape)}
        for name, shape in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d)))
      },
    },
  }
  return model, Generator(Transformer(config), jax.tree.map(jnp.asarray, params))


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_tokens_and_scores_equal_those_of_transformers(seed):
  model, generator = _llama(seed)
  import torch

  torch.set_num_threads(1)  # the machine has XLA's threads already
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(3, 61, n).tolist() for n in (2, 8)]
  eos = (2, 17, 30) if seed else (2,)
  filters = {"repetition_penalty": 1.5, "no_repeat_ngram": 2, "min_new_tokens": 4}
  cases = [(1, False, 1.0, {}), (1, False, 1.0, filters), (4, False, 1.0, filters)]
  cases += [(4, early, penalty, {}) for early in EARLY for penalty in (-0.5, 0.0, 2.0)]
  for beams, early, penalty, more in cases:
    got = generator.generate_ids(prompts, GenerationOptions(
      max_new_tokens=12, num_beams=beams, num_return_sequences=beams, early_stopping=early,
      length_penalty=penalty, eos_ids=eos, **more,
    ))
    more = {k.replace("ngram", "ngram_size"): v for k, v in more.items()}
    for i, prompt in enumerate(prompts):
      with torch.no_grad():
        want = model.generate(
          torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
          max_new_tokens=12, num_beams=beams, num_return_sequences=beams, do_sample=False,
          early_stopping=early, length_penalty=penalty, eos_token_id=list(eos), pad_token_id=0,
          return_dict_in_generate=True, output_scores=True, **more,
        )
      for j, row in enumerate(want.sequences[:, len(prompt) :].tolist()):
        end = next((n for n, token in enumerate(row) if token in eos), len(row))
        mine = got[i * beams + j]
        assert mine.ids == row[: end + 1]
        if beams > 1:
          np.testing.assert_allclose(mine.score, want.sequences_scores[j].item(), rtol=1e-4)
