"""T5's relative biases: buckets by exact arithmetic, packed rows, one table, and kinds refused."""

import dataclasses
import functools
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.encoders import TextEncoder, TextEncoderConfig
from lmops_jax.models.positions import relative_bias, relative_buckets
from lmops_jax.models.stacks import with_top
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.models.vision import VisionConfig

TRUNK = TransformerConfig(
  vocab_size=24, num_layers=3, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=12,
  norm="layer", norm_placement="post", final_norm=False, positions="learned", gated_mlp=False,
  causal=False, relative_buckets=8, relative_distance=6)
E = 12
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]] * 8)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0]] * 8)
TOKENS = np.random.default_rng(0).integers(0, 24, (8, E)).astype(np.int32)


@functools.cache
def _boxed(top_layers=0):
  encoder = TextEncoder(TextEncoderConfig(TRUNK, top_layers))
  return jax.jit(encoder.init)(jax.random.key(0), TOKENS)["params"]


@functools.cache
def _params():
  made = nn.unbox(_boxed())
  table = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
  trunk = jax.tree.map(lambda x: 3 * x, made["trunk"])
  return {"trunk": {**trunk, "relative_bias": table}}


@functools.partial(jax.jit, static_argnames=("trunk", "top_layers"))
def _features(params, tokens=TOKENS, positions=POSITIONS, segments=SEGMENTS, trunk=TRUNK,
              top_layers=0):
  encoder = TextEncoder(TextEncoderConfig(trunk, top_layers))
  return encoder.apply({"params": params}, tokens, positions, segments, method="features")


@pytest.mark.parametrize("num_buckets, far", [(32, 128), (8, 6), (64, 1000), (4, 2)])
def test_buckets_equal_their_definition(num_buckets, far):
  """The i-th shared row of k starts at `single * (far / single)^(i/k)`, compared as k-th powers."""
  half, single = num_buckets // 2, num_buckets // 4
  rest = half - single

  def bucket(distance):
    size = abs(distance)
    if size >= single:
      ratio, step = Fraction(size, single) ** rest, Fraction(far, single)
      size = single + max(i for i in range(rest) if ratio >= step**i)
    return size + half * (distance > 0)

  distances = np.arange(-2 * far, 2 * far + 1)
  got = relative_buckets(distances, num_buckets, far)
  np.testing.assert_array_equal(got, [bucket(int(d)) for d in distances])
  assert set(got) == set(range(num_buckets)) - {half}  # a later key is never at distance 0


def test_a_bias_is_read_by_distance_alone():
  table = np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)
  bias = relative_bias(jnp.asarray(table), 9, 6)
  for query, key in ((0, 8), (8, 0), (4, 4), (3, 5)):
    row = relative_buckets(np.array(key - query), 8, 6)
    np.testing.assert_array_equal(bias[:, query, key], table[row])


def test_a_packed_span_has_the_vectors_that_it_has_alone():
  packed, alone = _features(_params()), np.zeros_like(TOKENS)
  alone[:, :6] = TOKENS[:, 4:10]
  positions = np.arange(E)[None] + 0 * TOKENS
  got = _features(_params(), alone, positions, (positions < 6).astype(np.int64))
  np.testing.assert_allclose(got[:, :6], packed[:, 4:10], rtol=1e-5, atol=1e-5)
  none = {"trunk": {**_params()["trunk"], "relative_bias": np.zeros((8, 4), np.float32)}}
  assert np.abs(_features(none) - packed).max() > 0.1


def test_all_layers_share_one_table_also_in_two_stacks():
  split = with_top(_params(), 1)
  assert "relative_bias" in split["trunk"] and split["top"].keys() == {"layers"}
  assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, nn.unbox(jax.eval_shape(
    lambda: _boxed(1))))
  np.testing.assert_allclose(
    _features(split, top_layers=1), _features(_params()), rtol=1e-5, atol=1e-5)


def _gradient(trunk):
  def loss(params):
    return jnp.sum(jnp.sin(_features(params, trunk=trunk)))

  return jax.jit(jax.grad(loss))(_params())


@pytest.mark.parametrize("changes", [
  {"attention": "chunked", "attention_chunk": 5},
  pytest.param({"scan_layers": False, "remat": "full"}, marks=pytest.mark.slow)],
  ids=["chunked", "unrolled"])
def test_execution_choices_change_nothing(changes):
  want = _gradient(TRUNK)
  assert np.abs(want["trunk"]["relative_bias"]).max() > 1e-2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    _gradient(dataclasses.replace(TRUNK, **changes)), want)


