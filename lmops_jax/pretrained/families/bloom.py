"""BLOOM (arXiv:2211.05100): ALiBi, a norm after the embeddings, query, key, value fused by head."""

import numpy as np

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes
from lmops_jax.pretrained.rules import Rule, linear, mlp_rules, norm_rules, same, unembedding_rules


def _read(r: ConfigReader) -> TransformerConfig:
  p = r.read(published.Bloom)
  width = p.n_embed or p.hidden_size
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.n_layer, width=width, num_heads=p.n_head,
    mlp_width=4 * width, max_length=p.seq_length, tied_embeddings=p.tie_word_embeddings,
    norm_eps=p.layer_norm_epsilon, norm="layer", positions="alibi", activation="gelu_tanh",
    gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, embedding_norm=True,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "n_layer": c.num_layers, "hidden_size": c.width,
    "n_head": c.num_heads, "seq_length": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "layer_norm_epsilon": c.norm_eps,
  }


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("n_layer", c.num_layers, {"hidden_size": c.width, "vocab_size": c.vocab_size}),


def _fused(c: TransformerConfig, name: str) -> list[Rule]:
  d, h, e = c.width, c.num_heads, c.head_width
  paths = [f"layers/attention/{part}" for part in ("query", "key", "value")]

  def split(x):
    x = x.reshape(h, 3, e, d)
    return [x[:, j].transpose(2, 0, 1) for j in range(3)]

  def join(y):
    return np.stack([x.transpose(1, 2, 0) for x in y], axis=1).reshape(3 * h * e, d)

  return [
    Rule(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), split, join, (3 * h * e, d)),
    Rule(
      f"{name}.bias", tuple(f"{path}/bias" for path in paths),
      lambda x: [x.reshape(h, 3, e)[:, j] for j in range(3)],
      lambda y: np.stack(list(y), axis=1).reshape(-1), (3 * h * e,),
    ),
  ]


def _rules(c: TransformerConfig) -> list[Rule]:
  layer = "transformer.h.{i}"
  dense = f"{layer}.self_attention.dense"
  heads = (c.num_heads, c.head_width)
  return [
    same("transformer.word_embeddings.weight", "embedding"),
    *norm_rules(c, "transformer.word_embeddings_layernorm", "embedding_norm"),
    *norm_rules(c, f"{layer}.input_layernorm", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.post_attention_layernorm", "layers/mlp_norm"),
    *_fused(c, f"{layer}.self_attention.query_key_value"),
    linear(f"{dense}.weight", "layers/attention/out/kernel", heads, (c.width,)),
    same(f"{dense}.bias", "layers/attention/out/bias"),
    *mlp_rules(c, f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"),
    *norm_rules(c, "transformer.ln_f", "final_norm"),
    *unembedding_rules(c),
  ]


FAMILY = Family(
  name="bloom", architecture="BloomForCausalLM", prefix="transformer.", schema=published.Bloom,
  read_config=_read, write_config=_write, rules=_rules, sizes=_sizes,
  tied={"lm_head.weight": "transformer.word_embeddings.weight"},
)
