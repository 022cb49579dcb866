"""Encoders docked to a decoder: what reaches what, what is trained, and generation."""

import dataclasses
import functools
import re

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.cache import empty_cache
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import (
  FeedForwardConnectorConfig,
  LinearConnectorConfig,
  ResamplerConfig,
)
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.models.transformer import Transformer, unstack_layers
from lmops_jax.models.universal import (
  ENCODER_INPUTS,
  Docking,
  ImageDocking,
  UniversalConfig,
  UniversalLM,
)
from lmops_jax.models.vision import VisionConfig
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.losses import LMExampleLosses
from lmops_jax.training.optimizers import adamw, partition

PARTS = dict(
  norm="layer", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu")
DEEP = dict(
  norm_placement="post", final_norm=False, residual_scale="deepnorm", branch_gain="deepnorm")
TEXT = TransformerConfig(
  vocab_size=40, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32, **PARTS, **DEEP,
  positions="sinusoidal", embedding_scale=4.0, tied_embeddings=True, initialization="xavier")
TRUNK = TransformerConfig(
  vocab_size=40, num_layers=3, width=12, num_heads=2, mlp_width=20, max_length=16, **PARTS, **DEEP,
  positions="learned", embedding_norm=True, initialization="xavier", causal=False)
READER = Docking(TextEncoderConfig(TRUNK, top_layers=1), LinearConnectorConfig())
CONFIG = UniversalConfig(TEXT, READER)
MODEL = UniversalLM(CONFIG)
S, E, START = 12, 12, 1
SPANS = ((3, 5), (5, 8))  # beside each other, of different lengths


@functools.cache
def _boxed(config=CONFIG):
  ids = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(UniversalLM(config).init)(jax.random.key(0), ids)["params"]


def _params(config=CONFIG):
  return nn.unbox(_boxed(config))


def _row(tokens, spans=SPANS, length=E):
  """A row of a batch by its definition: `<s>` and span after span; targets by input position."""
  row = {name: np.zeros(length, np.int32) for name in ENCODER_INPUTS[:3]}
  index, mask, end = np.full(len(tokens), -1, np.int32), np.ones(len(tokens), np.float32), 0
  for number, (first, last) in enumerate(spans):
    here = slice(end, end + 1 + last - first)
    row["encoder_tokens"][here] = [START, *tokens[first:last]]
    row["encoder_positions"][here] = np.arange(1 + last - first)
    row["encoder_segments"][here] = number + 1
    index[first:last] = end + 1 + np.arange(last - first)
    mask[first : last - 1] = 0
    end = here.stop
  mask[-1] = 0
  return {**row, "vector_index": index, "tokens": np.asarray(tokens, np.int32),
          "targets": np.append(tokens[1:], 0).astype(np.int32), "loss_mask": mask}


def _batch(rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _tokens(seed=0, length=S):
  """No token twice."""
  return np.random.default_rng(seed).permutation(np.arange(2, 40))[:length]


def _whole(model, batch, keys=None):
  given = {name: batch[name] for name in ENCODER_INPUTS if name in batch}
  vectors = model.row_vectors(**given, keys=keys)
  return model.logits(
    batch["tokens"], vectors=vectors, vector_index=batch.get("vector_index"), keys=keys)


def _losses(params, batch, model=MODEL):
  given = {name: batch[name] for name in ENCODER_INPUTS if name in batch}
  rest = {name: x for name, x in batch.items() if name not in given}
  vectors = model.apply({"params": params}, **given, method="row_vectors")
  return LMExampleLosses(model)(params, rest if vectors is None else {**rest, "vectors": vectors})


@functools.partial(jax.jit, static_argnames=("model", "method", "fresh"))
def _apply(params, *args, model=MODEL, method=None, **kwargs):
  return model.apply({"params": params}, *args, method=method, **kwargs)


BATCH = _batch([_row(_tokens()), _row(_tokens(1), [(1, 7)]), _row(_tokens(2), [])] * 2
               + [_row(_tokens(3), [(2, 3), (9, 12)]), _row(_tokens(4), [(4, 10)])])


@pytest.fixture(scope="module")
def logits():
  return _apply(_params(), BATCH, method=_whole)


def test_without_spans_the_loss_is_the_causal_one_to_the_bit():
  """Whether a row has none or the batch has none."""
  none = _batch([_row(_tokens(i), []) for i in range(8)])
  causal = {name: none[name] for name in ("tokens", "targets", "loss_mask")}
  want = jax.jit(LMExampleLosses(Transformer(TEXT)))(_params()["text"], causal)
  np.testing.assert_array_equal(jax.jit(_losses)(_params(), none), want)
  np.testing.assert_array_equal(jax.jit(_losses)(_params(), causal), want)
  alone = UniversalLM(UniversalConfig(TEXT))
  got = jax.jit(functools.partial(_losses, model=alone))({"text": _params()["text"]}, causal)
  np.testing.assert_array_equal(got, want)


def test_a_changed_word_of_a_span_reaches_nothing_before_the_span(logits):
  """Neither logits nor losses; the whole span's vectors change, and what follows."""
  for place in range(3, 8):
    first = SPANS[place > 4][0]
    tokens = _tokens()
    tokens[place] = 39 if tokens[place] != 39 else 38
    changed = _batch([_row(tokens)] + [_row(_tokens(1), [(1, 7)])] * 7)
    got = _apply(_params(), changed, method=_whole)
    np.testing.assert_array_equal(got[0, :first], logits[0, :first])
    assert np.all(np.abs(got[0, first:] - logits[0, first:]).max(-1) > 1e-4)


def test_no_scored_target_is_known_where_it_is_predicted():
  """By gradients with respect to the encoder's word of each token, which stands nowhere else."""
  batch = _batch([_row(_tokens())])
  row = {name: x[0] for name, x in batch.items()}

  def of_words(table):
    params = _params()
    trunk = {**params["reader"]["trunk"], "embedding": table}
    params = {**params, "reader": {**params["reader"], "trunk": trunk}}
    return MODEL.apply({"params": params}, batch, method=_whole)[0, :, :3]

  jacobian = jax.jit(jax.jacfwd(of_words))(_params()["reader"]["trunk"]["embedding"])
  reached = np.abs(jacobian).sum((1, 3)) > 0  # [position, word]
  words = np.asarray(row["tokens"])
  for position in range(S):
    seen = {w for first, last in SPANS if first <= position for w in words[first:last]}
    seen |= {START} if seen else set()
    assert set(np.flatnonzero(reached[position])) == seen
  scored = np.flatnonzero(row["loss_mask"])
  np.testing.assert_array_equal(scored, [0, 1, 2, 4, 7, 8, 9, 10])
  assert not reached[scored, row["targets"][scored]].any()
  unscored = [3, 5, 6]
  assert reached[unscored, row["targets"][unscored]].all()


def test_the_decoder_never_reads_its_own_words_of_a_span():
  """Their values do not matter, and no gradient reaches them."""
  def loss(params, batch):
    return jnp.sum(jnp.sin(MODEL.apply({"params": params}, **batch)))

  row = _batch([_row(_tokens())])
  vectors = np.random.default_rng(0).normal(size=(1, E, 16)).astype(np.float32)
  given = dict(tokens=row["tokens"], vectors=vectors, vector_index=row["vector_index"])
  value, gradient = jax.jit(jax.value_and_grad(loss))(_params(), given)
  words = np.abs(gradient["text"]["embedding"]).sum(-1) > 0
  in_span = row["vector_index"][0] >= 0
  np.testing.assert_array_equal(words[row["tokens"][0]], ~in_span)
  other = {**given, "tokens": np.where(row["vector_index"] >= 0, 39, row["tokens"])}
  np.testing.assert_array_equal(jax.jit(jax.value_and_grad(loss))(_params(), other)[0], value)


class LookUpConfig:
  """An encoder that looks words up in a table."""

  def module(self):
    return LookUp()

  def feature_width(self):
    return 16

  def num_words(self):
    return 40

  def longest_span(self):
    return 16

  def with_vocab_size(self, vocab_size):
    return self


class LookUp(nn.Module):
  @nn.compact
  def features(self, tokens, positions, segment_ids, keys=None):
    return self.param("embedding", nn.initializers.ones, (40, 16))[tokens]


class NoConnectorConfig:
  """A connector that hands vectors on."""

  def module(self, text, width):
    return lambda features, keys: features

  def num_vectors(self, num_features):
    return num_features


def test_an_encoder_that_looks_up_the_decoders_words_is_the_causal_model_to_the_bit():
  docking = Docking(LookUpConfig(), NoConnectorConfig(), unit_features=False)
  model = UniversalLM(UniversalConfig(TEXT, docking))
  text = _params()["text"]
  params = {"text": text, "reader": {"embedding": text["embedding"]}}
  got = _apply(params, BATCH, model=model, method=_whole)
  want = _apply(text, BATCH["tokens"], model=Transformer(TEXT), method="logits")
  np.testing.assert_array_equal(got, want)
  other = {**params, "reader": {"embedding": text["embedding"][::-1]}}
  assert np.abs(_apply(other, BATCH, model=model, method=_whole) - want).max() > 0.1


@pytest.mark.slow
def test_rows_score_as_alone_also_with_dropout():
  """Every part drops; a row draws by a key of its own."""
  rates = dict(embedding_dropout=0.2, residual_dropout=0.2, attention_dropout=0.2)
  text, trunk = (dataclasses.replace(c, **rates) for c in (TEXT, TRUNK))
  reader = dataclasses.replace(READER, encoder=TextEncoderConfig(trunk, top_layers=1))
  model = UniversalLM(UniversalConfig(text, reader))
  keys = jax.random.split(jax.random.key(9), 8)
  got = _apply(_params(), BATCH, keys, model=model, method=_whole)
  twice = {name: np.asarray(x)[[0, 6, 6, 6, 6, 6, 6, 6]] for name, x in BATCH.items()}
  alone = _apply(_params(), twice, keys[jnp.array([0, 6, 6, 6, 6, 6, 6, 6])], model=model,
                 method=_whole)
  np.testing.assert_allclose(got[jnp.array([0, 6])], alone[:2], rtol=1e-4, atol=1e-5)
  assert np.abs(got[0] - got[3]).max() > 0.01  # equal rows draw apart


FROZEN = {"reader/(?!top/).*": None, ".*": adamw(1e-2)}
MNLI = {"text/.*": None, ".*": adamw(1e-2)}


def _names(params):
  return {"/".join(part.key for part in path): x
          for path, x in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("rules, learned", [
  (FROZEN, ("text/", "reader_connector/", "reader/top/")),
  pytest.param(MNLI, ("reader_connector/", "reader/"), marks=pytest.mark.slow)],
  ids=["pretraining", "frozen decoder"])
def test_what_is_frozen_keeps_its_bits_and_all_else_learns(rules, learned):
  learner = supervised(lambda key: _params(), _losses, partition(rules))
  state, _ = jax.jit(learner.step)(learner.init(None), BATCH, jax.random.key(1))
  old, new = _names(_params()), _names(state.params)
  kept = {name for name in old if np.array_equal(old[name], new[name])}
  assert kept == {name for name in old if not name.startswith(learned)}


@pytest.mark.parametrize("changes", [
  {}, pytest.param({"scan_layers": False}, marks=pytest.mark.slow),
  pytest.param({"remat": "full"}, marks=pytest.mark.slow)])
def test_nothing_is_kept_below_the_first_trained_layer(changes):
  def kept_bytes(num_layers, pattern):
    trunk = dataclasses.replace(TRUNK, num_layers=num_layers, **changes)
    reader = dataclasses.replace(READER, encoder=TextEncoderConfig(trunk, top_layers=1))
    model = UniversalLM(UniversalConfig(TEXT, reader))
    params = nn.unbox(jax.eval_shape(loop.initializer(model), jax.random.key(0)))

    def backward(params):
      def losses(some):
        whole = jax.tree_util.tree_map_with_path(
          lambda path, x: some.get("/".join(part.key for part in path), x), params)
        return _losses(whole, BATCH, model)

      names = _names(params)
      return jax.vjp(losses, {n: names[n] for n in names if not re.fullmatch(pattern, n)})[1]

    arrays = jax.tree.leaves(jax.eval_shape(backward, params))
    return sum(x.size * x.dtype.itemsize for x in arrays)

  frozen = next(iter(FROZEN))
  assert kept_bytes(9, frozen) == kept_bytes(3, frozen)
  one_vector_a_position = 6 * 8 * E * TRUNK.width * 4
  assert kept_bytes(9, "none") - kept_bytes(3, "none") >= one_vector_a_position


def test_cached_generation_behind_an_encoded_prefix_equals_the_full_forward():
  """A prefill with vectors, then words one by one, as the whole row at once."""
  row = _batch([_row(_tokens(5), [(1, 6)])] * 8)
  spans = {name: row[name] for name in ENCODER_INPUTS[:3]}
  vectors = _apply(_params(), **spans, method="row_vectors")
  ids = [int(t) for t in row["tokens"][0, :6]]
  prompt = Prompt(ids, np.asarray(vectors[0]), row["vector_index"][0, :6])
  generator = Generator(Transformer(TEXT), _params()["text"])
  answer, = generator.generate_ids([prompt], GenerationOptions(max_new_tokens=4))
  tokens = np.array(row["tokens"])
  for i in range(4):
    whole = _apply(_params(), {**row, "tokens": tokens}, method=_whole)
    assert answer.ids[i] == np.argmax(whole[0, 5 + i])
    tokens[:, 6 + i] = answer.ids[i]


def test_a_turn_encoded_once_serves_all_later_ones():
  """Two turns: the second's span is read behind the cache of the first; or all is computed anew."""
  tokens = _tokens(6)
  turns = [(1, 4), (7, 10)]
  both = _batch([_row(tokens, turns)] * 8)
  want = _apply(_params(), both, method=_whole)
  text, cache, pieces = Transformer(TEXT), empty_cache(TEXT, 8, S), []
  params = unstack_layers(_params()["text"])
  for turn, here in zip(turns, (slice(0, 6), slice(6, 12))):
    alone = _batch([_row(tokens, [turn])] * 8)
    spans = {name: alone[name] for name in ENCODER_INPUTS[:3]}
    vectors = _apply(_params(), **spans, method="row_vectors")
    hidden, cache = _apply(
      params, alone["tokens"][:, here], cache, model=text, method="extend", vectors=vectors,
      vector_index=alone["vector_index"][:, here],
      positions=np.broadcast_to(np.arange(S)[here], (8, 6)), fresh=here.start == 0)
    pieces.append(_apply(params, hidden, model=text, method="unembed"))
  np.testing.assert_allclose(np.concatenate(pieces, 1), want, rtol=1e-4, atol=1e-5)


def _summed(params, batch):
  return jnp.mean(_losses(params, batch))


@pytest.mark.parametrize("function", [
  _losses, pytest.param(jax.value_and_grad(_summed), marks=pytest.mark.slow)],
  ids=["losses", "gradients"])
def test_sharded_equals_single(function):
  params = _params()
  want = jax.jit(function)(params, BATCH)
  partitioner = MeshConfig(2, 2, 2).build()
  with partitioner.activate():
    placed = jax.device_put(params, partitioner.shardings(_boxed(), uneven="whole"))
    got = jax.jit(function)(placed, partitioner.place_batch(BATCH))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


VISION = VisionConfig(
  dataclasses.replace(TRUNK, vocab_size=None, positions="none", embedding_norm=False,
                      max_length=17), image_size=8, patch_size=2)
SEEING = dataclasses.replace(CONFIG, vision=ImageDocking(VISION, ResamplerConfig(4)))
IMAGES = np.random.default_rng(7).integers(0, 256, (8, 2, 8, 8, 3)).astype(np.uint8)


@pytest.mark.slow
def test_images_stand_behind_the_spans_of_a_row():
  """As a docked model computes them."""
  model, params = UniversalLM(SEEING), _params(SEEING)
  spans = {name: BATCH[name] for name in ENCODER_INPUTS[:3]}
  got = _apply(params, **spans, images=IMAGES, model=model, method="row_vectors")
  assert SEEING.vectors_per_image == 4 and got.shape == (8, E + 2 * 4, 16)
  of_spans = _apply(params, **spans, model=model, method="row_vectors")
  np.testing.assert_allclose(got[:, :E], of_spans, rtol=1e-5, atol=1e-6)
  docked = {"text": params["text"], "vision": params["vision"],
            "connector": params["vision_connector"]}
  want = _apply(docked, IMAGES, model=DockedLM(DockedConfig(TEXT, VISION, ResamplerConfig(4))),
                method="row_vectors")
  np.testing.assert_allclose(got[:, E:], want, rtol=1e-5, atol=1e-6)


def test_parameters_have_logical_axes_and_an_initializer_needs_tokens_only():
  boxed = jax.eval_shape(loop.initializer(UniversalLM(SEEING)), jax.random.key(0))
  boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
  assert all(len(box.names) == box.value.ndim for box in boxes)
  assert boxed.keys() == {"text", "reader", "reader_connector", "vision", "vision_connector"}


def test_vectors_start_about_as_large_as_words():
  """With an embedding scale of sqrt(width), Xavier's tables, and features of length 1."""
  vectors = _apply(_params(), **{n: BATCH[n] for n in ENCODER_INPUTS[:3]}, method="row_vectors")
  words = _params()["text"]["embedding"]
  assert 0.3 < np.std(vectors) / np.std(words) < 3


@pytest.mark.parametrize("config, given, message", [
  (SEEING, {"encoder_tokens": 0}, "lacks encoder_positions, encoder_segments; give all of"),
  (dataclasses.replace(SEEING, reader=None), {n: 0 for n in ENCODER_INPUTS[:3]},
   "has encoder_tokens and models.UniversalConfig.reader is None; dock an encoder"),
  (CONFIG, {"images": 0}, "has images and models.UniversalConfig.vision is None"),
  (SEEING, {"image_tokens": 0, "image_segments": 0}, "vision reads no words; leave them out, or"),
])
def test_inputs_without_an_encoder_are_refused(config, given, message):
  model = UniversalLM(config)
  arrays = {name: jnp.zeros((2, 3), jnp.int32) for name in given}
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.apply({"params": {}}, **arrays, method="row_vectors"))


def test_parts_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="UniversalConfig.text must have causal=True"):
    UniversalConfig(dataclasses.replace(TEXT, causal=False))
  with pytest.raises(ValueError, match="reader.connector must give a vector for each vector"):
    UniversalConfig(TEXT, dataclasses.replace(READER, connector=ResamplerConfig(4)))
  with pytest.raises(ValueError, match="reader knows 40 words and the decoder 41; both read"):
    UniversalConfig(dataclasses.replace(TEXT, vocab_size=41), READER)
  with pytest.raises(ValueError, match="num_heads=3 must divide the width of word embeddings, 16"):
    UniversalConfig(TEXT, vision=ImageDocking(VISION, ResamplerConfig(num_heads=3)))
  with pytest.raises(ValueError, match="models.Docking.encoder"):
    Docking(TRUNK, LinearConnectorConfig())


GIN = """
import lmops_jax.models.universal
models.UniversalConfig:
  text = @text/models.TransformerConfig()
  reader = @models.Docking()
models.Docking:
  encoder = @models.TextEncoderConfig()
  connector = @models.FeedForwardConnectorConfig()
models.TextEncoderConfig:
  trunk = @reader/models.TransformerConfig()
  top_layers = 1
reader/models.TransformerConfig.causal = False
test_universal._identity.value = @models.UniversalConfig()
"""


@gin.register(module="test_universal")
def _identity(value):
  return value


def test_gin_builds_a_universal_model():
  gin.clear_config()
  try:
    gin.parse_config(GIN)
    config = gin.get_configurable(_identity)().with_vocab_size(50)
  finally:
    gin.clear_config()
  assert config.vocab_size == config.reader.encoder.num_words() == 50
  assert config.reader.connector == FeedForwardConnectorConfig() and config.vectors_per_image == 0
