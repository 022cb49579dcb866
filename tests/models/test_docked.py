"""A docked language model: images among words, what is computed once, and a frozen tower."""

import dataclasses
import functools
import re

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.control import dynamics
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.cache import empty_cache
from lmops_jax.models.connectors import LinearConnectorConfig, ResamplerConfig
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.models.transformer import Transformer, TransformerConfig, unstack_layers
from lmops_jax.models.vision import VisionConfig
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.optimizers import adamw, partition

PARTS = dict(norm="layer", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True)
TEXT = TransformerConfig(
  vocab_size=24, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32, **PARTS,
  activation="gelu", sub_norm=True, positions="sinusoidal", position_offset=2, embedding_scale=4.0,
  tied_embeddings=True, initialization="xavier", branch_gain="magneto")
TRUNK = TransformerConfig(
  num_layers=3, width=16, num_heads=2, mlp_width=24, max_length=17, **PARTS,
  activation="quick_gelu", positions="none", causal=False, final_norm=False)
CONFIG = DockedConfig(
  TEXT, VisionConfig(TRUNK, image_size=8, patch_size=2, top_layers=1),
  ResamplerConfig(4, unit_scale=True))
MODEL = DockedLM(CONFIG)
B, S, I, M = 8, 12, 2, 4
FROZEN = {"vision/(?!top/|post_norm/).*": None, ".*": adamw(1e-2)}


@functools.cache
def _boxed():
  return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def _params():
  return nn.unbox(_boxed())


def _batch(seed=0):
  """Rows with two images beside each other, one, or none."""
  rng = np.random.default_rng(seed)
  index = np.full((B, S), -1, np.int32)
  index[::2, 1:9] = np.arange(8)
  index[1::4, 3:7] = np.arange(4)
  return {
    "tokens": rng.integers(0, 24, (B, S)).astype(np.int32), "vector_index": index,
    "images": rng.integers(0, 256, (B, I, 8, 8, 3)).astype(np.uint8)}


def _whole(model, tokens, vector_index, images, keys=None):
  vectors = model.row_vectors(images, keys)
  return model.logits(tokens, vectors=vectors, vector_index=vector_index, keys=keys)


@functools.partial(jax.jit, static_argnames=("model", "method", "fresh"))
def _apply(params, *args, model=MODEL, method=None, **kwargs):
  return model.apply({"params": params}, *args, method=method, **kwargs)


def _losses(params, batch, model=MODEL):
  logits = model.apply(
    {"params": params}, batch["tokens"], batch["vector_index"], batch["images"], method=_whole)
  return -jnp.mean(jax.nn.log_softmax(logits)[..., 3], axis=1)


def _only(batch, *rows):
  """A batch of these rows again and again, for the program of whole batches."""
  return {name: np.asarray(x)[np.resize(rows, B)] for name, x in batch.items()}


@pytest.fixture(scope="module")
def logits():
  return _apply(_params(), **_batch(), method=_whole)


def test_rows_score_as_alone(logits):
  """Also two with equal words and other images."""
  batch = _batch()
  batch["tokens"][2] = batch["tokens"][0]
  got = _apply(_params(), **batch, method=_whole)
  assert np.abs(got[0] - got[2])[-1].max() > 1e-3
  for row in (0, 1, 2, 3):
    alone = _apply(_params(), **_only(batch, row), method=_whole)
    np.testing.assert_allclose(got[row], alone[-1], rtol=1e-4, atol=1e-5)


def test_later_images_and_words_do_not_reach_earlier_logits(logits):
  batch = _batch()
  batch["images"][:, 1] = 255 - batch["images"][:, 1]
  batch["tokens"][:, 9:] = 0
  got = _apply(_params(), **batch, method=_whole)
  np.testing.assert_allclose(got[:, :5], logits[:, :5], rtol=1e-5, atol=1e-6)
  assert np.abs(got[0, 5] - logits[0, 5]).max() > 1e-4


def test_the_text_model_alone_goes_on_from_vectors_computed_once(logits):
  """A prefill with vectors and then words, from parameters of one stack and of many."""
  batch = _batch()
  vectors = _apply(_params(), batch["images"], method="row_vectors")
  text = Transformer(TEXT)
  for params in (_params()["text"], unstack_layers(_params()["text"])):
    cache, pieces = empty_cache(TEXT, B, S), []
    for here in (slice(0, 9), slice(9, 12)):
      positions = np.broadcast_to(np.arange(S)[here], (B, here.stop - here.start))
      images = {} if here.start else dict(
        vectors=vectors, vector_index=batch["vector_index"][:, here])
      hidden, cache = _apply(
        params, batch["tokens"][:, here], cache, model=text, method="extend",
        positions=positions, fresh=here.start == 0, **images)
      pieces.append(_apply(params, hidden, model=text, method="unembed"))
    np.testing.assert_allclose(np.concatenate(pieces, 1), logits, rtol=1e-4, atol=1e-5)


