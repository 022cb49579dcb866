"""Image and words in one encoder: which expert reads what, padding, sizes, and its docking."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import FeedForwardConnectorConfig
from lmops_jax.models.fused_encoder import FusedEncoder, FusedEncoderConfig
from lmops_jax.models.universal import ImageDocking, UniversalConfig, UniversalLM
from lmops_jax.models.vision import VisionConfig, VisionTransformer, patches
from lmops_jax.training import loop

TRUNK = TransformerConfig(
  vocab_size=24, num_layers=3, width=16, num_heads=2, mlp_width=24, max_length=32, norm="layer",
  gated_mlp=False, activation="gelu", qkv_bias=True, out_bias=True, mlp_bias=True,
  positions="none", causal=False, final_norm=False)
CONFIG = FusedEncoderConfig(
  TRUNK, image_size=6, patch_size=3, any_size=True, top_layers=1, max_words=6)
N, P, T = 8, 5, 6  # images, vectors of one, words
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(N, 6, 6, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 24, (N, T)).astype(np.int32)
SEGMENTS = (np.arange(T) < np.array([6, 4, 0, 1, 6, 3, 2, 5])[:, None]).astype(np.int32)


@functools.cache
def _boxed():
  return jax.jit(FusedEncoder(CONFIG).init)(
    jax.random.key(0), *(None if x is None else jnp.asarray(x) for x in CONFIG.example_inputs())
  )["params"]


@functools.cache
def _params():
  leaves, treedef = jax.tree.flatten(nn.unbox(_boxed()))
  rng = np.random.default_rng(1)
  return treedef.unflatten([
    (2 * np.asarray(x) + 0.2 * rng.normal(size=x.shape)).astype(np.float32) for x in leaves])


@functools.partial(jax.jit, static_argnames="config")
def _features(params, images=IMAGES, tokens=TOKENS, segments=SEGMENTS, keys=None, config=CONFIG):
  return FusedEncoder(config).apply(
    {"params": params}, images, keys, tokens, segments, method="features")


def _by_hand(row, has_image=True, has_words=True):
  """One image and its words in float64, the words without padding."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), _params())

  def normed(x, n):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * n["scale"] + n["bias"]

  def product(x, n):
    return x @ n["kernel"].reshape(x.shape[-1], -1) + n["bias"].reshape(-1)

  def mlp(x, n):
    up = product(x, n["up"])
    return product(up * (1 + np.vectorize(math.erf, [float])(up / np.sqrt(2))) / 2, n["down"])

  cut = [IMAGES[row, i : i + 3, j : j + 3].reshape(-1) for i in (0, 3) for j in (0, 3)]
  image = np.stack(cut).astype(np.float64) @ p["patch_embedding"].reshape(27, 16)
  image = np.concatenate([p["class_embedding"][None], image]) + p["position_embedding"]
  num = int(SEGMENTS[row].sum())
  words = p["word_embedding"][TOKENS[row, :num]] + p["word_position_embedding"][:num]
  x = np.concatenate([image + p["modality_embedding"][0]] * has_image
                     + [words + p["modality_embedding"][1]] * has_words)
  x, split = normed(x, p["pre_norm"]), P * has_image
  for name, num_layers in (("trunk", 2), ("top", 1)):
    for i in range(num_layers):
      of = jax.tree.map(lambda x, i=i: x[i], p[name]["layers"])
      y = normed(x, of["attention_norm"])
      q, k, v = (product(y, of["attention"][n]).reshape(-1, 2, 8)
                 for n in ("query", "key", "value"))
      scores = np.einsum("she,mhe->hsm", q, k) / np.sqrt(8)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      x = x + product(np.einsum("hsm,mhe->she", weights, v).reshape(-1, 16), of["attention"]["out"])
      y = normed(x, of["mlp_norm"])
      if name == "top" and has_image and has_words:
        x = x + mlp(y, of["mlp"]["both"])
      else:
        x = x + np.concatenate(
          [mlp(y[:split], of["mlp"]["image"]), mlp(y[split:], of["mlp"]["words"])])
  return normed(x, p["post_norm"])


