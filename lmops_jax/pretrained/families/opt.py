"""OPT (arXiv:2205.01068): learned positions that start at row 2, ReLU; the 350M one norms after."""

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  linear,
  mlp_rules,
  norm_rules,
  same,
  unembedding_rules,
)


def _read(r: ConfigReader) -> TransformerConfig:
  p = r.read(published.OPT)
  pre = p.do_layer_norm_before
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.num_hidden_layers, width=p.hidden_size,
    num_heads=p.num_attention_heads, mlp_width=p.ffn_dim, max_length=p.max_position_embeddings,
    tied_embeddings=p.tie_word_embeddings, norm="layer", norm_placement="pre" if pre else "post",
    final_norm=pre and not p.remove_final_layer_norm, positions="learned", position_offset=2,
    activation=r.activation("activation_function", p.activation_function), gated_mlp=False,
    qkv_bias=p.enable_bias, out_bias=p.enable_bias, mlp_bias=p.enable_bias,
    embedding_width=None if p.word_embed_proj_dim == p.hidden_size else p.word_embed_proj_dim,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "num_hidden_layers": c.num_layers, "hidden_size": c.width,
    "num_attention_heads": c.num_heads, "ffn_dim": c.mlp_width,
    "max_position_embeddings": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "do_layer_norm_before": c.norm_placement == "pre",
    "_remove_final_layer_norm": c.norm_placement == "pre" and not c.final_norm,
    "activation_function": written_activation(c.activation), "enable_bias": c.qkv_bias,
    "word_embed_proj_dim": c.token_width,
  }


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("num_hidden_layers", c.num_layers, {
    "hidden_size": c.width, "vocab_size": c.vocab_size, "ffn_dim": c.mlp_width,
    "max_position_embeddings": c.max_length, "word_embed_proj_dim": c.token_width,
  }),


def _rules(c: TransformerConfig) -> list[Rule]:
  body, layer = "model.decoder", "model.decoder.layers.{i}"
  attention = f"{layer}.self_attn"
  rules = [
    same(f"{body}.embed_tokens.weight", "embedding"),
    same(f"{body}.embed_positions.weight", "position_embedding"),
    *norm_rules(c, f"{layer}.self_attn_layer_norm", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.final_layer_norm", "layers/mlp_norm"),
    *attention_rules(
      c, *(f"{attention}.{part}_proj" for part in ("q", "k", "v", "out"))
    ),
    *mlp_rules(c, f"{layer}.fc1", f"{layer}.fc2"),
    *unembedding_rules(c),
  ]
  if c.final_norm:
    rules += norm_rules(c, f"{body}.final_layer_norm", "final_norm")
  if c.token_width != c.width:
    width, token = (c.width,), (c.token_width,)
    rules.append(linear(f"{body}.project_in.weight", "embedding_in/kernel", token, width))
    rules.append(linear(f"{body}.project_out.weight", "embedding_out/kernel", width, token))
  return rules


FAMILY = Family(
  name="opt", architecture="OPTForCausalLM", prefix="model.", schema=published.OPT,
  read_config=_read, write_config=_write, rules=_rules, sizes=_sizes,
  tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)
