"""The table of `config.json` equals transformers': defaults, what is absent, null or overridden."""

import json

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from huggingface_hub.errors import StrictDataclassError  # noqa: E402

from lmops_jax.pretrained import exporting, families, importing  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from lmops_jax.pretrained.families import published  # noqa: E402
from tests.pretrained.tiny_models import (  # noqa: E402
  CASES,
  VARIANTS,
  DictSource,
  make,
  randomise,
)

TABLE = {
  "GPT2": published.GPT2, "OPT": published.OPT, "XGLM": published.XGLM, "Bloom": published.Bloom,
  "GPTJ": published.GPTJ, "Llama": published.Llama, "Mistral": published.Mistral,
  "Qwen2": published.Qwen2, "Bert": published.Bert, "Roberta": published.Roberta,
  "Electra": published.Electra,
  "CLIP": published.Clip, "CLIPText": published.ClipText, "CLIPVision": published.ClipVision,
  "Kosmos2": published.Kosmos2, "Kosmos2Text": published.Kosmos2Text,
  "Kosmos2Vision": published.Kosmos2Vision,
}
PARTS = ("CLIPText", "CLIPVision", "Kosmos2Text", "Kosmos2Vision")
# Fields of files that the classes of this version of transformers do not list: of older versions,
# read by the models without a default, or not modelled here.
UNLISTED = {
  "n_embed", "seq_length", "position_embedding_type", "rope_scaling", "rope_theta",
  "original_max_position_embeddings", "partial_rotary_factor", "text_config_dict",
  "vision_config_dict",
}
NOT_THEIRS = {  # by family
  "Mistral": {"layer_types", "attention_bias", "mlp_bias"}, "Qwen2": {"head_dim", "mlp_bias"},
}


def _config_class(name):
  return getattr(transformers, f"{name}Config")


def _read(family, fields):
  return families.by_name(family).read_config(families.ConfigReader(fields, "config.json"))