def test_all_hidden_states_have_the_bias():
  trunk = dataclasses.replace(TRUNK, positions="none", norm_placement="pre", final_norm=True)
  params = {**_params()["trunk"], "final_norm": {"scale": np.ones(16), "bias": np.zeros(16)}}
  model = Transformer(trunk, with_unembedding=False)
  whole, states = (
    jax.jit(lambda m=method: model.apply({"params": params}, TOKENS, None, SEGMENTS, method=m))()
    for method in (None, "all_hidden"))
  np.testing.assert_allclose(states[-1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sharded_equals_single():
  params = _params()
  want = _features(params)
  partitioner = MeshConfig(2, 2, 2).build()
  with partitioner.activate():
    placed = jax.device_put(params, partitioner.shardings(_boxed(), uneven="whole"))
    assert "tensor" in placed["trunk"]["relative_bias"].sharding.spec
    batch = partitioner.place_batch({"t": TOKENS, "p": POSITIONS, "s": SEGMENTS})
    got = _features(placed, batch["t"], batch["p"], batch["s"])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes, message", [
  ({"causal": True}, "relative_buckets=8 needs causal=False: .* cached decoding has none"),
  ({"attention": "cudnn"}, "attention='cudnn' takes no relative biases; set"),
  ({"attention": "splash"}, "attention='splash' takes no relative biases; set"),
  ({"positions": "alibi"}, "relative_buckets=8 and positions='alibi' both add"),
  ({"relative_buckets": 6}, "relative_buckets=6 and relative_distance=6; the first must be a mult"),
  ({"relative_distance": 2}, "relative_distance=2; .* the second more than a quarter"),
])
def test_what_cannot_work_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TRUNK, **changes)


def test_trunks_without_a_table_are_refused():
  with pytest.raises(ValueError, match="VisionConfig.trunk must have .* and relative_buckets=0"):
    VisionConfig(dataclasses.replace(TRUNK, positions="none", max_length=300))
  alone = Transformer(TRUNK, with_unembedding=False, with_embedding=False)
  with pytest.raises(ValueError, match="this trunk without embeddings has no table of biases"):
    jax.eval_shape(lambda: alone.init(jax.random.key(0), jnp.zeros((1, 3, 16)), method="encode"))


def _t5(**changes):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  torch.manual_seed(0)
  config = transformers.T5Config(
    vocab_size=24, d_model=16, d_kv=6, d_ff=24, num_layers=3, num_heads=4, dropout_rate=0.0,
    feed_forward_proj="relu", initializer_factor=4.0, is_encoder_decoder=False, **changes)
  return torch, transformers.T5EncoderModel(config).float().eval()


@pytest.mark.parity
@pytest.mark.parametrize("num_buckets, far", [(32, 128), (16, 40)])
def test_buckets_and_biases_equal_those_of_transformers(num_buckets, far):
  torch, model = _t5(relative_attention_num_buckets=num_buckets,
                     relative_attention_max_distance=far)
  attention = model.encoder.block[0].layer[0].SelfAttention
  distances = np.arange(-700, 701)
  want = attention._relative_position_bucket(torch.tensor(distances), True, num_buckets, far)
  np.testing.assert_array_equal(relative_buckets(distances, num_buckets, far), want.numpy())
  table = attention.relative_attention_bias.weight.detach().numpy()
  bias = attention.compute_bias(150, 150)[0].detach().numpy()
  np.testing.assert_array_equal(relative_bias(jnp.asarray(table), 150, far), bias)


@pytest.mark.parity
def test_t5s_encoder_is_one_of_its_configurations():
  torch, model = _t5(relative_attention_num_buckets=8, relative_attention_max_distance=6)
  state = {name: x.detach().numpy() for name, x in model.state_dict().items()}

  def stack(name, *shape):
    weights = [state[f"encoder.block.{i}.layer.{name}.weight"].T for i in range(3)]
    return np.stack([w.reshape(shape or w.shape) for w in weights])

  params = {
    "embedding": state["shared.weight"], "final_norm": {
      "scale": state["encoder.final_layer_norm.weight"]},
    "relative_bias": state[
      "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    "layers": {
      "attention_norm": {"scale": stack("0.layer_norm")},
      "mlp_norm": {"scale": stack("1.layer_norm")},
      "attention": {
        **{ours: {"kernel": stack(f"0.SelfAttention.{theirs}", 16, 4, 6)}
           for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))},
        "out": {"kernel": stack("0.SelfAttention.o", 4, 6, 16)}},
      "mlp": {"up": {"kernel": stack("1.DenseReluDense.wi")},
              "down": {"kernel": stack("1.DenseReluDense.wo")}}}}
  trunk = TransformerConfig(
    vocab_size=24, num_layers=3, width=16, num_heads=4, head_dim=6, mlp_width=24, max_length=12,
    norm_eps=1e-6, positions="none", attention_scale=1.0, activation="relu", gated_mlp=False,
    causal=False, relative_buckets=8, relative_distance=6)
  valid = np.arange(E) < 9
  with torch.no_grad():
    want = model(torch.tensor(TOKENS[:2]).long(),
                 attention_mask=torch.tensor(np.stack([valid, valid]))).last_hidden_state
  model = Transformer(trunk, with_unembedding=False)
  segments = np.broadcast_to(valid, (2, E)).astype(np.int32)
  got = jax.jit(lambda: model.apply({"params": params}, TOKENS[:2], None, segments))()
  np.testing.assert_allclose(got[:, :9], want[:, :9], rtol=1e-4, atol=1e-4)
