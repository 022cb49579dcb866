"""Groups in front of rows against transformers: one sequence, positions and a dense mask.

All groups and a row stand in one sequence. The mask keeps the groups apart, lets the row see all of
them, and adds `ln M` where the row sees itself; the positions repeat.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lmops_jax.decoding import prefixes  # noqa: E402
from lmops_jax.decoding.scoring import OptionScorer, Request  # noqa: E402
from lmops_jax.models.transformer import Transformer  # noqa: E402
from lmops_jax.systems.structured_prompting import structured_logits  # noqa: E402
from tests.pretrained import tiny_models  # noqa: E402

pytestmark = pytest.mark.parity

BOS = 3
LENGTHS = {1: (5,), 2: (3, 6), 3: (6, 2, 4)}
TESTS = np.random.default_rng(7).integers(4, 61, (2, 5)).astype(np.int32)
FAMILIES = ("gpt2", "opt", "xglm", "bloom", "llama")


def _groups(num_groups):
  rng, lengths = np.random.default_rng(num_groups), LENGTHS[num_groups]
  width = max(lengths)
  ids, mask = np.zeros((num_groups, width), np.int32), np.zeros((num_groups, width), bool)
  for row, n in enumerate(lengths):
    ids[row, width - n :], mask[row, width - n :] = rng.integers(4, 61, n), True
  return ids, mask


def _sequence(ids, mask, test, bos, scale, window=None):
  """Tokens, positions and mask `[S,S]` of all of it in one sequence."""
  width = ids.shape[1] if window is None else window
  tokens, positions, owner = [], [], []  # owner: -1 BOS, groups from 0, the test the last
  if bos is not None:
    tokens, positions, owner = [bos], [0], [-1]
  front = len(tokens)
  for m, (row, there) in enumerate(zip(ids, mask)):
    group = row[there].tolist()
    tokens += group
    positions += range(width - len(group) + front, width + front)
    owner += [m] * len(group)
  tokens += test.tolist()
  positions += range(width + front, width + front + len(test))
  owner += [len(ids)] * len(test)
  size = len(tokens)
  bias = np.full((size, size), -np.inf)
  for i in range(size):
    for j in range(i + 1):
      if owner[j] in (-1, owner[i]) or owner[i] == len(ids):
        bias[i, j] = math.log(scale) if owner[i] == owner[j] == len(ids) else 0.0
  return np.array(tokens), np.array(positions), bias


def _peer_logits(peer, tokens, positions, bias, monkeypatch):
  """`[S,V]` of the peer in float32."""
  tokens, places = torch.tensor(tokens)[None], torch.tensor(positions)[None]
  bias = torch.tensor(np.maximum(bias, np.finfo(np.float32).min), dtype=torch.float32)[None, None]
  kwargs = {"position_ids": places}
  if peer.config.model_type == "bloom":  # its bias counts what is not masked
    heads = peer.config.n_head
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]

    def alibi(attention_mask, num_heads, dtype):
      return (torch.tensor(slopes)[:, None, None] * places[:, None]).to(dtype)

    monkeypatch.setattr(peer.transformer, "build_alibi_tensor", alibi)
    kwargs = {}
  with torch.no_grad():
    return peer(tokens, attention_mask=bias, use_cache=False, **kwargs).logits[0].numpy()


def _assert_equal(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_sequence_with_a_dense_mask(family, bos, monkeypatch):
  peer, _, config, params = tiny_models.imported(family)
  model = Transformer(config)
  for num_groups in LENGTHS:
    ids, mask = _groups(num_groups)
    for scale in (None, 1.0) if num_groups == 3 else (None,):
      prefix = prefixes.read_groups(model, params, ids, mask, bos_id=bos, scale=scale)
      got = structured_logits(model, params, prefix, TESTS)
      for row, test in enumerate(TESTS):
        whole = _sequence(ids, mask, test, bos, scale or num_groups)
        want = _peer_logits(peer, *whole, monkeypatch)[-len(test) :]
        _assert_equal(got[row], want)
      assert np.ptp(want) > 1  # random weights, but not a flat distribution


def test_the_sequence_itself_is_ordinary_with_one_group(monkeypatch):
  """Of one group the mask is the causal one and positions go on: the peer's own forward."""
  for family in FAMILIES:
    peer = tiny_models.make(family)
    tokens, positions, bias = _sequence(*_groups(1), TESTS[0], BOS, 1)
    np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    with torch.no_grad():
      want = peer(torch.tensor(tokens)[None]).logits[0].numpy()
    _assert_equal(_peer_logits(peer, tokens, positions, bias, monkeypatch), want)
    monkeypatch.undo()


@pytest.mark.parametrize("family, variant", [
  ("opt", 1), ("bloom", 1), ("llama", 1)])
def test_other_variants_and_a_wider_window(family, variant, monkeypatch):
  peer, _, config, params = tiny_models.imported(family, variant)
  model = Transformer(config)
  ids, mask = _groups(3)
  for window in (None, 9):
    prefix = prefixes.read_groups(model, params, ids, mask, bos_id=BOS, window=window)
    got = structured_logits(model, params, prefix, TESTS)
    for row, test in enumerate(TESTS):
      whole = _sequence(ids, mask, test, BOS, 3, window)
      _assert_equal(got[row], _peer_logits(peer, *whole, monkeypatch)[-len(test) :])


@pytest.mark.parametrize("family", ["xglm", "bloom"])
def test_options_after_a_prompt_are_the_concatenation(family, monkeypatch):
  peer, _, config, params = tiny_models.imported(family)
  model, bos = Transformer(config), BOS if family == "xglm" else None
  ids, mask = _groups(3)
  prefix = prefixes.read_groups(model, params, ids, mask, bos_id=bos)
  prompts, options = [[5, 6, 7, 8], [9, 4]], [[8], [10, 11], [12, 13, 14]]
  scorer = OptionScorer(model, params)
  found = scorer.score([Request(prompt, options) for prompt in prompts], prefix=prefix)
  for prompt, of_prompt in zip(prompts, found):
    alone, = scorer.score([Request(prompt, options)], prefix=prefix)
    for option, got, single in zip(options, of_prompt, alone):
      whole = _sequence(ids, mask, np.array(prompt + option), bos, 3)
      logits = _peer_logits(peer, *whole, monkeypatch).astype(np.float64)
      logits = logits[-len(prompt + option) :][len(prompt) - 1 : -1]
      every = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
      every -= logits.max(-1, keepdims=True)
      _assert_equal(got, every[np.arange(len(option)), option])
      _assert_equal(single, got)
