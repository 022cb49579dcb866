"""Greedy and beam search choose the tokens that transformers chooses, for every family."""

import functools

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.decoding import GenerationOptions, Generator  # noqa: E402
from lmops_jax.pretrained import families, importing  # noqa: E402
from tests.pretrained.tiny_models import CAUSAL, DictSource, make  # noqa: E402

LENGTHS, NUM_NEW, EOS = (3, 7, 5), 10, 2


@functools.cache
def _pair(family):
  peer = make(family)
  table = families.by_name(family)
  config = table.read_config(families.ConfigReader(peer.config.to_dict(), "config.json"))
  params = importing.load_params(DictSource(peer), table, config)
  return peer, Generator(table.module(config), params)


def _prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(3, 61, n).tolist() for n in LENGTHS]


def _theirs(peer, prompts, **options):
  """transformers on one prompt at a time, generated ids without padding."""
  answers = []
  for prompt in prompts:
    out = peer.generate(
      torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      do_sample=False, pad_token_id=1, eos_token_id=EOS, return_dict_in_generate=False, **options,
    )
    for row in out[:, len(prompt) :].tolist():
      answers.append(row[: row.index(EOS) + 1] if EOS in row else row)
  return answers


def _ours(generator, prompts, **options):
  made = generator.generate_ids(prompts, GenerationOptions(eos_ids=(EOS,), **options))
  return [answer.ids for answer in made]


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy(family):
  peer, generator = _pair(family)
  want = _theirs(peer, _prompts(), max_new_tokens=NUM_NEW)
  assert _ours(generator, _prompts(), max_new_tokens=NUM_NEW) == want


@pytest.mark.parametrize("family", CAUSAL)
def test_beam_search(family):
  peer, generator = _pair(family)
  options = dict(max_new_tokens=NUM_NEW, num_beams=4, num_return_sequences=2, length_penalty=0.7)
  assert _ours(generator, _prompts(), **options) == _theirs(peer, _prompts(), **options)


@pytest.mark.parametrize(
  "options",
  [
    dict(num_beams=3, early_stopping=True),
    dict(num_beams=3, early_stopping="never", length_penalty=2.0),
    dict(num_beams=3, early_stopping=False, length_penalty=-1.0, num_return_sequences=3),
    dict(num_beams=2, repetition_penalty=1.4),
    dict(num_beams=2, no_repeat_ngram=2),
    dict(repetition_penalty=1.7, min_new_tokens=6),
    dict(no_repeat_ngram=2),
  ],
)
def test_options(options):
  peer, generator = _pair("gpt2")
  theirs = {("no_repeat_ngram_size" if k == "no_repeat_ngram" else k): v
            for k, v in options.items()}
  want = _theirs(peer, _prompts(), max_new_tokens=NUM_NEW, **theirs)
  assert _ours(generator, _prompts(), max_new_tokens=NUM_NEW, **options) == want
