"""Rotary positions that are stretched: config.json, GGUF and exports, beyond the first length."""

import json
import math
import struct

import gguf
import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.pretrained import exporting  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from tests.pretrained.tiny_models import randomise  # noqa: E402

FIRST, LONGEST, HEADS, KV_HEADS, HEAD_DIM = 16, 64, 4, 2, 8
TOKENS = np.random.default_rng(0).integers(3, 61, (1, 48))  # past the first 16 positions
SIZES = dict(
  vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
  num_key_value_heads=KV_HEADS, intermediate_size=40, max_position_embeddings=LONGEST,
  rms_norm_eps=1e-5,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": FIRST}
LLAMA3 = {
  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": FIRST,
}
FACTORS = [1.0, 1.5, 3.0, 6.0]
LONGROPE = {
  "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 4.0,
  "original_max_position_embeddings": FIRST,
}


def _peer(family="Llama", **fields):
  torch.manual_seed(0)
  config = getattr(transformers, f"{family}Config")(
    **SIZES, **fields, attn_implementation="eager"
  )
  return randomise(getattr(transformers, f"{family}ForCausalLM")(config))


def _torch_logits(peer):
  with torch.no_grad():
    return np.asarray(peer(torch.tensor(TOKENS)).logits)


def _logits(source):
  tokens = TOKENS.astype(np.int32)
  return jax.jit(lambda p: source.model.apply({"params": p}, tokens, method="logits"))(
    source.params()
  )


def _close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", [
  {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
  {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 100.0},
  {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
  {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
  {"rope_scaling": LLAMA3, "rope_theta": 100.0},
  {"rope_parameters": {**YARN, "rope_theta": 100.0}},
  {"rope_scaling": {**YARN, "type": "yarn", "attention_factor": 0.8}, "rope_theta": 100.0},
  {"rope_parameters": {**YARN, "rope_theta": 100.0, "beta_fast": 4.0, "beta_slow": 0.5,
                       "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3}},
  {"rope_parameters": {**YARN, "rope_theta": 100.0, "factor": None, "mscale": 0.7}},
  {"rope_parameters": {**YARN, "rope_theta": 100.0}, "original_max_position_embeddings": 8},
  {"rope_parameters": {**LONGROPE, "rope_theta": 100.0}},
  {"rope_parameters": {**LONGROPE, "attention_factor": 1.1, "rope_theta": 100.0}},
])
def test_logits_equal_torch_and_an_export_says_the_same(tmp_path, fields):
  peer = _peer(**fields)
  want = _torch_logits(peer)
  unstretched = _torch_logits(_peer(rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
  kind = next(f for f in fields.values() if isinstance(f, dict))
  if kind.get("rope_type") != "dynamic":  # which changes longer texts only
    assert np.abs(want - unstretched).max() > 1e-2
  peer.save_pretrained(tmp_path / "in")
  config = json.loads((tmp_path / "in/config.json").read_text())
  if "rope_scaling" in fields:  # as older versions wrote it
    del config["rope_parameters"]
    config |= fields
  (tmp_path / "in/config.json").write_text(json.dumps(config))
  source = model_lib.load(str(tmp_path / "in"))
  _close(_logits(source), want)

  without = model_lib.dataclasses.replace(source, original={})
  exporting.export(tmp_path / "out", without)
  _close(_logits(model_lib.load(str(tmp_path / "out"))), want)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  _close(_torch_logits(again.float().eval()), want)


def test_a_stretch_that_transformers_cannot_say_is_not_exported(tmp_path):
  peer = _peer(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0})
  peer.save_pretrained(tmp_path / "in")
  source = model_lib.load(str(tmp_path / "in"))
  scaling = model_lib.dataclasses.replace(source.config.rope_scaling, attention_factor=0.5)
  config = model_lib.dataclasses.replace(source.config, rope_scaling=scaling)
  with pytest.raises(ValueError, match="has parts that no llama model of transformers has"):
    exporting.export(tmp_path / "out", model_lib.dataclasses.replace(source, config=config))


def test_a_converted_model_keeps_its_stretch(tmp_path):
  peer = _peer(rope_parameters={**LONGROPE, "rope_theta": 100.0})
  peer.save_pretrained(tmp_path / "in")
  source = model_lib.load(str(tmp_path / "in"))
  model_lib.save_model(tmp_path / "converted", source, source.params())
  again = model_lib.load(str(tmp_path / "converted"))
  assert again.config == source.config and hash(again.config) == hash(source.config)
  _close(_logits(again), _torch_logits(peer))


def test_yarn_beside_the_first_length_reaches_the_stretched_one(tmp_path):
  """As Qwen2.5 documents it: max_position_embeddings stays, rope_scaling is put beside it."""
  peer = _peer("Qwen2", rope_parameters={**YARN, "rope_theta": 100.0})
  peer.save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  config["max_position_embeddings"] = FIRST
  (tmp_path / "config.json").write_text(json.dumps(config))
  source = model_lib.load(str(tmp_path))
  assert source.config.max_length == 4 * FIRST
  _close(_logits(source), _torch_logits(peer))


@pytest.mark.parametrize("fields,sentence", [
  ({"rope_type": "longrope", "short_factor": FACTORS, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": FIRST}, "other factors for long texts than for short"),
  ({"rope_type": "longrope", "short_factor": FACTORS}, "by 'longrope' without long_factor"),
  ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "1 factors for the 4"),
  ({"rope_type": "linear"}, "by 'linear' without factor; give it in rope_parameters"),
  ({"rope_type": "dynamic"}, "by 'dynamic' without factor"),
  ({"rope_type": "llama3", "factor": 2.0}, "by 'llama3' without low_freq_factor"),
  ({"rope_type": "proportional"}, "positions by 'proportional'; lmops_jax reads default"),
  ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 must be a number of at least 1"),
  ({"rope_type": "linear", "factor": "2"}, 'rope_parameters.factor="2" should be a finite'),
  ({"rope_type": None}, "rope_parameters.rope_type=null should be a text"),
  ({"type": ["yarn"]}, 'rope_parameters.type=["yarn"] should be a text'),
  ({"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 2**40},
   "original_max_position_embeddings=1099511627776 should be"),
])
def test_stretches_that_are_not_modelled_are_refused_by_name(tmp_path, fields, sentence):
  (tmp_path / "config.json").write_text(
    json.dumps({"model_type": "llama", **SIZES, "rope_parameters": fields})
  )
  with pytest.raises(ValueError) as error:
    model_lib.load(str(tmp_path))
  assert sentence in str(error.value) and "config.json" in str(error.value)


# The same in GGUF

_NAMES = {
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down", "embed_tokens": "token_embd", "norm": "output_norm",
}


def _as_neighbours(x, heads):
  """llama.cpp's order of rotary pairs."""
  return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, peer, *, kind="llama", factors=None, leave_out=(), **keys):
  """A model of transformers as llama.cpp's converter writes it; `keys` with `__` for dots."""
  writer = gguf.GGUFWriter(str(path), kind)
  writer.add_context_length(LONGEST)
  writer.add_embedding_length(SIZES["hidden_size"])
  writer.add_block_count(SIZES["num_hidden_layers"])
  writer.add_feed_forward_length(SIZES["intermediate_size"])
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(100.0)
  writer.add_rope_dimension_count(HEAD_DIM)
  writer.add_tokenizer_model("llama")
  writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(65 + i) for i in range(58))])
  writer.add_token_scores([0.0] * 61)
  writer.add_token_types([2, 3, 3] + [1] * 58)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  for key, value in keys.items():
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
    add(f"{kind}.{key.replace('__', '.')}", value)
  for name, tensor in peer.state_dict().items():
    x = np.ascontiguousarray(tensor.detach().numpy())
    name, suffix = name.removeprefix("model.").rsplit(".", 1)
    if name == "lm_head":
      name = "output"
    elif name.startswith("layers."):
      _, i, name = name.split(".", 2)
      if kind == "llama" and name in ("self_attn.q_proj", "self_attn.k_proj"):
        x = _as_neighbours(x, HEADS if name == "self_attn.q_proj" else KV_HEADS)
      name = f"blk.{i}.{_NAMES[name]}"
    else:
      name = _NAMES[name]
    if f"{name}.{suffix}" not in leave_out:
      writer.add_tensor(f"{name}.{suffix}", np.ascontiguousarray(x))
  if factors is not None:
    writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return model_lib.load(str(path))


def llama3_factors():
  """What llama.cpp's converter divides the frequencies by, from the published formula."""
  found = []
  for frequency in 100.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
    turns = FIRST * frequency / (2 * math.pi)
    smooth = min(max((turns - 1) / 3, 0), 1)
    found.append(1 / ((1 - smooth) / 8 + smooth))
  return found


THETA = {"rope_theta": 100.0}


@pytest.mark.parametrize("theirs,ours", [
  ({**LLAMA3, **THETA}, {"factors": llama3_factors()}),
  ({"rope_type": "linear", "factor": 4.0, **THETA},
   {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
  ({"rope_type": "linear", "factor": 4.0, **THETA}, {"rope__scale_linear": 4.0}),
  ({"rope_type": "default", **THETA},
   {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}),
  ({"rope_type": "default", **THETA}, {"rope__scaling__factor": 0.0}),
  ({**YARN, **THETA}, {
    "rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": FIRST}),
  ({**YARN, **THETA, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 0.75}, {
    "rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": FIRST, "rope__scaling__yarn_beta_fast": 4.0,
    "rope__scaling__yarn_beta_slow": 0.5, "rope__scaling__yarn_attn_factor": 0.75}),
  ({**YARN, **THETA, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)}, {
    "rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": FIRST, "rope__scaling__attn_factor": 0.5}),
  ({**LONGROPE, **THETA, "short_factor": [2 * f for f in FACTORS], "attention_factor": 1.0,
    "long_factor": [2 * f for f in FACTORS]}, {"factors": FACTORS, "rope__scaling__factor": 2.0}),
])
def test_gguf_logits_equal_torch_and_exports_say_the_same(tmp_path, theirs, ours):
  peer = _peer(rope_parameters=theirs)
  want = _torch_logits(peer)
  source = write_gguf(tmp_path / "x.gguf", peer, **ours)
  _close(_logits(source), want)
  exporting.export(tmp_path / "out", source)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  _close(_torch_logits(again.float().eval()), want)


def test_gguf_with_biases_equals_torch(tmp_path):
  peer = _peer(
    attention_bias=True, mlp_bias=True, rope_parameters={"rope_type": "default", **THETA}
  )
  _close(_logits(write_gguf(tmp_path / "x.gguf", peer)), _torch_logits(peer))
  peer = _peer("Qwen2", rope_parameters={"rope_type": "default", **THETA})
  _close(_logits(write_gguf(tmp_path / "y.gguf", peer, kind="qwen2")), _torch_logits(peer))


@pytest.mark.parametrize("present", ["token_embd.weight", "output.weight"])
def test_gguf_with_one_of_two_tied_matrices(tmp_path, present):
  peer = _peer(tie_word_embeddings=True, rope_parameters={"rope_type": "default", **THETA})
  absent = {"token_embd.weight", "output.weight"} - {present}
  source = write_gguf(tmp_path / "x.gguf", peer, leave_out=absent)
  assert source.config.tied_embeddings
  _close(_logits(source), _torch_logits(peer))


@pytest.mark.parametrize("ours,sentence", [
  ({"rope__scaling__type": "longrope"}, 'rope.scaling.type="longrope" is not modelled'),
  ({"rope__scaling__type": 5}, "rope.scaling.type=5 should be a text"),
  ({"rope__scaling__factor": 0.5}, "factor=0.5 must be a number of at least 1"),
  ({"rope__scaling__factor": math.nan}, "rope.scaling.factor=NaN should be a finite number"),
  ({"rope__scaling__type": "yarn", "rope__scaling__yarn_ext_factor": 0.5}, "ext_factor=0.5 is not"),
  ({"rope__scaling__type": "yarn", "factors": FACTORS}, "rope.scaling.type=yarn and a tensor rope"),
  ({"factors": [1.0, 2.0]}, "holds rope_freqs.weight [2], which should be 4 positive numbers"),
  ({"factors": [1.0, 0.0, 1.0, 1.0]}, "holds rope_freqs.weight [4], which should be 4 positive"),
  ({"expert_count": 8}, "expert_count=8 is not modelled"),
  ({"attention__value_length": 4}, "attention.value_length=4 is not modelled"),
])
def test_gguf_that_is_not_modelled_is_refused_by_name(tmp_path, ours, sentence):
  peer = _peer(rope_parameters={"rope_type": "default", **THETA})
  with pytest.raises(ValueError) as error:
    write_gguf(tmp_path / "x.gguf", peer, **ours)
  assert sentence in str(error.value) and "x.gguf" in str(error.value)


@pytest.mark.parametrize("key,number,sentence", [
  ("block_count", 2**32 - 1, "block_count=4294967295, but .*.gguf holds 2 layers: it lacks blk.2."),
  ("block_count", 0, "block_count=0 should be a whole number of at least 1"),
  ("embedding_length", 2**31, r"embedding_length=2147483648, but its token_embd.weight is"),
  ("feed_forward_length", 2**31, "feed_forward_length=2147483648, but no tensor"),
  ("attention.head_count", 0, "attention.head_count=0 should be"),
  ("attention.head_count", 3, "attention.head_count=3 should be a multiple of .*head_count_kv=2"),
  ("attention.head_count", 6, "embedding_length=32 should be a multiple of attention.head_count=6"),
  ("attention.head_count_kv", 3, "should be a multiple of attention.head_count_kv=3"),
  ("rope.dimension_count", 4, "rope.dimension_count=4 is not modelled"),
  ("context_length", 2**32 - 1, "context_length=4294967295 should be .* at most 2147483647"),
  ("context_length", 0, "context_length=0 should be"),
])
def test_gguf_counts_are_held_against_its_tensors(tmp_path, key, number, sentence):
  path = tmp_path / "x.gguf"
  write_gguf(path, _peer(rope_parameters={"rope_type": "default", **THETA}))
  content, name = bytearray(path.read_bytes()), f"llama.{key}".encode()
  place = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
  struct.pack_into("<I", content, place, number)
  path.write_bytes(content)
  with pytest.raises(ValueError, match=sentence) as error:
    model_lib.load(str(path))
  assert "x.gguf" in str(error.value)