def test_the_docked_model_has_the_methods_of_its_text_model(logits):
  batch = _batch()
  cache = empty_cache(TEXT, B, S)

  def parts(model, tokens, cache):
    hidden, _ = model.extend(
      tokens, cache, positions=jnp.broadcast_to(jnp.arange(S), (B, S)), fresh=True)
    readout = model.readout(hidden)
    return model.unembed(hidden), readout @ model.output_matrix(), model.output_bias()

  plain = _apply(_params()["text"], batch["tokens"], model=Transformer(TEXT), method="logits")
  unembedded, multiplied, bias = _apply(_params(), batch["tokens"], cache, method=parts)
  assert bias is None
  for got in (unembedded, multiplied, _apply(_params(), batch["tokens"], method="logits")):
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)


RATES = dict(embedding_dropout=0.2, residual_dropout=0.2, attention_dropout=0.2)
DROPPING = DockedConfig(
  dataclasses.replace(TEXT, **RATES),
  dataclasses.replace(CONFIG.vision, trunk=dataclasses.replace(TRUNK, **RATES)),
  dataclasses.replace(CONFIG.connector, dropout=0.2))


def test_rows_draw_by_keys_of_their_own():
  """Every part drops; a row draws as alone."""
  model = DockedLM(DROPPING)
  batch, keys = _batch(), jax.random.split(jax.random.key(9), B)
  got = _apply(_params(), **batch, keys=keys, model=model, method=_whole)
  alone = _apply(_params(), **_only(batch, 2, 3), keys=keys[np.resize([2, 3], B)],
                 model=model, method=_whole)
  np.testing.assert_allclose(got[2:4], alone[-2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plain", [
  pytest.param({"connector": CONFIG.connector}, marks=pytest.mark.slow),
  {"vision": CONFIG.vision}], ids=["tower", "connector"])
def test_equal_images_of_a_row_draw_apart(plain):
  """By a dropping tower alone, and by a dropping connector alone."""
  images, keys = _batch()["images"], jax.random.split(jax.random.key(9), B)
  images[:, 1] = images[:, 0]
  model = DockedLM(dataclasses.replace(DROPPING, **plain))
  vectors = _apply(_params(), images, keys, model=model, method="row_vectors")
  first, second = vectors.reshape(B, I, M, 16).swapaxes(0, 1)
  assert np.abs(first - second).max() > 1e-2


def test_features_have_length_one_unless_told_otherwise():
  linear = dataclasses.replace(CONFIG, connector=LinearConnectorConfig())
  params = _params()
  of_dense = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
  params = params | {"connector": {"dense": of_dense}}
  images = _batch()["images"][0]
  unit = _apply(params, images, model=DockedLM(linear), method="image_vectors")
  assert unit.shape == (2, 17, 16) and linear.vectors_per_image == 17
  np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-5)
  plain = DockedLM(dataclasses.replace(linear, unit_features=False))
  features = _apply(params, images, model=plain, method="image_vectors")
  want = features / np.linalg.norm(features, axis=-1, keepdims=True)
  np.testing.assert_allclose(unit, want, rtol=1e-4, atol=1e-6)


def test_images_matter_from_the_start(logits):
  """With the connector at unit scale."""
  batch = _batch()
  batch["images"] = np.roll(batch["images"], 1, axis=0)
  got = _apply(_params(), **batch, method=_whole)
  assert np.abs(got - logits)[0, 9:].max() > 0.02 * np.std(logits)


def _summed(params, batch):
  return jnp.mean(_losses(params, batch))


@pytest.mark.parametrize("function", [
  _losses, pytest.param(jax.value_and_grad(_summed), marks=pytest.mark.slow)],
  ids=["losses", "gradients"])
def test_sharded_equals_single(function):
  batch, params = _batch(), _params()
  want = jax.jit(function)(params, batch)
  partitioner = MeshConfig(2, 2, 2).build()
  with partitioner.activate():
    placed = jax.device_put(params, partitioner.shardings(_boxed(), uneven="whole"))
    got = jax.jit(function)(placed, partitioner.place_batch(batch))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_parameters_have_logical_axes_and_an_initializer_needs_tokens_only():
  boxed = jax.eval_shape(loop.initializer(MODEL), jax.random.key(0))
  boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
  assert all(len(box.names) == box.value.ndim for box in boxes)
  assert boxed.keys() == {"text", "vision", "connector"}