def test_image_and_words_equal_the_definition_at_any_number_of_words():
  """The last layer's expert is the one for both; padding is seen by nothing."""
  got = _features(_params())
  assert got.shape == (N, P + T, 16)
  for row in (0, 1, 2, 3):
    want = _by_hand(row)
    np.testing.assert_allclose(got[row, : len(want)], want, rtol=2e-4, atol=2e-4)


def test_words_alone_take_their_own_expert_in_all_layers():
  got = _features(_params(), images=None)
  assert got.shape == (N, T, 16)
  for row in (0, 1):
    want = _by_hand(row, has_image=False)
    np.testing.assert_allclose(got[row, : len(want)], want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("images", [
  pytest.param(IMAGES, marks=pytest.mark.slow), np.tile(IMAGES, (1, 2, 1, 1))[:, :9]],
  ids=["own size", "interpolated"])
def test_an_image_alone_is_a_vision_tower(images):
  """That of the image's experts; also in another size, with the tower's interpolation."""
  config = VisionConfig(TRUNK, image_size=6, patch_size=3, any_size=True, top_layers=1)
  params, modality = dict(_params()), _params()["modality_embedding"][0]
  for name in ("word_embedding", "word_position_embedding", "modality_embedding"):
    del params[name]
  # Interpolation keeps what is the same at all positions, so the modality may enter there.
  params["position_embedding"] = params["position_embedding"] + modality
  for name in ("trunk", "top"):
    layers = params[name]["layers"]
    params[name] = {"layers": {**layers, "mlp": layers["mlp"]["image"]}}
  want = jax.jit(lambda: VisionTransformer(config).apply(
    {"params": params}, images, method="features"))()
  assert want.shape[1] == 1 + patches(jnp.asarray(images), 3).shape[1]
  got = _features(_params(), images, None, None)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_rows_and_padding_do_not_matter_to_the_bit():
  want = np.asarray(_features(_params()))
  tokens, images = (TOKENS + 1) % 24, IMAGES[::-1].copy()
  tokens[1, :4], images[1] = TOKENS[1, :4], IMAGES[1]
  got = np.asarray(_features(_params(), images, tokens))
  np.testing.assert_array_equal(got[1, : P + 4], want[1, : P + 4])
  assert np.abs(got - want).max() > 0.1


def test_every_image_vector_reads_every_word_and_the_reverse():
  def loss(images, words, place):
    params = {**_params(), "word_embedding": words}
    return jnp.sum(jnp.sin(FusedEncoder(CONFIG).apply(
      {"params": params}, images, None, TOKENS[:1], None, method="features")[0, place]))

  params = _params()
  gradient = jax.jit(jax.grad(loss, (0, 1)))
  for place in (0, 3, P, P + T - 1):
    of_images, of_words = gradient(IMAGES[:1], params["word_embedding"], place)
    assert (np.abs(of_images) > 0).all()
    assert set(np.flatnonzero(np.abs(of_words).sum(-1))) == set(TOKENS[0])


def test_the_last_layers_have_one_expert_more():
  lower, upper = (_boxed()[name]["layers"]["mlp"].keys() for name in ("trunk", "top"))
  assert lower == {"image", "words"} and upper == {"image", "words", "both"}


@pytest.mark.slow
def test_execution_choices_change_nothing():
  def gradient(config):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(_features(p, config=config)))))(_params())

  trunk = dataclasses.replace(TRUNK, scan_layers=False, remat="full", attention="chunked",
                              attention_chunk=4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    gradient(dataclasses.replace(CONFIG, trunk=trunk)), gradient(CONFIG))


@pytest.mark.slow
def test_images_draw_by_keys_of_their_own():
  rates = dict(embedding_dropout=0.2, residual_dropout=0.2, attention_dropout=0.2)
  config = dataclasses.replace(CONFIG, trunk=dataclasses.replace(TRUNK, **rates))
  keys = jax.random.split(jax.random.key(9), N)
  got = _features(_params(), keys=keys, config=config)
  rows = np.array([3, 1, 1, 1, 1, 1, 1, 1])
  alone = _features(_params(), IMAGES[rows], TOKENS[rows], SEGMENTS[rows], keys[rows], config)
  np.testing.assert_allclose(got[rows[:2]], alone[:2], rtol=1e-4, atol=1e-5)
  assert np.abs(got - _features(_params())).max() > 0.1