def _theirs(family, fields):
  """What transformers makes of a file's fields, read here."""
  fields = {name: value for name, value in fields.items() if name != "transformers_version"}
  config = transformers.AutoConfig.for_model(**fields)
  return _read(family, json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("name", TABLE)
def test_defaults_are_those_of_transformers(name):
  theirs = _config_class(name).__dataclass_fields__
  checked = 0
  for field, own in TABLE[name].model_fields.items():
    alias = own.validation_alias
    key = alias if isinstance(alias, str) else alias.choices[-1] if alias else field
    inherited = field in published.AnyModel.model_fields and field not in vars(
      TABLE[name]
    ).get("__annotations__", ())  # ids and dtypes, of which no function here has need
    if inherited or key in UNLISTED | NOT_THEIRS.get(name, set()):
      continue
    assert own.default == theirs[key].default, key
    checked += 1
  assert checked > 2


@pytest.mark.parametrize("name", [name for name in TABLE if name not in PARTS])
def test_an_empty_file_is_the_default_model(name):
  family = _config_class(name).model_type
  whole = _config_class(name)().to_dict()
  assert _read(family, {"model_type": family}) == _read(family, whole)


@pytest.mark.parametrize("name", TABLE)
def test_other_names_of_a_field_are_those_of_transformers(name):
  names = {}
  for field in TABLE[name].model_fields.values():
    if isinstance(field.validation_alias, published.AliasChoices):
      *others, own = field.validation_alias.choices
      names |= dict.fromkeys(others, own)
  assert names == _config_class(name).attribute_map


@pytest.mark.parametrize("family,variant", CASES)
def test_a_field_that_is_left_out_has_the_default_of_transformers(family, variant):
  fields = make(family, variant).config.to_dict()
  changed = 0
  for name in families.by_name(family).schema.model_fields:
    if name not in fields:
      continue
    rest = {key: value for key, value in fields.items() if key != name}
    try:
      want = _theirs(family, rest)
    except (ValueError, StrictDataclassError):  # the default does not go with the other sizes
      continue
    assert _read(family, rest) == want, name
    changed += want != _read(family, fields)
  assert changed


@pytest.mark.parametrize("family", VARIANTS)
def test_null_is_what_transformers_takes_it_for(family):
  """Or refused: some of its classes take a null that their model cannot use."""
  fields = make(family).config.to_dict()
  taken = 0
  for name in families.by_name(family).schema.model_fields:
    if name not in fields or name == "pad_token_id":
      continue
    with_null = {**fields, name: None}
    try:
      want = _theirs(family, with_null)
    except Exception:  # what kind, transformers does not say
      if name == "num_key_value_heads":  # of Mistral, where it said "as many as heads" once
        assert _read(family, with_null).key_heads == 4
        continue
      with pytest.raises(ValueError, match=f"config.json: {name}=null should be"):
        _read(family, with_null)
      continue
    taken += 1
    assert _read(family, with_null) == want, name
  assert taken


@pytest.mark.parametrize("family,fields", [
  ("gpt2", {"n_embd": 24, "hidden_size": 48}), ("gpt2", {"max_position_embeddings": 40}),
  ("gptj", {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 3}),
  ("bloom", {"n_embed": 32, "num_attention_heads": 4, "num_hidden_layers": 3}),
  ("bloom", {"n_embed": None, "hidden_size": 32}), ("bloom", {"n_embed": 32, "hidden_size": 16}),
  ("xglm", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}),
  ("llama", {"rope_theta": 500.0}), ("llama", {"rope_theta": 5e5, "rope_scaling": None}),
  ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0}),
  ("llama", {"rope_parameters": {"rope_theta": 200.0}, "rope_theta": 300.0}),
  ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7.0,
             "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
  ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
  ("llama", {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}}),
  ("llama", {"pretraining_tp": 2, "head_dim": None, "num_key_value_heads": None}),
  ("qwen2", {"use_sliding_window": False, "sliding_window": 9}),
  ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
  ("qwen2", {"use_sliding_window": True, "max_window_layers": 40}),
  ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 2}),
  ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
  ("mistral", {}), ("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": 99}),
  ("opt", {"word_embed_proj_dim": None, "hidden_size": 24, "num_attention_heads": 2}),
  ("clip", {"text_config_dict": None, "text_config": {"eos_token_id": 9}}),
  ("clip", {"text_config_dict": {}, "text_config": {"eos_token_id": 9, "vocab_size": 99}}),
  ("clip", {"text_config_dict": {"vocab_size": 98}, "text_config": {"vocab_size": 99}}),
  ("clip", {"vision_config_dict": {"image_size": 64}, "vision_config": {"patch_size": 16}}),
  ("kosmos-2", {"text_config": {"hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 3}}),
  ("kosmos-2", {"vision_config": {"num_hidden_layers": 2}, "tie_word_embeddings": False}),
])
def test_fields_that_go_before_others_are_those_of_transformers(family, fields):
  assert _read(family, {"model_type": family, **fields}) == _theirs(
    family, {"model_type": family, **fields}
  )


def _tiny(family, **fields):
  base = VARIANTS[family][0]
  if family == "mistral":  # which with layer_types is another class, that needs it
    base = {**base, "head_dim": 6}
  return {"model_type": family, **base, "num_hidden_layers": 2, "vocab_size": 61, **fields}


@pytest.mark.parametrize("family,fields,window", [
  ("mistral", {"sliding_window": 5}, 5),
  ("mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 2}, None),
  ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, 5),
  ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
  ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 9}, None),
  ("qwen2", {"use_sliding_window": True, "sliding_window": 5,
             "layer_types": ["sliding_attention"] * 2}, 5),
  ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
             "layer_types": ["full_attention"] * 2}, None),
])
def test_windows_are_those_of_transformers_beyond_them(tmp_path, family, fields, window):
  (tmp_path / "config.json").write_text(json.dumps(_tiny(family, **fields)))
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  torch.manual_seed(0)
  peer = randomise(
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  )
  ours = _read(family, json.loads((tmp_path / "config.json").read_text()))
  assert ours.sliding_window == window
  tokens = np.random.default_rng(0).integers(3, 61, (1, 17))
  with torch.no_grad():
    want = np.asarray(peer(torch.tensor(tokens)).logits)
  params = importing.load_params(DictSource(peer), families.by_name(family), ours)
  model = families.by_name(family).module(ours)
  got = jax.jit(lambda p: model.apply({"params": p}, tokens.astype(np.int32), method="logits"))(
    params
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family,fields,sentence", [
  ("mistral", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5},
   "a window of 5 positions in 1 of 2 layers (layer_types), which lmops_jax does not model"),
  ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
   "a window of 5 positions in 1 of 2 layers (max_window_layers=1)"),
  ("mistral", {"layer_types": ["chunked_attention"] * 2}, "layer_types=[\"chunked_attention\""),
  ("mistral", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
  ("mistral", {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
   "layer_types with sliding_attention and no sliding_window"),
  ("mistral", {"attention_bias": True}, "attention_bias=true is not modelled"),
  ("qwen2", {"mlp_bias": True}, "mlp_bias=true is not modelled"),
  ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not modelled"),
  ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4} is not model'),
  ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention={"),
  ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false is not modelled"),
  ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
  ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true is not modelled"),
  ("bloom", {"apply_residual_connection_post_layernorm": True}, "=true is not modelled"),
  ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=false"),
  ("xglm", {"pad_token_id": 5}, "pad_token_id=5 is not modelled"),
  ("bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key"'),
  ("bert", {"is_decoder": True}, "is_decoder=true is not modelled"),
  ("electra", {"position_embedding_type": "relative_key"}, '="relative_key" is not modelled'),
  ("electra", {"is_decoder": True}, "is_decoder=true is not modelled"),
  ("electra", {"hidden_act": "relu"}, "hidden_act='relu', of a generator, whose head has gelu"),
  ("roberta", {"pad_token_id": 0}, "pad_token_id=0 is not modelled"),
  ("clip", {"vision_config": {"num_channels": 4}}, "num_channels=4 is not modelled"),
  ("kosmos-2", {"text_config": {"add_cross_attention": True}}, "add_cross_attention=true is not"),
])
def test_what_changes_the_function_and_is_not_modelled_is_refused_by_name(family, fields, sentence):
  if family in VARIANTS:
    fields = _tiny(family, **fields)
  with pytest.raises(ValueError) as error:
    _read(family, fields)
  assert sentence in str(error.value) and str(error.value).startswith("config.json")


def test_a_mixed_window_that_no_text_reaches_is_none():
  fields = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
  assert _read("qwen2", _tiny("qwen2", **fields)).sliding_window is None


def test_a_rewritten_file_drops_what_would_go_before_it():
  """Names, and old spellings, that transformers would take instead of the new values."""
  config = _read("bloom", {"n_embed": 32, "num_attention_heads": 4})
  family = families.by_name("bloom")
  source = model_lib.PretrainedModel(
    None, "bloom", config, original={"n_embed": 16, "num_attention_heads": 2}
  )
  written = exporting.config_json(family, source, "float32")
  assert written["hidden_size"] == 32 and written["n_head"] == 4
  assert not {"n_embed", "num_attention_heads"} & written.keys()
  assert _theirs("bloom", written) == config
