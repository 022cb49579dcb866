"""A tiny GPT-2 of random weights with a tokenizer of bytes, as a published folder."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained import exporting, families
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.pretrained.safetensors_files import write_safetensors

END = "<|endoftext|>"


def write(folder: Path, *, spread: float = 4.0, max_length: int = 96) -> Path:
  """A folder that `pretrained.load` and transformers open; id 0 is BOS and EOS."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([END, *alphabet])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens([END])
  config = TransformerConfig(
    vocab_size=len(vocabulary), num_layers=2, width=16, num_heads=2, mlp_width=64,
    max_length=max_length, positions="learned", norm="layer", norm_eps=1e-5, gated_mlp=False,
    activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True)
  params = nn.unbox(jax.jit(Transformer(config).init)(
    jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
  params = jax.tree.map(
    lambda x: np.asarray(x) * (spread if np.std(x) > 0 else 1.0), params)
  folder.mkdir(parents=True)
  family = families.by_name("gpt2")
  fields = exporting.config_json(family, PretrainedModel(folder, "gpt2", config), "float32")
  fields |= {"bos_token_id": 0, "eos_token_id": 0}
  (folder / "config.json").write_text(json.dumps(fields))
  write_safetensors(
    folder / "model.safetensors",
    exporting.tensors(family, config, params, np.dtype("float32")))
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}))
  return folder
