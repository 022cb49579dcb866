"""XGLM and fairseq's dense models (arXiv:2112.10668, 2112.10684): fixed sinusoids from row 2."""

import math

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  mlp_rules,
  norm_rules,
  same,
  unembedding_rules,
)


def _read(r: ConfigReader) -> TransformerConfig:
  p = r.read(published.XGLM)
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.num_layers, width=p.d_model,
    num_heads=p.attention_heads, mlp_width=p.ffn_dim, max_length=p.max_position_embeddings,
    tied_embeddings=p.tie_word_embeddings, norm="layer", positions="sinusoidal",
    position_offset=2, activation=r.activation("activation_function", p.activation_function),
    gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True,
    embedding_scale=math.sqrt(p.d_model) if p.scale_embedding else 1.0,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "num_layers": c.num_layers, "d_model": c.width,
    "attention_heads": c.num_heads, "ffn_dim": c.mlp_width,
    "max_position_embeddings": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "activation_function": written_activation(c.activation),
    "scale_embedding": c.embedding_scale != 1.0,
  }


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("num_layers", c.num_layers, {
    "d_model": c.width, "vocab_size": c.vocab_size, "ffn_dim": c.mlp_width,
  }),


def _rules(c: TransformerConfig) -> list[Rule]:
  layer = "model.layers.{i}"
  return [
    same("model.embed_tokens.weight", "embedding"),
    *norm_rules(c, f"{layer}.self_attn_layer_norm", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.final_layer_norm", "layers/mlp_norm"),
    *attention_rules(
      c, *(f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
    ),
    *mlp_rules(c, f"{layer}.fc1", f"{layer}.fc2"),
    *norm_rules(c, "model.layer_norm", "final_norm"),
    *unembedding_rules(c),
  ]


FAMILY = Family(
  name="xglm", architecture="XGLMForCausalLM", prefix="model.", schema=published.XGLM,
  read_config=_read, write_config=_write, rules=_rules, sizes=_sizes,
  tied={"lm_head.weight": "model.embed_tokens.weight"},
  ignored=(r"embed_positions\.weights",),
)
