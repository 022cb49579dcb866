"""Equation 3 against a loop in float64, and against what a model computes behind a prefix."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding import prefixes
from lmops_jax.models.cache import empty_cache
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.systems.structured_prompting import rescaled_attention, structured_logits

M, H, W, T, E = 3, 2, 5, 4, 6


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)
  return dict(q=draw(H, T, E), k_demo=draw(M, H, W, E), v_demo=draw(M, H, W, E),
              k_test=draw(H, T, E), v_test=draw(H, T, E))


def _by_hand(q, k_demo, v_demo, k_test, v_test, scale, bias=None, causal=True):
  """One weight at a time, float64; returns the values and each row's weights."""
  q, k_demo, v_demo, k_test, v_test = (
    x.astype(np.float64) for x in (q, k_demo, v_demo, k_test, v_test))
  groups, heads, width, size = k_demo.shape
  out, rows = np.zeros(q.shape), []
  for h in range(heads):
    for i in range(q.shape[1]):
      weights, values = [], []
      for m in range(groups):
        for j in range(width):
          logit = q[h, i] @ k_demo[m, h, j] / math.sqrt(size)
          logit += 0 if bias is None else float(bias[m, j])
          weights.append(math.exp(logit))
          values.append(v_demo[m, h, j])
      for j in range(k_test.shape[1]):
        if j <= i or not causal:
          weights.append(scale * math.exp(q[h, i] @ k_test[h, j] / math.sqrt(size)))
          values.append(v_test[h, j])
      weights = np.array(weights) / sum(weights)
      rows.append(weights)
      out[h, i] = weights @ np.array(values)
  return out, rows


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.25])
@pytest.mark.parametrize("causal", [True, False])
def test_the_equation_written_out(inputs, scale, causal):
  bias = np.zeros((M, W), np.float32)
  bias[0, :2], bias[2, 0] = -1e9, -1e9  # padding in front of groups 0 and 2
  bias[1] = np.linspace(-1, 1, W)
  for b in (None, bias):
    want, rows = _by_hand(**inputs, scale=scale, bias=b, causal=causal)
    np.testing.assert_allclose([row.sum() for row in rows], 1, rtol=1e-12)
    got = rescaled_attention(**inputs, scale=scale, demo_bias=b, causal=causal)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_bias_may_differ_by_head_and_query(inputs):
  rng = np.random.default_rng(1)
  bias = rng.normal(size=(H, T, M, W)).astype(np.float32)
  got = rescaled_attention(**inputs, scale=2.0, demo_bias=bias)
  for h in range(H):
    for i in range(T):
      want, _ = _by_hand(**inputs, scale=2.0, bias=bias[h, i])
      np.testing.assert_allclose(got[h, i], want[h, i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3])
def test_the_scale_repeats_the_tests_keys(inputs, scale):
  got = rescaled_attention(**inputs, scale=float(scale), causal=False)
  repeated = {**inputs, **{k: np.tile(inputs[k], (1, scale, 1)) for k in ("k_test", "v_test")}}
  scores = [
    jnp.einsum("htd,mhwd->htmw", inputs["q"], inputs["k_demo"]).reshape(H, T, -1),
    jnp.einsum("htd,hsd->hts", inputs["q"], repeated["k_test"])]
  shares = jax.nn.softmax(jnp.concatenate(scores, axis=-1) * E**-0.5, axis=-1)
  values = jnp.concatenate(
    [inputs["v_demo"].transpose(1, 0, 2, 3).reshape(H, -1, E), repeated["v_test"]], axis=1)
  np.testing.assert_allclose(got, shares @ values, rtol=1e-5, atol=1e-6)


def test_extreme_scales_leave_one_side_alone(inputs):
  alone = {**inputs, "k_demo": inputs["k_demo"][:0], "v_demo": inputs["v_demo"][:0]}
  np.testing.assert_allclose(
    rescaled_attention(**inputs, scale=1e12), rescaled_attention(**alone, scale=1.0),
    rtol=1e-5, atol=1e-6)
  bias = np.full((M, W), -np.inf, np.float32)
  np.testing.assert_allclose(
    rescaled_attention(**inputs, scale=3.0, demo_bias=bias), rescaled_attention(**alone, scale=1.0),
    rtol=1e-5, atol=1e-6)
  groups, _ = _by_hand(**{k: v if "test" not in k else v[:, :0] for k, v in inputs.items()},
                       scale=1.0)
  np.testing.assert_allclose(
    rescaled_attention(**inputs, scale=1e-12), groups, rtol=1e-5, atol=1e-6)