@pytest.mark.slow
def test_sharded_equals_single():
  params = _params()
  want = _features(params)
  partitioner = MeshConfig(2, 2, 2).build()
  with partitioner.activate():
    placed = jax.device_put(params, partitioner.shardings(_boxed(), uneven="whole"))
    batch = partitioner.place_batch({"i": IMAGES, "t": TOKENS, "s": SEGMENTS})
    got = _features(placed, batch["i"], batch["t"], batch["s"])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


TEXT = TransformerConfig(
  vocab_size=24, num_layers=2, width=20, num_heads=4, mlp_width=24, max_length=32,
  positions="sinusoidal", embedding_scale=20**0.5, tied_embeddings=True,
  initialization="xavier")
DOCKED = UniversalConfig(
  TEXT, vision=ImageDocking(CONFIG, FeedForwardConnectorConfig(3), unit_features=False))


def test_it_docks_with_a_vector_for_each_place():
  """Rows of two images, each with words of its own; and rows of words alone."""
  model = UniversalLM(DOCKED)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"])
  assert params.keys() == {"text", "vision", "vision_connector"}
  assert DOCKED.vectors_per_image == P and DOCKED.vectors_of_image(T) == P + T
  in_rows = [x.reshape(N // 2, 2, *x.shape[1:]) for x in (IMAGES, TOKENS, SEGMENTS)]

  @jax.jit
  def row_vectors(params, images, tokens, segments):
    return model.apply(
      {"params": params}, images=images, image_tokens=tokens, image_segments=segments,
      method="row_vectors")

  got = row_vectors(params, *in_rows)
  features = _features(params["vision"])
  x, connector = features.reshape(N // 2, 2 * (P + T), 16), params["vision_connector"]
  for i in range(3):
    x = x @ connector[f"dense_{i}"]["kernel"] + connector[f"dense_{i}"]["bias"]
    x = x if i == 2 else nn.gelu(x, approximate=False)
  np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)
  assert 0.3 < np.std(got) / np.std(params["text"]["embedding"]) < 3
  alone = row_vectors(params, None, *in_rows[1:])
  assert alone.shape == (N // 2, 2 * T, 20)


def test_its_parameters_have_logical_axes_and_an_open_vocabulary_is_filled():
  open_ = dataclasses.replace(CONFIG, trunk=dataclasses.replace(TRUNK, vocab_size=None))
  config = dataclasses.replace(
    DOCKED, vision=dataclasses.replace(DOCKED.vision, encoder=open_)).with_vocab_size(30)
  assert config.vision.encoder.num_words() == config.vocab_size == 30
  boxed = jax.eval_shape(loop.initializer(UniversalLM(config)), jax.random.key(0))
  boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
  assert all(len(box.names) == box.value.ndim for box in boxes)
  with pytest.raises(ValueError, match="vision knows 24 words and the decoder 25"):
    dataclasses.replace(DOCKED, text=dataclasses.replace(TEXT, vocab_size=25))
  with pytest.raises(ValueError, match="FusedEncoderConfig.trunk.vocab_size is not set"):
    jax.eval_shape(lambda: FusedEncoder(open_).init(jax.random.key(0), *open_.example_inputs()))


@pytest.mark.parametrize("changes, message", [
  ({"max_words": 28}, "FusedEncoderConfig.trunk.max_length=32 is below the 33 vectors"),
  ({"top_layers": 3}, "FusedEncoderConfig.top_layers=3 must be below the trunk's num_layers=3"),
  ({"patch_size": 5}, "models.FusedEncoderConfig.image_size=6 must be a multiple of patch_size=5"),
])
def test_impossible_encoders_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("images, tokens, message", [
  (None, None, "neither images nor words; give it one"),
  (IMAGES, np.zeros((N, 7), np.int32), "7 words beside it and .*FusedEncoderConfig.max_words is 6"),
  (IMAGES[:, :5], None, r"images are \[5, 6, 3\] and .* models.FusedEncoderConfig.patch_size=3"),
])
def test_inputs_that_do_not_fit_are_refused(images, tokens, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: _features(_params(), images, tokens, None))
