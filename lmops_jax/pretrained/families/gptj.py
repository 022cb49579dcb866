"""GPT-J (Wang and Komatsuzaki 2021): attention beside the MLP; rotary in part, interleaved."""

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families.family import ConfigReader, Family, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  mlp_rules,
  norm_rules,
  same,
  unembedding_rules,
)


def _read(r: ConfigReader) -> TransformerConfig:
  width = r.need("n_embd")
  tied = r.get("tie_word_embeddings", False)
  return TransformerConfig(
    vocab_size=r.need("vocab_size"), num_layers=r.need("n_layer"), width=width,
    num_heads=r.need("n_head"), mlp_width=r.get("n_inner", 4 * width),
    max_length=r.get("n_positions", 2048), tied_embeddings=tied,
    norm_eps=r.get("layer_norm_epsilon", 1e-5), norm="layer", norm_placement="parallel",
    rotary_dim=r.get("rotary_dim"), rotary_interleaved=True,
    activation=r.activation("activation_function", "gelu_new"), gated_mlp=False, mlp_bias=True,
    unembedding_bias=True,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "n_layer": c.num_layers, "n_embd": c.width, "n_head": c.num_heads,
    "n_inner": c.mlp_width, "n_positions": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "layer_norm_epsilon": c.norm_eps, "rotary_dim": c.rotary_dim,
    "activation_function": written_activation(c.activation),
  }


def _rules(c: TransformerConfig) -> list[Rule]:
  layer = "transformer.h.{i}"
  return [
    same("transformer.wte.weight", "embedding"),
    *norm_rules(c, f"{layer}.ln_1", "layers/attention_norm"),
    *attention_rules(c, *(f"{layer}.attn.{part}_proj" for part in ("q", "k", "v", "out"))),
    *mlp_rules(c, f"{layer}.mlp.fc_in", f"{layer}.mlp.fc_out"),
    *norm_rules(c, "transformer.ln_f", "final_norm"),
    *unembedding_rules(c),
  ]


FAMILY = Family(
  name="gptj", architecture="GPTJForCausalLM", prefix="transformer.", read_config=_read,
  write_config=_write, rules=_rules, ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)
