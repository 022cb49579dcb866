"""llama.cpp's names for Llama-, Mistral- and Qwen2-type models, and its order of rotary pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families.family import ConfigReader, Family
from lmops_jax.pretrained.families.llama import LLAMA, QWEN2
from lmops_jax.pretrained.rules import Rule

_FAMILIES = {"llama": LLAMA, "qwen2": QWEN2}
_BODY = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
}
_LAYER = {
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def read_gguf(
  metadata: Mapping[str, Any], vocab_size: int, untied: bool, where: str
) -> tuple[Family, TransformerConfig]:
  """The family of a GGUF file, with its table in GGUF's names, and the configuration.

  Args:
    metadata: decoded keys and values.
    vocab_size: rows of the embedding.
    untied: whether there is an output matrix of its own.
    where: the file, for errors.

  Raises:
    ValueError: an architecture without a table, or a missing key.
  """
  kind = metadata.get("general.architecture")
  if kind not in _FAMILIES:
    raise ValueError(
      f"{where} has general.architecture={kind!r}; the GGUF architectures that lmops_jax reads are "
      f"{', '.join(_FAMILIES)}."
    )
  r = ConfigReader(
    {key.removeprefix(f"{kind}."): value for key, value in metadata.items()
     if key.startswith(f"{kind}.")}, where,
  )
  r.refuse("rope.scaling.type", "none")
  family = _FAMILIES[kind]
  heads, width = r.need("attention.head_count"), r.need("embedding_length")
  head_dim = r.get("attention.key_length", width // heads)
  r.refuse("rope.dimension_count", head_dim)
  config = TransformerConfig(
    vocab_size=vocab_size, num_layers=r.need("block_count"), width=width, num_heads=heads,
    num_kv_heads=r.get("attention.head_count_kv", heads),
    head_dim=None if head_dim == width // heads else head_dim,
    mlp_width=r.need("feed_forward_length"), max_length=r.need("context_length"),
    tied_embeddings=not untied, rope_base=float(r.get("rope.freq_base", 1e4)),
    norm_eps=float(np.float32(r.need("attention.layer_norm_rms_epsilon"))),
    qkv_bias=kind == "qwen2",
  )

  def rules(c: TransformerConfig) -> list[Rule]:
    return [_renamed(rule, c, turned=kind == "llama") for rule in family.rules(c)]

  return dataclasses.replace(family, prefix="", rules=rules, tied=()), config


def _renamed(rule: Rule, c: TransformerConfig, turned: bool) -> Rule:
  name, suffix = rule.theirs.rsplit(".", 1)
  layer = "model.layers.{i}."
  if name.startswith(layer):
    short = _LAYER[name.removeprefix(layer)]
    rule = rule._replace(theirs=f"blk.{{i}}.{short}.{suffix}")
    if turned and short in ("attn_q", "attn_k"):
      return _unturned(rule, c.num_heads if short == "attn_q" else c.key_heads)
    return rule
  return rule._replace(theirs=f"{_BODY[name]}.{suffix}")


def _unturned(rule: Rule, heads: int) -> Rule:
  """llama.cpp stores the rows of a head's rotary pairs as neighbours; here they are halves."""

  def split(x):
    x = x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    return rule.split(x)

  def join(y):
    x = rule.join(y)
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

  return rule._replace(split=split, join=join)
