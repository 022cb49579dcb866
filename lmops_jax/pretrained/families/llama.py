"""Llama, Mistral, Qwen2 (arXiv:2302.13971, 2310.06825, 2407.10671): one table, other switches."""

import functools
import math
from typing import Any

from lmops_jax.host.foreign_files import shown
from lmops_jax.models.config import RopeScaling, TransformerConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.explicit import stretched_length
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  mlp_rules,
  norm_rules,
  same,
  unembedding_rules,
)


def _read(r: ConfigReader, schema: type[published.Llama], family: str) -> TransformerConfig:
  p = r.read(schema)
  scaling = _stretch(r, p)
  width, heads = p.hidden_size, p.num_attention_heads
  max_length = stretched_length(p.max_position_embeddings, scaling)
  bias = family == "llama" and p.attention_bias
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.num_hidden_layers, width=width, num_heads=heads,
    num_kv_heads=p.num_key_value_heads or heads,
    head_dim=None if p.head_dim in (None, width // heads) else p.head_dim,
    mlp_width=p.intermediate_size, max_length=max_length, tied_embeddings=p.tie_word_embeddings,
    rope_base=float(_given_stretch(r, p)[1].rope_theta or p.rope_theta), rope_scaling=scaling,
    norm_eps=p.rms_norm_eps, activation=r.activation("hidden_act", p.hidden_act),
    qkv_bias=bias or family == "qwen2", out_bias=bias,
    mlp_bias=family == "llama" and p.mlp_bias,
    sliding_window=None if family == "llama" else _window(r, p, max_length),
  )


def _given_stretch(r: ConfigReader, p: published.Llama) -> tuple[str, published.Stretch]:
  """The field that counts, and what it says: the old `rope_scaling` if both are there."""
  if r.fields.get("rope_scaling"):
    return "rope_scaling", p.rope_scaling
  return "rope_parameters", p.rope_parameters or published.Stretch()


def _stretch(r: ConfigReader, p: published.Llama) -> RopeScaling | None:
  """How rotary frequencies are stretched, as transformers computes it from the same fields."""
  field, s = _given_stretch(r, p)
  kind, longest = s.rope_type, p.max_position_embeddings
  first = p.original_max_position_embeddings or s.original_max_position_embeddings or longest

  def need(name: str):
    if getattr(s, name) is None:
      raise ValueError(
        f"{r.where} stretches rotary positions by {kind!r} without {name}; give it in {field}."
      )
    return getattr(s, name)

  if kind == "default":
    return None
  if kind == "linear":
    return RopeScaling("linear", float(need("factor")))
  if kind == "dynamic":
    return RopeScaling("dynamic", float(need("factor")), original_max_length=longest)
  if kind == "llama3":
    return RopeScaling(
      "llama3", float(need("factor")), float(need("low_freq_factor")),
      float(need("high_freq_factor")), first,
    )
  if kind == "yarn":
    is_null = "factor" in s.model_fields_set and s.factor is None
    factor = float(longest / first if is_null else need("factor"))
    amplitude = s.attention_factor
    if amplitude is None and s.mscale and s.mscale_all_dim:
      amplitude = _mscale(factor, s.mscale) / _mscale(factor, s.mscale_all_dim)
    return RopeScaling(
      "yarn", factor, original_max_length=first, beta_fast=float(s.beta_fast or 32),
      beta_slow=float(s.beta_slow or 1), truncate=bool(s.truncate), attention_factor=amplitude,
    )
  if kind == "longrope":
    short, long = need("short_factor"), need("long_factor")
    if short == long or longest <= first:  # else which of them holds would depend on the length
      factor = s.factor or longest / first
      amplitude = s.attention_factor
      if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 < first else 1.0
      return RopeScaling("factors", factors=short, attention_factor=amplitude)
    kind = "longrope with other factors for long texts than for short ones"
  raise ValueError(
    f"{r.where} stretches rotary positions by {kind!r}; lmops_jax reads default, linear, dynamic, "
    "llama3, yarn, and longrope with the same factors for all lengths."
  )


def _mscale(factor: float, share: float) -> float:
  return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0


def _window(r: ConfigReader, p: published.Mistral | published.Qwen2, length: int) -> int | None:
  """The window of all layers, None if no layer has one."""
  total, window, reason = p.num_hidden_layers, p.sliding_window, "layer_types"
  if isinstance(p, published.Qwen2) and not p.use_sliding_window:
    window = None
  if p.layer_types is not None:
    kinds = ["full_attention" if kind == "attention" else kind for kind in p.layer_types]
    sliding = kinds.count("sliding_attention")
    if len(kinds) != total or sliding + kinds.count("full_attention") != total:
      raise r.error(
        f"layer_types={shown(kinds)}, which should be full_attention or sliding_attention for each "
        f"of {total} layers."
      )
    if sliding and window is None:
      raise r.error("layer_types with sliding_attention and no sliding_window; give its length.")
  elif isinstance(p, published.Qwen2):
    reason = f"max_window_layers={p.max_window_layers}"
    sliding = max(total - p.max_window_layers, 0)
  else:
    sliding = total
  if window is None or sliding == 0:
    return None
  if sliding == total:
    return window
  if window >= length:
    return None
  raise r.error(
    f"a window of {window} positions in {sliding} of {total} layers ({reason}), which lmops_jax "
    "does not model; it reads models with the window in every layer or in none."
  )


def _write(c: TransformerConfig, family: str) -> dict[str, Any]:
  fields = {
    "vocab_size": c.vocab_size, "num_hidden_layers": c.num_layers, "hidden_size": c.width,
    "num_attention_heads": c.num_heads, "num_key_value_heads": c.key_heads,
    "head_dim": c.head_width, "intermediate_size": c.mlp_width,
    "max_position_embeddings": c.max_length, "tie_word_embeddings": c.tied_embeddings,
    "rms_norm_eps": c.norm_eps, "hidden_act": written_activation(c.activation),
    "rope_theta": c.rope_base, "rope_parameters": _written_stretch(c),
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


def _written_stretch(c: TransformerConfig) -> dict[str, Any]:
  """`rope_parameters`; "factors" become a longrope that has the same ones for every length."""
  s, rope = c.rope_scaling, {"rope_type": "default", "rope_theta": c.rope_base}
  if s is None:
    return rope
  rope |= {"rope_type": s.kind, "factor": s.factor}
  if s.kind in ("llama3", "yarn"):
    rope["original_max_position_embeddings"] = s.original_max_length
  if s.kind == "llama3":
    rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
  if s.kind == "yarn":
    rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
  if s.kind == "factors":
    factors = list(s.factors)
    rope |= {
      "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
      "original_max_position_embeddings": c.max_length,
    }
  if s.kind in ("yarn", "factors"):
    rope["attention_factor"] = float(s.amplitude)
  return rope


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("num_hidden_layers", c.num_layers, {
    "hidden_size": c.width, "vocab_size": c.vocab_size, "intermediate_size": c.mlp_width,
    "num_attention_heads * head_dim": c.num_heads * c.head_width,
  }),


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


def _family(name: str, architecture: str, schema: type[published.AnyModel]) -> Family:
  return Family(
    name=name, architecture=architecture, prefix="model.", schema=schema,
    read_config=functools.partial(_read, schema=schema, family=name),
    write_config=functools.partial(_write, family=name), rules=_rules, sizes=_sizes,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
  )


LLAMA = _family("llama", "LlamaForCausalLM", published.Llama)
MISTRAL = _family("mistral", "MistralForCausalLM", published.Mistral)
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", published.Qwen2)
