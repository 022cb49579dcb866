"""Llama, Mistral, Qwen2 (arXiv:2302.13971, 2310.06825, 2407.10671): one table, other switches."""

import functools
from typing import Any

from lmops_jax.models.config import RopeScaling, TransformerConfig
from lmops_jax.pretrained.families.family import ConfigReader, Family, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  mlp_rules,
  norm_rules,
  same,
  unembedding_rules,
)


def _rope(r: ConfigReader) -> tuple[float, RopeScaling | None]:
  """Base and stretch, from `rope_parameters` (new) or `rope_theta` with `rope_scaling` (old)."""
  new = r.get("rope_parameters", {})
  scaling = new or r.get("rope_scaling", {})
  base = float(new.get("rope_theta") or r.get("rope_theta", 1e4))
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return base, None
  if kind == "linear":
    return base, RopeScaling("linear", float(scaling["factor"]))
  if kind == "llama3":
    return base, RopeScaling(
      "llama3", float(scaling["factor"]), float(scaling["low_freq_factor"]),
      float(scaling["high_freq_factor"]), int(scaling["original_max_position_embeddings"]),
    )
  raise ValueError(
    f"{r.where} stretches rotary positions by {kind!r}; lmops_jax reads default, linear and llama3."
  )


def _read(r: ConfigReader, family: str) -> TransformerConfig:
  r.refuse("pretraining_tp", 1)
  base, scaling = _rope(r)
  width, heads = r.need("hidden_size"), r.need("num_attention_heads")
  head_dim = r.get("head_dim")
  window = None
  if family == "mistral":
    window = r.get("sliding_window")
  elif family == "qwen2" and r.get("use_sliding_window", False):
    r.refuse("max_window_layers", 0)
    window = r.get("sliding_window")
  bias = r.get("attention_bias", False)
  return TransformerConfig(
    vocab_size=r.need("vocab_size"), num_layers=r.need("num_hidden_layers"), width=width,
    num_heads=heads, num_kv_heads=r.get("num_key_value_heads", heads),
    head_dim=None if head_dim in (None, width // heads) else head_dim,
    mlp_width=r.need("intermediate_size"), max_length=r.get("max_position_embeddings", 2048),
    tied_embeddings=r.get("tie_word_embeddings", False), rope_base=base, rope_scaling=scaling,
    norm_eps=r.get("rms_norm_eps", 1e-6), activation=r.activation("hidden_act", "silu"),
    qkv_bias=True if family == "qwen2" else bias, out_bias=bias and family == "llama",
    mlp_bias=r.get("mlp_bias", False), sliding_window=window,
  )


def _write(c: TransformerConfig, family: str) -> dict[str, Any]:
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_base}
  if c.rope_scaling is not None:
    s = c.rope_scaling
    rope |= {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
      rope |= {
        "low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.original_max_length,
      }
  fields = {
    "vocab_size": c.vocab_size, "num_hidden_layers": c.num_layers, "hidden_size": c.width,
    "num_attention_heads": c.num_heads, "num_key_value_heads": c.key_heads,
    "head_dim": c.head_width, "intermediate_size": c.mlp_width,
    "max_position_embeddings": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "rms_norm_eps": c.norm_eps, "hidden_act": written_activation(c.activation),
    "rope_theta": c.rope_base, "rope_parameters": rope,
  }
  if family == "llama":
    fields |= {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
  if family == "mistral":
    fields["sliding_window"] = c.sliding_window
  if family == "qwen2":
    fields |= {
      "use_sliding_window": c.sliding_window is not None, "sliding_window": c.sliding_window,
      "max_window_layers": 0,
    }
  return fields


def _rules(c: TransformerConfig) -> list[Rule]:
  layer = "model.layers.{i}"
  return [
    same("model.embed_tokens.weight", "embedding"),
    *norm_rules(c, f"{layer}.input_layernorm", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.post_attention_layernorm", "layers/mlp_norm"),
    *attention_rules(c, *(f"{layer}.self_attn.{part}_proj" for part in "qkvo")),
    *mlp_rules(c, *(f"{layer}.mlp.{part}_proj" for part in ("up", "down", "gate"))),
    *norm_rules(c, "model.norm", "final_norm"),
    *unembedding_rules(c),
  ]


def _family(name: str, architecture: str) -> Family:
  return Family(
    name=name, architecture=architecture, prefix="model.",
    read_config=functools.partial(_read, family=name),
    write_config=functools.partial(_write, family=name), rules=_rules,
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
  )


LLAMA = _family("llama", "LlamaForCausalLM")
MISTRAL = _family("mistral", "MistralForCausalLM")
QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
