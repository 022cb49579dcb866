"""Kosmos-2's family: the published shapes, descriptions of models trained here, and refusals."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.connectors import (
  FeedForwardConnectorConfig,
  LinearConnectorConfig,
  ResamplerConfig,
)
from lmops_jax.models.stacks import with_top
from lmops_jax.pretrained import exporting, families, importing, sources
from lmops_jax.pretrained import model as model_lib

FAMILY = families.by_name("kosmos-2")
FIELDS = {
  "model_type": "kosmos-2", "latent_query_num": 4,
  "text_config": dict(
    vocab_size=71, embed_dim=32, layers=2, ffn_dim=48, attention_heads=4,
    max_position_embeddings=64),
  "vision_config": dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
    image_size=10, patch_size=5),
}


def _read(fields):
  return FAMILY.read_config(families.ConfigReader(fields, "config.json"))


CONFIG = _read(FIELDS)


@functools.cache
def _params(config):
  """Any numbers of the right shapes."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    nn.unbox(importing.abstract_params(FAMILY, config)))


def _source(config, folder="trained"):
  return model_lib.PretrainedModel(Path(folder), "kosmos-2", config)


def _assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("vocab_size, total", [
  (65_037, 1_664_485_376), (64_007, 1_664_485_376 - 1_030 * 2_048)])
def test_a_file_without_sizes_is_the_published_model(vocab_size, total):
  config = _read({"model_type": "kosmos-2", "text_config": {"vocab_size": vocab_size}})
  shapes = nn.unbox(importing.abstract_params(FAMILY, config))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == total
  tensors = {name: shape for name, shape, *_ in exporting.tensors(
    FAMILY, config, shapes, np.dtype("float32"))}
  assert len(tensors) == 885
  assert sum(map(math.prod, tensors.values())) == total
  text, vision = "text_model.model", "vision_model.model"
  assert sum(name.startswith(text) for name in tensors) == 483
  assert sum(name.startswith(vision) for name in tensors) == 391
  for name, shape in {
    f"{text}.embed_tokens.weight": (vocab_size, 2048),
    f"{text}.layers.23.ffn.fc1.weight": (8192, 2048),
    f"{text}.layers.23.ffn.ffn_layernorm.bias": (8192,),
    f"{text}.layers.0.self_attn.inner_attn_ln.weight": (2048,),
    f"{vision}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    f"{vision}.embeddings.position_embedding.weight": (257, 1024),
    f"{vision}.encoder.layers.23.mlp.fc2.weight": (1024, 4096),
    "image_to_text_projection.dense.weight": (2048, 1024),
    "image_to_text_projection.latent_query": (64, 2048),
    "image_to_text_projection.x_attn.out_proj.bias": (2048,),
  }.items():
    assert tensors[name] == shape
  assert config.text.position_offset == 2 and config.text.embedding_scale == 2048**0.5


XPOS = dataclasses.replace(
  CONFIG.text, vocab_size=64_007, xpos=True, rotary_interleaved=True, initialization="xavier",
  branch_gain="magneto", residual_dropout=0.1)
