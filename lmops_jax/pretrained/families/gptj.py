"""GPT-J (Wang and Komatsuzaki 2021): attention beside the MLP; rotary in part, interleaved."""

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
  p = r.read(published.GPTJ)
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.n_layer, width=p.n_embd, num_heads=p.n_head,
    mlp_width=p.n_inner or 4 * p.n_embd, max_length=p.n_positions,
    tied_embeddings=p.tie_word_embeddings, norm_eps=p.layer_norm_epsilon, norm="layer",
    norm_placement="parallel", rotary_dim=p.rotary_dim, rotary_interleaved=True,
    activation=r.activation("activation_function", p.activation_function), gated_mlp=False,
    mlp_bias=True, unembedding_bias=True,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "n_layer": c.num_layers, "n_embd": c.width, "n_head": c.num_heads,
    "n_inner": c.mlp_width, "n_positions": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "layer_norm_epsilon": c.norm_eps, "rotary_dim": c.rotary_width,
    "activation_function": written_activation(c.activation),
  }


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("n_layer", c.num_layers, {
    "n_embd": c.width, "vocab_size": c.vocab_size, "n_inner": c.mlp_width,
  }),


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
  name="gptj", architecture="GPTJForCausalLM", prefix="transformer.", schema=published.GPTJ,
  read_config=_read, write_config=_write, rules=_rules, sizes=_sizes,
  tied={"lm_head.weight": "transformer.wte.weight"},
  ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)
