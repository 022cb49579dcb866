"""Recorded quantities against a naive forward pass over the whole text."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding.prefixes import read_text
from lmops_jax.models import layers, positions
from lmops_jax.models.transformer import Transformer, TransformerConfig, unstack_layers
from lmops_jax.systems.meta_optimizer.record import predict, record

CONTEXT = np.array([1, 5, 9, 4, 2, 8, 8, 2], np.int32)
ROWS = ([7, 3, 11, 6], [12, 4], [5, 5, 5, 30, 2, 19])
LABELS = [4, 17, 9]


def _padded(rows, width=6, left=False):
  ids, mask = np.full((len(rows), width), 13, np.int32), np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    place = slice(width - len(row), None) if left else slice(len(row))
    ids[i, place], mask[i, place] = row, True
  return ids, mask


@functools.partial(jax.jit, static_argnums=0)
def _naive(model, params, tokens):
  """Per layer: sub-layer output `[T,D]`, queries `[T,H,E]`, dense scores `[H,T,T]`; logits."""
  c = model.config
  outputs, queries, scores = [], [], []
  x = model.apply({"params": params}, tokens[None], jnp.arange(len(tokens))[None], None,
                  method="embed")
  angles = None
  if c.positions == "rotary":
    angles = positions.rotary_angles(
      np.arange(len(tokens))[None], positions.rotary_frequencies(c.head_width, c.rope_base))
  for of in unstack_layers(params)["layers"]:
    normed = layers.norm(c).apply({"params": of["attention_norm"]}, x)
    attention = of["attention"]

    def product(name, attention=attention, normed=normed):
      out = jnp.einsum("bsd,dhe->bshe", normed, attention[name]["kernel"])
      return out + attention[name].get("bias", 0)

    q, k, v = product("query"), product("key"), product("value")
    if angles is not None:
      q, k = positions.rotary(q, angles), positions.rotary(k, angles)
    q = q * (c.attention_scale or c.head_width**-0.5)
    k, v = (jnp.repeat(y, c.num_heads // c.key_heads, axis=2) for y in (k, v))
    s = jnp.einsum("bqhe,bkhe->bhqk", q, k)[0]
    if c.positions == "alibi":
      distance = np.arange(len(tokens))[None] - np.arange(len(tokens))[:, None]
      s = s - positions.alibi_slopes(c.num_heads)[:, None, None] * np.abs(distance)
    seen = np.tril(np.ones(s.shape[1:], bool))
    out = jnp.einsum("hqk,bkhe->bqhe", jax.nn.softmax(jnp.where(seen, s, -jnp.inf)), v)
    out = jnp.einsum("bqhe,hed->bqd", out, attention["out"]["kernel"])
    out = out + attention["out"].get("bias", 0)
    outputs.append(out[0])
    queries.append(q[0])
    scores.append(s)
    x = x + out
    y = layers.norm(c).apply({"params": of["mlp_norm"]}, x)
    x = x + layers.MLP(c).apply({"params": of["mlp"]}, y)
  x = layers.norm(c).apply({"params": params["final_norm"]}, x)
  logits = model.apply({"params": params}, x, method="unembed")[0]
  want = model.apply({"params": params}, tokens[None], method="logits")[0]
  return outputs, queries, scores, logits, want


@functools.cache
def _wanted(tiny, kind, context, row):
  model, params = tiny(kind)
  tokens = np.full(15, 6, np.int32)  # later tokens are not seen
  tokens[: len(context) + len(row)] = [*context, *row]
  *found, logits, want = map(np.asarray, _naive(model, params, tokens))
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
  return *found, logits


@pytest.mark.parametrize("kind, readout, with_context", [
  ("llama", "prompt", True), ("llama", "first_label", False), ("gpt2", "prompt", False),
  ("gpt2", "first_label", True), ("alibi", "prompt", True), ("alibi", "first_label", False),
  ("scaled", "first_label", True),
])
def test_equals_the_whole_text_at_once(tiny, kind, readout, with_context):
  model, params = tiny(kind)
  context = CONTEXT if with_context else CONTEXT[:0]
  prefix = read_text(model, params, CONTEXT) if with_context else None
  found = record(model, params, *_padded(ROWS), prefix, readout, label_ids=LABELS)
  found = {name: np.asarray(value) for name, value in found.items()}
  n = len(context)
  for i, row in enumerate(ROWS):
    own = [*row, LABELS[0]] if readout == "first_label" else row
    outputs, queries, scores, logits = _wanted(tiny, kind, tuple(context), tuple(own))
    at = n + len(own) - 1
    for layer in range(2):
      def close(name, want, got):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)

      close("attn_out", outputs[layer][at], found["attn_out"][i, layer])
      close("q", queries[layer][at].reshape(-1), found["q"][i, layer])
      close("raw", scores[layer][:, at, n : at + 1], found["raw"][i, layer][:, : len(own)])
      assert not found["raw"][i, layer][:, len(own) :].any()
      if with_context:
        slots = np.asarray(prefix.cache.valid)[0]
        close("ctx", scores[layer][:, at, :n].sum(0), found["ctx"][i, layer][slots])
        assert not found["ctx"][i, layer][~slots].any()
    answer = logits[n + len(row) - 1][LABELS]
    assert found["pred"][i] == np.argmax(answer)
  width = 6 + (readout == "first_label")
  assert found["raw"].shape == (3, 2, 4, width)
  assert found["ctx"].shape[2] == (prefix.cache.num_slots if with_context else 0)


def test_scores_at_the_sizes_of_a_published_model():
  config = TransformerConfig(
    vocab_size=31, num_layers=2, width=32, num_heads=9, num_kv_heads=3, head_dim=64, mlp_width=32)
  model = Transformer(config)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
  params = jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)
  prefix = read_text(model, params, np.arange(100) % 31)
  found = record(model, params, *_padded(ROWS), prefix, label_ids=LABELS)
  slots = np.asarray(prefix.cache.valid)[0]
  for layer in range(2):
    q = np.asarray(found["q"])[:, layer].reshape(3, 3, 3, 64)
    want = np.einsum("qkge,kme->qm", q, np.asarray(prefix.cache.keys[layer])[0])
    np.testing.assert_allclose(
      found["ctx"][:, layer][:, slots], want[:, slots], rtol=1e-4, atol=1e-4)


def test_padding_and_batching_change_nothing(tiny):
  model, params = tiny("alibi")
  prefix = read_text(model, params, CONTEXT)
  right = record(model, params, *_padded(ROWS), prefix, label_ids=LABELS)
  left = record(model, params, *_padded(ROWS, left=True), prefix, label_ids=LABELS)
  wide = record(model, params, *_padded(ROWS[:1], width=9), prefix, label_ids=LABELS)
  for name in ("attn_out", "ctx", "q", "pred"):
    np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wide[name][0], right[name][0], rtol=1e-5, atol=1e-5)
  for i, row in enumerate(ROWS):
    np.testing.assert_allclose(
      left["raw"][i, ..., 6 - len(row) :], right["raw"][i, ..., : len(row)], rtol=1e-5, atol=1e-5)


def test_other_parameters_run_the_same_program(tiny):
  from lmops_jax.systems.meta_optimizer import record as module

  model, params = tiny("llama")
  module._record.clear_cache()
  for scale in (1.0, 1.5):
    changed = jax.tree.map(lambda p, scale=scale: p * scale, params)
    record(model, changed, *_padded(ROWS), read_text(model, changed, CONTEXT), label_ids=LABELS)
  assert module._record._cache_size() == 1


def test_any_token_may_be_predicted(tiny):
  model, params = tiny("llama")
  found = record(model, params, *_padded(ROWS), read_text(model, params, CONTEXT))
  for i, row in enumerate(ROWS):
    logits = _wanted(tiny, "llama", tuple(CONTEXT), tuple(row))[3][len(CONTEXT) + len(row) - 1]
    assert found["pred"][i] == np.argmax(logits)


def test_predictions_without_context(tiny):
  model, params = tiny("llama")
  ids, mask = _padded([[1, *row] for row in ROWS], width=8)
  got = predict(model, params, ids, mask, jnp.array(LABELS))
  bos = read_text(model, params, [1])
  want = record(model, params, *_padded(ROWS), bos, label_ids=LABELS)["pred"]
  np.testing.assert_array_equal(got, want)


def test_bad_input_is_refused(tiny):
  model, params = tiny("gpt2")
  ids, mask = _padded(ROWS)
  with pytest.raises(ValueError, match="readout='last' is not one of prompt, first_label"):
    record(model, params, ids, mask, readout="last")
  with pytest.raises(ValueError, match="needs label_ids"):
    record(model, params, ids, mask, readout="first_label")
  with pytest.raises(ValueError, match="mask \\(3, 5\\)"):
    record(model, params, ids, mask[:, 1:])
  empty = mask.copy()
  empty[1] = False
  with pytest.raises(ValueError, match="query 1 is empty"):
    record(model, params, ids, empty)
  with pytest.raises(ValueError, match="positions end at 64"):
    record(model, params, ids, mask, read_text(model, params, np.ones(60, np.int32)))
  other, of_other = tiny("llama")
  with pytest.raises(ValueError, match="read it with this model"):
    record(model, params, ids, mask, read_text(other, of_other, CONTEXT))
