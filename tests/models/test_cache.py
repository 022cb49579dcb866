"""Cached decoding equals the uncached model: every kind of position, ragged rows, branches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models import cached_attention
from lmops_jax.models.cache import Prefix, empty_cache
from lmops_jax.models.transformer import Transformer, TransformerConfig, unstack_layers

BASE = dict(vocab_size=23, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32)
PLAIN = dict(norm="layer", gated_mlp=False, activation="gelu_tanh")
CONFIGS = {
  "llama": TransformerConfig(**BASE, num_kv_heads=2),
  "learned": TransformerConfig(**BASE, **PLAIN, positions="learned", position_offset=2),
  "alibi": TransformerConfig(**BASE, **PLAIN, positions="alibi", embedding_norm=True),
  "window": TransformerConfig(**BASE, sliding_window=3),
  "parallel": TransformerConfig(
    **BASE, **PLAIN, norm_placement="parallel", rotary_dim=2, rotary_interleaved=True
  ),
  "momentum": TransformerConfig(**BASE, num_kv_heads=2, momentum=0.7),
  "kosmos": TransformerConfig(
    **BASE, **PLAIN, positions="sinusoidal", position_offset=2, embedding_scale=4.0, sub_norm=True,
    xpos=True, rotary_interleaved=True, residual_scale=1.5
  ),
}


@functools.cache
def _model(name):
  model = Transformer(CONFIGS[name])
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"])
  # Larger than at initialisation, so that attention is far from uniform.
  return model, jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)


def _tokens(batch, length, seed=0):
  return np.random.default_rng(seed).integers(0, 23, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "method", "fresh", "in_blocks"))
def _apply(model, params, *args, in_blocks=False, **kwargs):
  del in_blocks  # only keeps programs apart
  return model.apply({"params": params}, *args, **kwargs)


_extend = functools.partial(_apply, method="extend")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stacked", [True, False])
def test_piece_by_piece_equals_all_at_once(name, stacked):
  model, params = _model(name)
  tokens = _tokens(2, 9)
  want = _apply(model, params, tokens)
  params = params if stacked else unstack_layers(params)
  cache = empty_cache(model.config, 2, 12)
  pieces, start = [], 0
  for length, fresh in ((5, True), (1, False), (3, False)):
    positions = np.broadcast_to(np.arange(start, start + length), (2, length))
    hidden, cache = _extend(
      model, params, tokens[:, start : start + length], cache, positions=positions, fresh=fresh
    )
    pieces.append(hidden)
    start += length
  assert int(cache.length) == 9
  np.testing.assert_allclose(np.concatenate(pieces, 1), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_never_seen(name, side):
  model, params = _model(name)
  lengths, width = (3, 6), 6
  rows = [_tokens(1, n, seed=n)[0] for n in lengths]
  more = _tokens(2, 2, seed=9)
  tokens, valid = np.full((2, width), 7, np.int32), np.zeros((2, width), bool)
  for row, ids in enumerate(rows):
    place = slice(width - len(ids), None) if side == "left" else slice(len(ids))
    tokens[row, place], valid[row, place] = ids, True
  positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
  cache = empty_cache(model.config, 2, 10)
  first, cache = _extend(
    model, params, tokens, cache, positions=positions, valid=valid, fresh=True
  )
  after = np.array(lengths)[:, None] + np.arange(2)
  second, _ = _extend(model, params, more, cache, positions=after)
  for row, ids in enumerate(rows):
    alone = _apply(model, params, np.concatenate([ids, more[row]])[None])[0]
    np.testing.assert_allclose(
      first[row][valid[row]], alone[: len(ids)], rtol=2e-5, atol=2e-5
    )
    np.testing.assert_allclose(second[row], alone[len(ids) :], rtol=2e-5, atol=2e-5)


def test_branches_see_the_shared_context_and_themselves():
  for name in ("llama", "alibi", "learned", "momentum"):
    model, params = _model(name)
    context, options = _tokens(1, 4), [_tokens(1, 2, seed=1), _tokens(1, 3, seed=2)]
    tokens = np.concatenate([context, *options], 1)
    branch = np.array([[0] * 4 + [1] * 2 + [2] * 3])
    positions = np.array([[0, 1, 2, 3, 4, 5, 4, 5, 6]])
    for fresh in (True, False):
      cache = empty_cache(model.config, 1, 9)
      hidden, _ = _extend(
        model, params, tokens, cache, positions=positions, branch=branch, fresh=fresh
      )
      for option, place in zip(options, (slice(4, 6), slice(6, 9))):
        alone = _apply(model, params, np.concatenate([context, option], 1))[0, 4:]
        np.testing.assert_allclose(hidden[0, place], alone, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_context_is_a_context_of_every_row(name, in_blocks, monkeypatch):
  if in_blocks:  # of the 24 queries and 6 keys, neither of which they divide
    monkeypatch.setattr(cached_attention, "_WHOLE_BYTES", 1)
    monkeypatch.setattr(cached_attention, "_BLOCK_QUERIES", 5)
    monkeypatch.setattr(cached_attention, "_BLOCK_KEYS", 4)
  model, params = _model(name)
  context, rows = _tokens(1, 4), _tokens(4, 6, seed=1)
  padded = np.concatenate([np.full((1, 2), 9, np.int32), context], 1)
  valid = np.array([[False] * 2 + [True] * 4])
  positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
  _, shared = _extend(
    model, params, padded, empty_cache(model.config, 1, 6), positions=positions, valid=valid,
    fresh=True,
  )
  cache = empty_cache(model.config, 4, 6)
  hidden, _ = _extend(
    model, params, rows, cache, positions=np.broadcast_to(4 + np.arange(6), (4, 6)),
    shared=Prefix(shared, 4, 0.0), in_blocks=in_blocks,
  )
  want = _apply(model, params, np.concatenate([np.repeat(context, 4, 0), rows], 1))
  np.testing.assert_allclose(hidden, want[:, 4:], rtol=2e-5, atol=2e-5)


def test_an_encoder_has_no_cache():
  config = TransformerConfig(**BASE, causal=False)
  cache = empty_cache(config, 1, 4)
  with pytest.raises(ValueError, match="causal is False"):
    jax.eval_shape(
      lambda: Transformer(config).init(
        jax.random.key(0), jnp.zeros((1, 2), jnp.int32), cache,
        positions=jnp.zeros((1, 2), jnp.int32), method="extend",
      )
    )
