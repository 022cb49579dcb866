"""GPT-2 (Radford et al. 2019): learned positions, layer norms in front, one fused projection."""

import numpy as np

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import Rule, conv1d, norm_rules, same, unembedding_rules


def _read(r: ConfigReader) -> TransformerConfig:
  p = r.read(published.GPT2)
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.n_layer, width=p.n_embd, num_heads=p.n_head,
    mlp_width=p.n_inner or 4 * p.n_embd, max_length=p.n_positions,
    tied_embeddings=p.tie_word_embeddings, norm_eps=p.layer_norm_epsilon, norm="layer",
    positions="learned", activation=r.activation("activation_function", p.activation_function),
    gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "n_layer": c.num_layers, "n_embd": c.width, "n_head": c.num_heads,
    "n_inner": c.mlp_width, "n_positions": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "layer_norm_epsilon": c.norm_eps, "activation_function": written_activation(c.activation),
  }


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("n_layer", c.num_layers, {
    "n_embd": c.width, "vocab_size": c.vocab_size, "n_inner": c.mlp_width,
    "n_positions": c.max_length,
  }),


def _fused(c: TransformerConfig, name: str) -> list[Rule]:
  d, h, e = c.width, c.num_heads, c.head_width
  paths = [f"layers/attention/{part}" for part in ("query", "key", "value")]

  def split(x):
    return [x[:, j * h * e : (j + 1) * h * e].reshape(d, h, e) for j in range(3)]

  return [
    Rule(
      f"{name}.weight", tuple(f"{path}/kernel" for path in paths), split,
      lambda y: np.concatenate([x.reshape(d, h * e) for x in y], axis=1), (d, 3 * h * e),
    ),
    Rule(
      f"{name}.bias", tuple(f"{path}/bias" for path in paths),
      lambda x: list(x.reshape(3, h, e)), lambda y: np.concatenate([x.reshape(-1) for x in y]),
      (3 * h * e,),
    ),
  ]


def _rules(c: TransformerConfig) -> list[Rule]:
  h, e, d, f = c.num_heads, c.head_width, c.width, c.mlp_width
  layer = "transformer.h.{i}"
  return [
    same("transformer.wte.weight", "embedding"),
    same("transformer.wpe.weight", "position_embedding"),
    *norm_rules(c, f"{layer}.ln_1", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.ln_2", "layers/mlp_norm"),
    *_fused(c, f"{layer}.attn.c_attn"),
    conv1d(f"{layer}.attn.c_proj.weight", "layers/attention/out/kernel", (h, e), (d,)),
    same(f"{layer}.attn.c_proj.bias", "layers/attention/out/bias"),
    conv1d(f"{layer}.mlp.c_fc.weight", "layers/mlp/up/kernel", (d,), (f,)),
    same(f"{layer}.mlp.c_fc.bias", "layers/mlp/up/bias"),
    conv1d(f"{layer}.mlp.c_proj.weight", "layers/mlp/down/kernel", (f,), (d,)),
    same(f"{layer}.mlp.c_proj.bias", "layers/mlp/down/bias"),
    *norm_rules(c, "transformer.ln_f", "final_norm"),
    *unembedding_rules(c),
  ]


FAMILY = Family(
  name="gpt2", architecture="GPT2LMHeadModel", prefix="transformer.", schema=published.GPT2,
  read_config=_read, write_config=_write, rules=_rules, sizes=_sizes,
  tied={"lm_head.weight": "transformer.wte.weight"},
  ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)
