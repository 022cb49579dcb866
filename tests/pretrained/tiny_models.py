"""Tiny random models of each family, made by transformers; three variants each."""

import dataclasses
import functools

import numpy as np
import torch
import transformers

from lmops_jax.pretrained import families, importing

_COMMON = dict(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=1)
_GPT = dict(n_embd=24, n_layer=3, n_head=4, n_positions=40)
_LLAMA = dict(
  hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
  max_position_embeddings=64,
)
_ENCODER = dict(
  hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
  max_position_embeddings=40,
)
_OPT = dict(
  hidden_size=24, num_hidden_layers=3, num_attention_heads=4, ffn_dim=40,
  max_position_embeddings=40, word_embed_proj_dim=24,
)
_XGLM = dict(d_model=24, num_layers=3, attention_heads=4, ffn_dim=40, max_position_embeddings=40)
_LLAMA3 = dict(
  rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=16, rope_theta=100.0,
)

VARIANTS = {
  "gpt2": [{**_GPT}, {**_GPT, "tie_word_embeddings": False}, {**_GPT, "n_inner": 37, "n_head": 3}],
  "opt": [
    {**_OPT}, {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 10},
    {**_OPT, "tie_word_embeddings": False, "ffn_dim": 37},
  ],
  "xglm": [
    {**_XGLM}, {**_XGLM, "tie_word_embeddings": False}, {**_XGLM, "scale_embedding": False,
                                                        "ffn_dim": 37},
  ],
  "bloom": [
    dict(hidden_size=24, n_layer=3, n_head=4), dict(hidden_size=18, n_layer=2, n_head=3),
    dict(hidden_size=24, n_layer=3, n_head=6, tie_word_embeddings=False),
  ],
  "gptj": [
    {**_GPT, "rotary_dim": 4}, {**_GPT, "rotary_dim": 6}, {**_GPT, "rotary_dim": 2, "n_inner": 37},
  ],
  "llama": [
    {**_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    {**_LLAMA, "num_key_value_heads": 2, "rope_parameters": _LLAMA3, "attention_bias": True,
     "mlp_bias": True},
    {**_LLAMA, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 37},
  ],
  "mistral": [
    {**_LLAMA, "num_key_value_heads": 2, "sliding_window": None},
    {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 5, "tie_word_embeddings": True},
    {**_LLAMA, "num_key_value_heads": 4, "sliding_window": None, "head_dim": 10},
  ],
  "qwen2": [
    {**_LLAMA, "num_key_value_heads": 2}, {**_LLAMA, "num_key_value_heads": 1,
                                          "tie_word_embeddings": True},
    {**_LLAMA, "num_key_value_heads": 4, "intermediate_size": 37},
  ],
  "bert": [{**_ENCODER}, {**_ENCODER, "tie_word_embeddings": False}, {
    **_ENCODER, "type_vocab_size": 3, "hidden_act": "relu", "intermediate_size": 37}],
  "roberta": [
    {**_ENCODER, "type_vocab_size": 1}, {**_ENCODER, "type_vocab_size": 1,
                                         "tie_word_embeddings": False},
    {**_ENCODER, "type_vocab_size": 2, "intermediate_size": 37},
  ],
  "electra": [
    {**_ENCODER, "embedding_size": 10}, {**_ENCODER, "embedding_size": 24,
                                         "tie_word_embeddings": False},
    {**_ENCODER, "embedding_size": 30, "type_vocab_size": 3, "intermediate_size": 37},
  ],
}
CAUSAL = ("gpt2", "opt", "xglm", "bloom", "gptj", "llama", "mistral", "qwen2")
ENCODERS = ("bert", "roberta", "electra")
CASES = [(family, i) for family, variants in VARIANTS.items() for i in range(len(variants))]

_CLASSES = {
  "gpt2": "GPT2", "opt": "OPT", "xglm": "XGLM", "bloom": "Bloom", "gptj": "GPTJ", "llama": "Llama",
  "mistral": "Mistral", "qwen2": "Qwen2", "bert": "Bert", "roberta": "Roberta",
  "electra": "Electra",
}


@functools.cache
def make(family: str, variant: int = 0):
  """A language model in eval mode, whose weights are far from their initial ones."""
  name = _CLASSES[family]
  config = getattr(transformers, f"{name}Config")(
    **_COMMON, **VARIANTS[family][variant], initializer_range=0.15, attn_implementation="eager",
  )
  head = "ForMaskedLM" if family in ENCODERS else "ForCausalLM"
  if family == "gpt2":
    head = "LMHeadModel"
  torch.manual_seed(variant)
  return randomise(getattr(transformers, f"{name}{head}")(config))


@functools.cache
def kosmos2():
  """A model of the type of Kosmos-2 in eval mode, whose weights are far from their initial ones."""
  config = transformers.Kosmos2Config(
    text_config=dict(
      vocab_size=71, embed_dim=32, layers=3, ffn_dim=48, attention_heads=4,
      max_position_embeddings=64),
    vision_config=dict(
      hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
      image_size=20, patch_size=5),
    latent_query_num=4, attn_implementation="eager")
  torch.manual_seed(0)
  return randomise(transformers.Kosmos2ForConditionalGeneration(config))


def randomise(model):
  """A scale of one or a bias of zero would hide one in the wrong place."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        low = 0.5 if name.endswith("weight") else -0.5
        parameter.uniform_(low, low + 1)
      elif parameter.ndim == 2:
        parameter.normal_(0, 0.15)
  return model.float().eval()


class DictSource:
  """The tensors of a model in memory, as `sources.TensorSource` gives those of a file."""

  def __init__(self, model):
    self.where = type(model).__name__
    self.tensors = {
      name: np.asarray(tensor.detach()) for name, tensor in model.state_dict().items()
    }

  def names(self):
    return list(self.tensors)

  def shape(self, name):
    return self.tensors[name].shape

  def dtype(self, name):
    return self.tensors[name].dtype

  def read(self, name):
    return self.tensors[name]


@functools.cache
def imported(family: str, variant: int = 0):
  """`make`'s model, its family, and the same model here: configuration and parameters."""
  peer = make(family, variant)
  table = families.by_name(family)
  config = table.read_config(families.ConfigReader(peer.config.to_dict(), "config.json"))
  source = DictSource(peer)
  names = importing.NameTable(source, table)
  if config.pooler and not names.has((r"pooler\.",)):
    config = dataclasses.replace(config, pooler=False)
  config = dataclasses.replace(config, detector=False)  # transformers' class has the other head
  config = dataclasses.replace(config, scan_layers=variant == 0)
  return peer, table, config, importing.load_params(source, table, config)