def _names(params):
  return {"/".join(part.key for part in path): x
          for path, x in jax.tree_util.tree_leaves_with_path(params)}


def test_a_frozen_tower_keeps_its_bits_and_the_rest_learns():
  learner = supervised(lambda key: _params(), _losses, partition(FROZEN))
  state, _ = jax.jit(learner.step)(learner.init(None), _batch(), jax.random.key(1))
  old, new = _names(_params()), _names(state.params)
  kept = {name for name in old if np.array_equal(old[name], new[name])}
  pattern = re.compile(next(iter(FROZEN)))
  frozen = {name for name in old if pattern.fullmatch(name)}
  assert frozen == {name for name in old if name.startswith("vision/")
                    and name.split("/")[1] not in ("top", "post_norm")}
  assert frozen >= {"vision/patch_embedding", "vision/trunk/layers/attention/query/kernel"}
  assert kept == frozen


def _with_layers(num_layers, **changes):
  trunk = dataclasses.replace(TRUNK, num_layers=num_layers, **changes)
  model = DockedLM(
    dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, trunk=trunk)))
  return model, nn.unbox(jax.eval_shape(loop.initializer(model), jax.random.key(0)))


ACTIVATIONS = 6 * B * I * 17 * 16 * 4  # bytes of six layers, one vector a position


@pytest.mark.parametrize("changes", [
  {}, pytest.param({"scan_layers": False}, marks=pytest.mark.slow),
  pytest.param({"remat": "full"}, marks=pytest.mark.slow)])
def test_nothing_is_kept_of_frozen_layers_for_a_backward_pass(changes):
  def kept_bytes(num_layers, pattern):
    model, params = _with_layers(num_layers, **changes)
    learned = [name for name in _names(params) if not re.fullmatch(pattern, name)]

    def backward(params):
      def losses(some):
        all_ = jax.tree_util.tree_map_with_path(
          lambda path, x: some.get("/".join(part.key for part in path), x), params)
        return _losses(all_, _batch(), model)

      return jax.vjp(losses, {name: _names(params)[name] for name in learned})[1]

    arrays = jax.tree.leaves(jax.eval_shape(backward, params))
    return sum(x.size * x.dtype.itemsize for x in arrays)

  frozen = next(iter(FROZEN))
  assert kept_bytes(9, frozen) == kept_bytes(3, frozen)
  assert kept_bytes(9, "none") - kept_bytes(3, "none") >= ACTIVATIONS


@pytest.mark.slow
def test_the_memory_of_a_step_does_not_grow_with_frozen_layers():
  def temporary_bytes(num_layers, rules):
    model, params = _with_layers(num_layers)
    optimizer = partition(rules)
    state = jax.eval_shape(
      lambda p: dynamics.init_state(optimizer.init, optimizer.update, p), params)
    step = functools.partial(
      dynamics.step, functools.partial(_losses, model=model), optimizer.update)
    lowered = jax.jit(step, donate_argnums=0).lower(state, _batch(), jnp.full(B, 1 / B))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  grown = [
    temporary_bytes(9, rules) - temporary_bytes(3, rules) for rules in (FROZEN, {".*": adamw(0.1)})]
  assert grown[0] < ACTIVATIONS / 2 < 2 * ACTIVATIONS < grown[1]


GIN = """
import lmops_jax.models.docked
models.DockedConfig:
  text = @text/models.TransformerConfig()
  vision = @models.VisionConfig()
  connector = @models.ResamplerConfig()
text/models.TransformerConfig:
  sub_norm = True
  branch_gain = 'magneto'
  residual_scale = 'deepnorm'
  positions = 'sinusoidal'
  xpos = True
models.VisionConfig:
  trunk = @tower/models.TransformerConfig()
  patch_size = 14
  top_layers = 1
tower/models.TransformerConfig:
  causal = False
  final_norm = False
  positions = 'none'
test_docked._identity.value = @models.DockedConfig()
"""


@gin.register(module="test_docked")
def _identity(value):
  return value


def test_gin_builds_a_docked_model():
  gin.clear_config()
  try:
    gin.parse_config(GIN)
    config = gin.get_configurable(_identity)()
  finally:
    gin.clear_config()
  assert config.vectors_per_image == 64 and config.vision.num_patches == 256
  assert config.text.sub_norm and not config.vision.trunk.sub_norm


def test_a_connector_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="num_heads=3 must divide the width of word embeddings, 16"):
    dataclasses.replace(CONFIG, connector=ResamplerConfig(num_heads=3))
  with pytest.raises(ValueError, match="models.DockedConfig.connector"):
    dataclasses.replace(CONFIG, connector=TEXT)