TRAINED = {
  "xpos": dataclasses.replace(CONFIG, text=XPOS),
  "linear": dataclasses.replace(CONFIG, connector=LinearConnectorConfig(unit_scale=True)),
  "feed-forward": dataclasses.replace(CONFIG, connector=FeedForwardConnectorConfig(2, 40)),
  "heads": dataclasses.replace(CONFIG, connector=ResamplerConfig(4, num_heads=2)),
  "raw": dataclasses.replace(CONFIG, unit_features=False),
  "pixels": dataclasses.replace(
    CONFIG, vision=dataclasses.replace(CONFIG.vision, pixel_mean=(0.5, 0.5, 0.5))),
}
NAMED = {
  "xpos": "text.xpos=True", "linear": "connector=LinearConnectorConfig",
  "feed-forward": "connector=FeedForwardConnectorConfig", "heads": "connector.num_heads=2",
  "raw": "unit_features=False", "pixels": "vision.pixel_mean=(0.5, 0.5, 0.5)",
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_no_published_model_has_is_described_and_loaded_and_not_exported(name, tmp_path):
  config = TRAINED[name]
  assert families.matching(config) is FAMILY
  model_lib.describe(tmp_path, config, family="kosmos-2")
  source = model_lib.load(str(tmp_path))
  assert source.config == config and hash(source.config) == hash(config)
  assert source.vocab_size == config.text.vocab_size
  with pytest.raises(ValueError) as error:
    exporting.export(tmp_path / "out", source, params={"a": jnp.zeros(1)})
  assert "has parts that no kosmos-2 model of transformers has (" in str(error.value)
  assert NAMED[name] in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("connector, sentence", [
  ({"num_latents": 4}, "a part has the type None, which is not one of ResamplerConfig, Linear"),
  ({"type": "os.system"}, "a part has the type 'os.system'"),
  ({"type": "ResamplerConfig", "num_latents": 0}, "num_latents=0 must be"),
  ("resampler", "does not describe a model of this version"),
])
def test_a_description_with_another_connector_is_refused(tmp_path, connector, sentence):
  model_lib.describe(tmp_path, CONFIG, family="kosmos-2")
  path = tmp_path / "model.json"
  described = json.loads(path.read_text())
  described["config"]["connector"] = connector
  path.write_text(json.dumps(described))
  with pytest.raises(ValueError, match="model.json does not describe a model") as error:
    model_lib.load(str(tmp_path))
  assert sentence in str(error.value)


def test_a_model_trained_here_is_exported_with_its_top_layer_in_place(tmp_path):
  vision = dataclasses.replace(CONFIG.vision, top_layers=1, any_size=True)
  text = dataclasses.replace(CONFIG.text, embedding_dropout=0.1, branch_gain="magneto")
  connector = ResamplerConfig(4, num_heads=4, dropout=0.1, unit_scale=True)
  config = dataclasses.replace(CONFIG, text=text, vision=vision, connector=connector)
  params = _params(CONFIG)
  split = {**params, "vision": with_top(params["vision"], 1)}
  exporting.export(tmp_path / "split", _source(config), split)
  exporting.export(tmp_path / "whole", _source(CONFIG), params)
  assert model_lib.load(str(tmp_path / "split")).config == CONFIG
  _assert_equal(model_lib.load(str(tmp_path / "split")).params(), params)
  _assert_equal(model_lib.load(str(tmp_path / "whole")).params(), params)
  with sources.open_source(tmp_path / "whole") as source:
    _assert_equal(importing.load_params(source, FAMILY, config), split)


def test_a_second_copy_of_the_embedding_must_equal_it_if_they_are_tied(tmp_path):
  params = _params(CONFIG)
  tensors = list(exporting.tensors(FAMILY, CONFIG, params, np.dtype("float32")))
  embedding = np.asarray(params["text"]["embedding"])

  def write(folder, head, **fields):
    folder.mkdir()
    extra = [
      ("text_model.lm_head.weight", head.shape, head.dtype, lambda: head),
      ("text_model.model.embed_positions.weights", (3, 32), head.dtype,
       lambda: np.zeros((3, 32), np.float32)),
      ("vision_model.model.embeddings.position_ids", (1, 5), np.dtype("int64"),
       lambda: np.arange(5)[None]),
    ]
    sources.write_safetensors(folder / "model.safetensors", [*tensors, *extra])
    (folder / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    return model_lib.load(str(folder))

  _assert_equal(write(tmp_path / "equal", embedding).params(), params)
  with pytest.raises(ValueError, match="lm_head.weight differs from text_model.model.embed_tokens"):
    write(tmp_path / "other", embedding + 1).params()
  untied = write(tmp_path / "untied", embedding + 1, tie_word_embeddings=False)
  np.testing.assert_array_equal(untied.params()["text"]["unembedding"], embedding.T + 1)