def test_copies_of_a_group_cancel_and_their_order_does_not_matter(inputs):
  one = {**inputs, "k_demo": inputs["k_demo"][:1], "v_demo": inputs["v_demo"][:1]}
  three = {**inputs, **{k: np.repeat(one[k], 3, axis=0) for k in ("k_demo", "v_demo")}}
  np.testing.assert_allclose(rescaled_attention(**three, scale=3.0),
                             rescaled_attention(**one, scale=1.0), rtol=1e-5, atol=1e-6)
  turned = {**inputs, **{k: inputs[k][[2, 0, 1]] for k in ("k_demo", "v_demo")}}
  np.testing.assert_allclose(rescaled_attention(**turned, scale=3.0),
                             rescaled_attention(**inputs, scale=3.0), rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_dtype_and_a_float32_softmax(inputs):
  half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs.items()}
  got = rescaled_attention(**half, scale=3.0)
  assert got.dtype == jnp.bfloat16
  want, _ = _by_hand(**{k: np.asarray(v, np.float32) for k, v in half.items()}, scale=3.0)
  np.testing.assert_allclose(got.astype(np.float32), want, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_refuses_scales_without_meaning(inputs, scale):
  with pytest.raises(ValueError, match="must be finite and positive"):
    rescaled_attention(**inputs, scale=scale)


# ------------------------------------------------------------------------------- behind a model


@pytest.fixture(scope="module")
def one_layer():
  config = TransformerConfig(
    vocab_size=32, num_layers=1, width=16, num_heads=4, mlp_width=24, max_length=48,
    positions="learned")
  model = Transformer(config)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
  return model, jax.tree.map(lambda p: p * (20 if p.std() > 0 else 1), params)


def _groups():
  rng, lengths = np.random.default_rng(0), (5, 3, 4)
  ids, mask = np.zeros((3, 5), np.int32), np.zeros((3, 5), bool)
  for row, n in enumerate(lengths):
    ids[row, 5 - n :], mask[row, 5 - n :] = rng.integers(3, 30, n), True
  return ids, mask


def test_a_models_layer_computes_the_equation(one_layer):
  model, params = one_layer
  ids, mask = _groups()
  prefix = prefixes.read_groups(model, params, ids, mask)
  test = np.array([[5, 6, 7, 8]], np.int32)
  positions = 5 + np.arange(4)[None]
  _, cache, found = model.apply(
    {"params": params}, test, empty_cache(model.config, 1, 4), positions=positions, shared=prefix,
    readout=np.arange(4)[None], method="extend")
  slots = prefix.cache.num_slots // 3

  def of_groups(x):
    return np.asarray(x)[0].reshape(4, 3, slots, 4).transpose(1, 0, 2, 3)

  seen = np.asarray(prefix.cache.valid)[0].reshape(3, slots)
  got = rescaled_attention(
    found.queries[0, 0].transpose(1, 0, 2), of_groups(prefix.cache.keys[0]),
    of_groups(prefix.cache.values[0]), cache.keys[0][0], cache.values[0][0], 3.0,
    demo_bias=np.where(seen, 0, -1e9))
  out = jax.tree.map(lambda p: p[0], params["layers"])["attention"]["out"]
  want = jnp.einsum("hte,hed->td", got, out["kernel"]) + out.get("bias", 0)
  np.testing.assert_allclose(found.attention[0, 0], want, rtol=2e-4, atol=2e-4)


def test_a_batch_is_its_rows_and_padding_does_not_matter(one_layer):
  model, params = one_layer
  prefix = prefixes.read_groups(model, params, *_groups())
  rows = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
  both = structured_logits(model, params, prefix, rows)
  assert both.shape == (2, 4, 32) and both.dtype == jnp.float32
  for i in range(2):
    np.testing.assert_allclose(
      structured_logits(model, params, prefix, rows[i : i + 1])[0], both[i], rtol=1e-5, atol=1e-5)
  right = structured_logits(model, params, prefix, rows, [[1, 1, 1, 1], [1, 1, 0, 0]])
  left = structured_logits(
    model, params, prefix, [rows[0], [0, 0, 9, 10]], [[1, 1, 1, 1], [0, 0, 1, 1]])
  np.testing.assert_allclose(right[0], both[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(right[1, :2], both[1, :2], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(left[1, 2:], both[1, :2], rtol=1e-5, atol=1e-5)
  nothing = structured_logits(model, params, prefix, rows, [[1, 1, 1, 1], [0, 0, 0, 0]])
  assert np.isfinite(left).all() and np.isfinite(right).all() and np.isfinite(nothing).all()


def test_refuses_another_models_prefix_and_rows_beyond_the_table(one_layer):
  model, params = one_layer
  prefix = prefixes.read_groups(model, params, *_groups())
  deeper = Transformer(TransformerConfig(
    vocab_size=32, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=48))
  with pytest.raises(ValueError, match="prefix has 1 layers .* model 2"):
    structured_logits(deeper, params, prefix, [[5]])
  learned = Transformer(TransformerConfig(
    vocab_size=32, num_layers=1, width=16, num_heads=4, mlp_width=24, max_length=8,
    positions="learned"))
  own = nn.unbox(learned.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
  prefix = prefixes.read_groups(learned, own, *_groups())
  with pytest.raises(ValueError, match="4 tokens behind a prefix that ends at position 5.*at 8"):
    structured_logits(learned, own, prefix, [[5, 6, 7, 8]])
  fits = structured_logits(learned, own, prefix, [[5, 6, 7, 0]], [[1, 1, 1, 0]])
  assert np.isfinite(fits).all()
  with pytest.raises(ValueError, match="token id 32, outside of the model's vocabulary of 32"):
    structured_logits(learned, own, prefix, [[5, 32, 7]])
  with pytest.raises(ValueError, match="test_ids .*test_mask"):
    structured_logits(learned, own, prefix, [[5, 6, 7]], [[1, 1]])
