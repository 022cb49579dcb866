"""A tiny model folder, made without any other library's models: config, weights, tokenizer."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.pretrained import exporting, families
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.pretrained.sources import write_safetensors

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
  "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer() -> tokenizers.Tokenizer:
  """A token for each byte, after BOS (id 0, put in front of every text) and EOS (id 1)."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([BOS, EOS, *alphabet])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens([BOS, EOS])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{BOS} $A", special_tokens=[(BOS, 0)]
  )
  return tokenizer


@functools.cache
def _random(model, seed: int):
  """Initial parameters, on the host, made once for all folders with the same model."""
  params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
  return jax.tree.map(np.asarray, nn.unbox(params))


def write(folder: Path, *, seed: int = 0, spread: float = 20.0, **changes) -> Path:
  """A Llama-type model of random weights, large enough to have opinions; returns the folder."""
  tokenizer = byte_tokenizer()
  config = TransformerConfig(**{
    **dict(vocab_size=tokenizer.get_vocab_size(), num_layers=2, width=16, num_heads=4,
           num_kv_heads=2, mlp_width=24, max_length=256),
    **changes,
  })
  params = _random(Transformer(config), seed)
  params = jax.tree.map(lambda p: p * (spread if np.std(p) > 0 else 1), params)
  folder.mkdir(parents=True, exist_ok=True)
  family = families.by_name("llama")
  source = PretrainedModel(folder, "llama", config)
  fields = exporting.config_json(family, source, "float32")
  (folder / "config.json").write_text(json.dumps({**fields, "bos_token_id": 0, "eos_token_id": 1}))
  write_safetensors(
    folder / "model.safetensors", exporting.tensors(family, config, params, np.dtype("float32"))
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
    "chat_template": TEMPLATE,
  }))
  return folder


def write_docked(
  folder: Path, *, seed: int = 0, max_length: int = 64, words: Sequence[str] = (),
  vocab_size: int | None = None,
) -> Path:
  """A model of the type of Kosmos of random weights that sees; returns the folder.

  Args:
    words: further ones of its vocabulary, which swallow the blanks on their left.
    vocab_size: of the model; None is its tokenizer's.
  """
  tokenizer = byte_tokenizer()
  tokenizer.add_special_tokens(["<pad>", "<image>", "</image>", "</line>"])
  tokenizer.add_tokens([
    tokenizers.AddedToken(word, lstrip=True, normalized=False) for word in words])
  fields = {
    "model_type": "kosmos-2", "latent_query_num": 4, "bos_token_id": 0,
    "eos_token_id": 1, "architectures": ["Kosmos2ForConditionalGeneration"],
    "text_config": dict(
      vocab_size=vocab_size or tokenizer.get_vocab_size(), embed_dim=16, layers=2, ffn_dim=24,
      attention_heads=4, max_position_embeddings=max_length, eos_token_id=1),
    "vision_config": dict(
      hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
      image_size=8, patch_size=4),
  }
  family = families.by_name("kosmos-2")
  config = family.read_config(families.ConfigReader(fields, "config.json"))
  params = _random(family.module(config), seed)
  params = jax.tree.map(lambda p: p * (10 if 0 < np.std(p) < 0.3 else 1), params)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(fields))
  write_safetensors(
    folder / "model.safetensors", exporting.tensors(family, config, params, np.dtype("float32")))
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
    "pad_token": "<pad>",
  }))
  return folder
