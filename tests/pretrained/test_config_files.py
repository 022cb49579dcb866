"""Nonsense in `config.json` and `model.json`: one sentence that names the file, or a model."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.partitioning import unboxed
from lmops_jax.pretrained import exporting, families, importing
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.sources import open_source, write_safetensors
from tests import model_folders

_NAMES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=24)
_FULL = {**_NAMES, "intermediate_size": 20, "max_position_embeddings": 12}
_GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=12, vocab_size=24, n_inner=20)
_TOWER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
FILES = {
  "gpt2": _GPT, "gptj": {**_GPT, "rotary_dim": 4},
  "bloom": dict(hidden_size=16, n_layer=2, n_head=2, vocab_size=24),
  "opt": {**_NAMES, "ffn_dim": 20, "max_position_embeddings": 12, "word_embed_proj_dim": 16},
  "xglm": dict(d_model=16, num_layers=2, attention_heads=2, ffn_dim=20, vocab_size=24,
               max_position_embeddings=12),
  "llama": {**_FULL, "num_key_value_heads": 1, "head_dim": 8, "rope_parameters": {
    "rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
  "mistral": {**_FULL, "num_key_value_heads": 1, "sliding_window": 4},
  "qwen2": {**_FULL, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4,
            "max_window_layers": 0},
  "bert": {**_FULL, "type_vocab_size": 2}, "roberta": {**_FULL, "type_vocab_size": 1},
  "electra": {**_FULL, "type_vocab_size": 2, "embedding_size": 10},
  "clip": {
    "text_config": {**_TOWER, "vocab_size": 24, "max_position_embeddings": 12, "eos_token_id": 5},
    "vision_config": {**_TOWER, "image_size": 8, "patch_size": 4}, "projection_dim": 8,
  },
  "kosmos-2": {
    "text_config": dict(embed_dim=16, layers=2, attention_heads=2, ffn_dim=20, vocab_size=24),
    "vision_config": {**_TOWER, "image_size": 8, "patch_size": 4}, "latent_query_num": 4,
  },
}
SIZES = {
  "vocab_size", "intermediate_size", "hidden_size", "n_embd", "n_inner", "ffn_dim", "d_model",
  "head_dim", "type_vocab_size", "projection_dim", "image_size", "word_embed_proj_dim",
  "num_hidden_layers", "n_layer", "num_layers", "n_positions", "max_position_embeddings",
  "embed_dim", "layers", "embedding_size", "latent_query_num",
}
POSITIONS = {  # of which a checkpoint holds a table, by family
  "n_positions": ("gpt2",), "max_position_embeddings": (
    "opt", "bert", "roberta", "electra", "clip"),
}
NONSENSE = (None, True, -1, 0, 1.5, 10**12, 10**400, "x", [], [5], {}, {"a": 1}, math.nan, math.inf)
PYTHON = (
  "NoneType", "int object", "'int'", "'str'", "'float'", "'dict'", "'list'", "pydantic", "Input",
  "unhashable", "Error", "<",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """`family -> folder` with weights of its shapes."""
  made = {}

  def folder(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp(name)
      family = families.by_name(name)
      fields = {"model_type": name, **FILES[name]}
      config = family.read_config(families.ConfigReader(fields, "config.json"))
      shapes = unboxed(importing.abstract_params(family, config))
      params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
      write_safetensors(
        made[name] / "model.safetensors",
        exporting.tensors(family, config, params, np.dtype("float32")),
      )
    _write(made[name], {"model_type": name, **FILES[name]})
    return made[name]

  return folder


def _write(folder, fields):
  (folder / "config.json").write_text(json.dumps(fields))


def _refusal(folder):
  """The sentence with which a folder is refused, None where it is a model."""
  try:
    model_lib.load(str(folder))
  except ValueError as error:
    sentence = str(error)
    assert "config.json" in sentence and "\n" not in sentence, sentence
    assert not any(word in sentence for word in PYTHON), sentence
    return sentence
  return None


def _places(fields):
  """Paths of all fields, those of nested objects too."""
  for name, value in fields.items():
    yield (name,)
    if isinstance(value, dict):
      yield from ((name, *path) for path in _places(value))


def _with(fields, path, value):
  if len(path) == 1:
    return {**fields, path[0]: value}
  return {**fields, path[0]: _with(fields[path[0]], path[1:], value)}


@pytest.mark.parametrize("name", FILES)
def test_nonsense_in_any_field_is_one_sentence(folders, name):
  folder, fields = folders(name), {"model_type": name, **FILES[name]}
  assert _refusal(folder) is None
  schema = families.by_name(name).schema
  absent = [(field,) for field in (*schema.model_fields, *schema.superseding())]
  refused = 0
  for path in dict.fromkeys([*_places(fields), *absent]):
    for value in NONSENSE:
      _write(folder, _with(fields, path, value))
      refused += _refusal(folder) is not None
  assert refused > 5 * len(fields)


@pytest.mark.parametrize("name", FILES)
def test_declared_sizes_are_held_against_the_tensors(folders, name):
  folder, fields = folders(name), {"model_type": name, **FILES[name]}
  sizes = [path for path in _places(fields) if path[-1] in SIZES and (
    path[-1] not in POSITIONS or name in POSITIONS[path[-1]]
  )]
  assert len(sizes) >= 3
  for path in sizes:
    for value in (10**6, 10**12):
      _write(folder, _with(fields, path, value))
      sentence = _refusal(folder)
      assert sentence is not None, path
      assert path[-1] in sentence and "000000" in sentence, sentence
      known = "layers: it lacks" in sentence or "its longest axis is" in sentence
      assert known or "at most 2147483647" in sentence, sentence


def test_more_layers_than_the_weights_hold_is_told_with_both_numbers(folders):
  folder = folders("llama")
  _write(folder, {"model_type": "llama", **FILES["llama"], "num_hidden_layers": 10**12})
  assert _refusal(folder) == (
    f"{folder}/config.json: num_hidden_layers=1000000000000, but {folder} holds 2 layers: it lacks "
    "model.layers.2.input_layernorm.weight."
  )
  _write(folder, {"model_type": "llama", **FILES["llama"], "vocab_size": 10**12})
  assert _refusal(folder) == (
    f"{folder}/config.json: vocab_size=1000000000000, but no tensor of {folder} is that large; its "
    "longest axis is 24 (model.embed_tokens.weight)."
  )


def test_a_layer_with_an_absurd_number_is_not_counted_to(folders, tmp_path):
  folder = folders("llama")
  with open_source(folder) as source:
    tensors = {name: source.read(name) for name in source.names()}
  tensors["model.layers.999999999.input_layernorm.weight"] = np.zeros(16, np.float32)
  write_safetensors(tmp_path / "model.safetensors", [
    (name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()])
  _write(tmp_path, {"model_type": "llama", **FILES["llama"], "num_hidden_layers": 10**9})
  assert "num_hidden_layers=1000000000, but" in _refusal(tmp_path)


@pytest.mark.parametrize("name,fields,sentence", [
  ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 should be a whole number of at"),
  ("llama", {"num_key_value_heads": 3}, "num_attention_heads=2 should be a multiple of num_key_va"),
  ("gpt2", {"n_head": 3}, "n_embd=16 should be a multiple of n_head=3"),
  ("gpt2", {"num_attention_heads": -1}, "num_attention_heads=-1 should be"),
  ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 3},
   "hidden_size=16 should be a multiple of num_attention_heads=3, or head_dim be given"),
  ("llama", {"head_dim": 7}, "head_dim=7 must be even"),
  ("gptj", {"rotary_dim": 64}, "rotary_dim=64 must not exceed head_dim=8"),
  ("llama", {"architectures": 5}, "architectures=5 should be a list"),
  ("llama", {"architectures": [5]}, "architectures[0]=5 should be a text"),
  ("llama", {"model_type": "t5", "architectures": 5}, "architectures=5 should be a list"),
  ("llama", {"model_type": ["llama"]}, "model_type ['llama'] (no architecture)"),
  ("llama", {"rope_parameters": "x"}, 'rope_parameters="x" should be an object'),
  ("llama", {"dtype": [1]}, "dtype=[1] should be a text"),
  ("llama", {"torch_dtype": 5}, "torch_dtype=5 should be a text"),
  ("llama", {"hidden_act": ["silu"]}, 'hidden_act=["silu"] should be a text'),
  ("llama", {"eos_token_id": "x"}, 'eos_token_id="x" should be a whole number or a list'),
  ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps=NaN should be a finite number above 0"),
  ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings=null should be true or false"),
  ("llama", {"max_position_embeddings": 10**12}, "of at most 2147483647"),
  ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings=2, of which the first 2"),
  ("clip", {"text_config": {"hidden_size": 5}}, "hidden_size=5 should be a multiple of num_atten"),
  ("clip", {"vision_config": {"patch_size": 999}}, "patch_size=999 should not exceed image_size"),
])
def test_what_makes_no_model_says_why(folders, name, fields, sentence):
  folder = folders(name)
  _write(folder, {"model_type": name, **FILES[name], **fields})
  assert sentence in _refusal(folder)


@pytest.mark.parametrize("content,sentence", [
  ("[]", "config.json holds [] and should hold an object with fields"),
  ("null", "config.json holds null and should hold an object"),
  ("5", "config.json holds 5 and should hold an object"),
  ("{", "config.json is not valid JSON"), ('{"a":' * 99_999, "nested too deeply"),
  ('{"vocab_size": 1' + "0" * 5_000 + "}", "a whole number of thousands of digits"),
])
def test_what_is_no_object_is_refused(folders, content, sentence):
  folder = folders("llama")
  (folder / "config.json").write_text(content)
  assert sentence in _refusal(folder)


def test_a_field_may_be_given_by_another_familys_name(folders):
  folder = folders("gpt2")
  want = model_lib.load(str(folder)).config
  other = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_positions": "max_position_embeddings"}
  _write(folder, {
    "model_type": "gpt2", **{other.get(name, name): value for name, value in FILES["gpt2"].items()}
  })
  assert model_lib.load(str(folder)).config == want


@pytest.mark.parametrize("fields,sentence", [
  ({"family": "t5"}, 'family="t5" should be one of "gpt2", "opt"'),
  ({"format": 2}, "format=2 should be 1"), ({"config": []}, "config=[] should be an object"),
  ({"params": None}, "params=null should be a text"),
  ({"config": {"depth": 2}}, "does not describe a model of this version"),
  ({"config": {"num_layers": "x"}}, "num_layers='x' must be an integer"),
  ({"config": {"rope_base": "x"}}, "does not describe a model of this version"),
  ({"config": {"rope_scaling": {"kind": "su"}}}, "must be 'linear', 'dynamic'"),
])
def test_nonsense_in_a_description_is_one_sentence(tmp_path, fields, sentence):
  source = model_lib.load(str(model_folders.write(tmp_path / "in")))
  model_lib.describe(tmp_path, source.config)
  described = json.loads((tmp_path / "model.json").read_text())
  assert model_lib.load(str(tmp_path)).config == source.config
  (tmp_path / "model.json").write_text(json.dumps({**described, **fields}))
  with pytest.raises(ValueError) as error:
    model_lib.load(str(tmp_path))
  assert sentence in str(error.value) and "model.json" in str(error.value)


def test_a_model_with_a_scalar_is_exported(folders, tmp_path):
  source = model_lib.load(str(folders("clip")))
  exporting.export(tmp_path / "out", source)
  assert model_lib.load(str(tmp_path / "out")).params()["logit_scale"].shape == ()


def test_abstract_parameters_of_an_image_model_make_no_image():
  config = families.by_name("clip").read_config(families.ConfigReader({}, "config.json"))
  inputs = families.by_name("clip").inputs(config)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in inputs)
  assert inputs[1].dtype == jnp.float32
