"""The transformer: sizes, causality, masks, and that execution choices do not change results."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.layers import RMSNorm
from lmops_jax.models.positions import rotary, rotary_angles, rotary_frequencies
from lmops_jax.models.transformer import Transformer, TransformerConfig, num_params
from lmops_jax.sizing.flops import matmul_params

CONFIG = TransformerConfig(
  vocab_size=40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=32
)


@pytest.fixture(scope="module")
def params():
  tokens = jnp.zeros((1, 3), jnp.int32)
  return nn.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens)["params"])


def _tokens(seed=0, length=9):
  return np.random.default_rng(seed).integers(0, 40, (2, length)).astype(np.int32)


def _logits(config, params, *args):
  return jax.jit(lambda p, *a: Transformer(config).apply({"params": p}, *a, method="logits"))(
    params, *args
  )


@pytest.mark.parametrize(
  "layers,width,heads,mlp,count",
  [
    (12, 768, 12, 3072, 162_417_408),
    (24, 1024, 16, 4096, 468_239_360),
    (24, 1536, 16, 6144, 1_004_348_928),
    (24, 2048, 16, 8192, 1_741_785_088),
  ],
)
def test_paper_sizes_have_exactly_the_published_parameters(layers, width, heads, mlp, count):
  config = TransformerConfig(
    vocab_size=32_000, num_layers=layers, width=width, num_heads=heads, mlp_width=mlp
  )
  assert num_params(config) == count
  vectors = (2 * layers + 1) * width  # norm scales; the embedding is a lookup, no product
  assert matmul_params(config) == count - vectors - 32_000 * width


def test_tied_and_grouped_parameters_are_counted_by_hand():
  d, f, v, e = 16, 24, 40, 4
  block = d * 4 * e * 2 + d * 2 * e * 2 + 3 * d * f + 2 * d
  assert num_params(CONFIG) == 2 * block + 2 * v * d + d
  assert num_params(dataclasses.replace(CONFIG, tied_embeddings=True)) == 2 * block + v * d + d


def test_later_tokens_do_not_reach_earlier_logits(params):
  tokens = _tokens()
  changed = tokens.copy()
  changed[:, 5] = (changed[:, 5] + 1) % 40
  a, b = _logits(CONFIG, params, tokens), _logits(CONFIG, params, changed)
  np.testing.assert_array_equal(a[:, :5], b[:, :5])
  assert np.abs(a[:, 5:] - b[:, 5:]).max(axis=(0, 2)).min() > 1e-6


def test_gradient_of_a_position_reads_only_its_past(params):
  tokens = jnp.arange(7)[None]  # one row of the table a position

  def loss(table):
    hidden = Transformer(CONFIG).apply({"params": params | {"embedding": table}}, tokens)
    return jnp.sum(hidden[0, 3] ** 3)

  grads = jax.jit(jax.grad(loss))(params["embedding"])
  reached = np.abs(np.asarray(grads)).max(axis=1) > 0
  np.testing.assert_array_equal(reached[:7], [True] * 4 + [False] * 3)


def _value_and_grad(config, params):
  def f(p):
    logits = Transformer(config).apply({"params": p}, _tokens(1), method="logits")
    return jnp.mean(jnp.square(logits) ** 1.5)

  return jax.jit(jax.value_and_grad(f))(params)


@pytest.fixture(scope="module")
def plain_value_and_grad(params):
  return _value_and_grad(CONFIG, params)


@pytest.mark.parametrize(
  "changes",
  [
    {"scan_layers": False},
    {"remat": "full"},
    {"scan_layers": False, "remat": "dots"},
    {"attention": "chunked", "attention_chunk": 5},
  ],
)
def test_execution_choices_change_neither_logits_nor_gradients(
  params, plain_value_and_grad, changes
):
  got = _value_and_grad(dataclasses.replace(CONFIG, **changes), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, plain_value_and_grad
  )


def test_segments_are_independent_sequences(params):
  first, second = _tokens(2, 4), _tokens(3, 5)
  packed = np.concatenate([first, second], axis=1)
  segments = np.repeat(np.array([[0] * 4 + [1] * 5], np.int32), 2, axis=0)
  positions = np.repeat(np.array([[*range(4), *range(5)]], np.int32), 2, axis=0)
  got = _logits(CONFIG, params, packed, positions, segments)
  np.testing.assert_allclose(got[:, :4], _logits(CONFIG, params, first), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got[:, 4:], _logits(CONFIG, params, second), rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits(params):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  model = Transformer(config)
  hidden = jax.eval_shape(lambda p, t: model.apply({"params": p}, t), params, _tokens())
  logits = _logits(config, params, _tokens())
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  exact = _logits(CONFIG, params, _tokens())
  assert 1e-6 < np.abs(logits - exact).max() < 0.05


def test_float64_model_is_float64_throughout():
  with jax.enable_x64(True):
    config = dataclasses.replace(CONFIG, dtype="float64", param_dtype="float64")
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float64")}
    logits = jax.eval_shape(lambda v, t: model.apply(v, t, method="logits"), variables, tokens)
    assert logits.dtype == jnp.float64


def test_rotary_products_depend_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  frequencies = rotary_frequencies(8, 100.0)

  def product(i, j):
    a = rotary(jnp.asarray(q), rotary_angles(jnp.array([[i]]), frequencies))
    b = rotary(jnp.asarray(k), rotary_angles(jnp.array([[j]]), frequencies))
    return float(jnp.vdot(a, b))

  assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
  assert product(7, 4) != pytest.approx(product(7, 5), abs=1e-3)
  at_zero = rotary(jnp.asarray(q), rotary_angles(jnp.array([[0]]), frequencies))
  np.testing.assert_allclose(at_zero, q, rtol=1e-6)


def test_rms_norm_equals_its_formula():
  x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
  scale = np.linspace(0.5, 2, 16).astype(np.float32)
  got = RMSNorm(CONFIG).apply({"params": {"scale": scale}}, x)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_every_parameter_has_logical_axes_of_its_rank():
  boxed = jax.eval_shape(
    lambda: Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )["params"]
  boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
  for box in boxes:
    assert len(box.names) == box.value.ndim
    assert set(box.names) <= {
      "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "layers",
    }


def test_initial_values_have_the_usual_spread(params):
  assert np.std(params["layers"]["mlp"]["gate"]["kernel"]) == pytest.approx(0.02, rel=0.1)
  assert np.std(params["unembedding"]) == pytest.approx(0.02, rel=0.1)
  assert np.all(np.asarray(params["final_norm"]["scale"]) == 1)
  layers = params["layers"]["mlp"]["gate"]["kernel"]
  assert np.abs(layers[0] - layers[1]).max() > 0.01


def test_token_outside_the_vocabulary_is_not_silent(params):
  tokens = _tokens()
  tokens[1, 2] = 40
  logits = _logits(CONFIG, params, tokens)
  assert np.isfinite(logits[0]).all() and np.isnan(logits[1, 2:]).all()


def test_too_long_a_sequence_is_refused(params):
  with pytest.raises(ValueError, match="33 positions and .*max_length is 32"):
    Transformer(CONFIG).apply({"params": params}, jnp.zeros((1, 33), jnp.int32))


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"num_heads": 3}, "width=16 is not a multiple of num_heads=3"),
    ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
    ({"num_kv_heads": 8}, "num_kv_heads=8 must divide num_heads=4"),
    ({"head_dim": 5}, "head_dim=5 must be even"),
    ({"num_layers": 0}, "num_layers=0 must be an integer of at least 1"),
    ({"width": 16.0}, "width=16.0 must be an integer"),
    ({"attention": "flash"}, "attention='flash' must be 'xla', 'chunked'"),
    ({"remat": "some"}, "remat='some' must be 'none', 'dots' or 'full'"),
    ({"dtype": "float8"}, "dtype='float8' must be 'float32', "),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be a number above 0"),
  ],
)
def test_impossible_configs_are_refused_by_field(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_vocabulary_size_must_be_filled_in():
  with pytest.raises(ValueError, match="vocab_size is not set"):
    num_params(TransformerConfig())
