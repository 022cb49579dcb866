"""llama.cpp's names for Llama-, Mistral- and Qwen2-type models, and its order of rotary pairs."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
from pydantic import Field

from lmops_jax.host.foreign_files import checked, shown
from lmops_jax.models.config import RopeScaling, TransformerConfig
from lmops_jax.pretrained.families.explicit import stretched_length
from lmops_jax.pretrained.families.family import Family, Sizes
from lmops_jax.pretrained.families.llama import LLAMA, QWEN2
from lmops_jax.pretrained.families.published import Count, Index, Length, Positive, Share
from lmops_jax.pretrained.rules import Rule

if TYPE_CHECKING:
  from lmops_jax.pretrained.sources import GGUFSource

_FAMILIES = {"llama": LLAMA, "qwen2": QWEN2}
_BODY = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
}
_EMBEDDING, _OUTPUT, _FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_LAYER = {
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def _key(default: Any, name: str) -> Any:
  return Field(default, validation_alias=name)


class Published(pydantic.BaseModel):
  """The keys of an architecture that say what its model is, without the architecture's name."""

  num_layers: Count = _key(..., "block_count")
  width: Count = _key(..., "embedding_length")
  mlp_width: Count = _key(..., "feed_forward_length")
  max_length: Length = _key(..., "context_length")
  num_heads: Count = _key(..., "attention.head_count")
  num_kv_heads: Count | None = _key(None, "attention.head_count_kv")
  key_length: Count | None = _key(None, "attention.key_length")
  value_length: Count | None = _key(None, "attention.value_length")
  rotary_dim: Count | None = _key(None, "rope.dimension_count")
  norm_eps: Positive = _key(..., "attention.layer_norm_rms_epsilon")
  rope_base: Positive = _key(1e4, "rope.freq_base")
  num_experts: Index = _key(0, "expert_count")
  causal: bool = _key(True, "attention.causal")
  stretch: str = _key("linear", "rope.scaling.type")
  factor: Share | None = _key(None, "rope.scaling.factor")
  old_factor: Share = _key(0.0, "rope.scale_linear")
  original_max_length: Length | None = _key(None, "rope.scaling.original_context_length")
  amplitude: Positive = _key(1.0, "rope.scaling.attn_factor")
  yarn_amplitude: Positive | None = _key(None, "rope.scaling.yarn_attn_factor")
  beta_fast: Positive = _key(32.0, "rope.scaling.yarn_beta_fast")
  beta_slow: Positive = _key(1.0, "rope.scaling.yarn_beta_slow")
  extrapolation: float = _key(1.0, "rope.scaling.yarn_ext_factor")
  log_multiplier: float = _key(0.0, "rope.scaling.yarn_log_multiplier")


def read_gguf(source: GGUFSource) -> tuple[Family, TransformerConfig]:
  """The family of a GGUF file, with its table in GGUF's names, and the configuration.

  Raises:
    ValueError: if the architecture has no table, or the keys make no model of it.
  """
  where, names = source.where, set(source.names())
  kind = source.metadata.get("general.architecture")
  if kind not in list(_FAMILIES):  # a damaged file may hold a list, which no dictionary takes
    raise ValueError(
      f"{where} has general.architecture={kind!r}; the GGUF architectures that lmops_jax reads are "
      f"{', '.join(_FAMILIES)}."
    )
  matrices = [name for name in (_EMBEDDING, _OUTPUT) if name in names]
  shape = source.shape(matrices[0]) if matrices else ()
  if len(shape) != 2:
    raise ValueError(f"{where} holds no matrix {_EMBEDDING}; it is no language model.")
  keys = {key.removeprefix(f"{kind}."): value for key, value in source.metadata.items()
          if key.startswith(f"{kind}.")}
  p = checked(Published, keys, where)
  if p.width != shape[1]:
    raise ValueError(
      f"{where}: embedding_length={p.width}, but its {matrices[0]} is {list(shape)}."
    )
  _check(p, where)
  base, width, heads = _FAMILIES[kind], p.width, p.num_heads
  scaling = _stretch(p, source, where)
  config = TransformerConfig(
    vocab_size=shape[0], num_layers=p.num_layers, width=width, num_heads=heads,
    num_kv_heads=p.num_kv_heads or heads,
    head_dim=None if p.key_length in (None, width // heads) else p.key_length,
    mlp_width=p.mlp_width, max_length=stretched_length(p.max_length, scaling),
    tied_embeddings=len(matrices) == 1,
    rope_base=float(p.rope_base), norm_eps=float(np.float32(p.norm_eps)), rope_scaling=scaling,
    qkv_bias="blk.0.attn_q.bias" in names, out_bias="blk.0.attn_output.bias" in names,
    mlp_bias="blk.0.ffn_up.bias" in names,
  )

  def rules(c: TransformerConfig) -> list[Rule]:
    return [_renamed(rule, c, turned=kind == "llama") for rule in base.rules(c)]

  family = dataclasses.replace(
    base, prefix="", rules=rules, sizes=_sizes, tied={_OUTPUT: _EMBEDDING},
    ignored=(re.escape(_FACTORS), r"blk\.\d+\.attn_rot_embd\.weight"),
  )
  return family, config


def _check(p: Published, where: str) -> None:
  """Refuses keys that contradict each other, and what is not modelled."""
  heads, width = p.num_heads, p.width
  if heads % (p.num_kv_heads or heads):
    raise ValueError(
      f"{where}: attention.head_count={heads} should be a multiple of attention.head_count_kv="
      f"{p.num_kv_heads}."
    )
  if p.key_length is None and width % heads:
    raise ValueError(
      f"{where}: embedding_length={width} should be a multiple of attention.head_count={heads}."
    )
  head_dim = p.key_length or width // heads
  for name, value, modelled in (
    ("attention.value_length", p.value_length, head_dim),
    ("rope.dimension_count", p.rotary_dim, head_dim), ("expert_count", p.num_experts, 0),
    ("attention.causal", p.causal, True),
    ("rope.scaling.yarn_ext_factor", p.extrapolation, 1.0),
    ("rope.scaling.yarn_log_multiplier", p.log_multiplier, 0.0),
  ):
    if value not in (None, modelled):
      raise ValueError(
        f"{where}: {name}={value} is not modelled by lmops_jax; it reads models with {name} "
        f"{modelled}."
      )


def _stretch(p: Published, source: GGUFSource, where: str) -> RopeScaling | None:
  """How llama.cpp stretches rotary frequencies: by the keys, and by the factors of a tensor."""
  factor = float((p.old_factor if p.factor is None else p.factor) or 1.0)
  amplitude = None if p.amplitude == 1 else p.amplitude
  if p.stretch not in ("none", "linear", "yarn"):
    raise ValueError(
      f"{where}: rope.scaling.type={shown(p.stretch)} is not modelled by lmops_jax; it reads none, "
      "linear and yarn."
    )
  if _FACTORS in source.names():
    factors = source.read(_FACTORS)
    pairs = (p.key_length or p.width // p.num_heads) // 2
    if p.stretch == "yarn":
      raise ValueError(
        f"{where} has both rope.scaling.type=yarn and a tensor {_FACTORS}, which lmops_jax does "
        "not model."
      )
    if factors.shape != (pairs,) or not np.all((factors > 0) & (factors < np.inf)):
      raise ValueError(
        f"{where} holds {_FACTORS} {list(factors.shape)}, which should be {pairs} positive numbers."
      )
    factors = np.float32(factors) * np.float32(1 if p.stretch == "none" else factor)
    return RopeScaling("factors", factors=factors.tolist(), attention_factor=amplitude)
  if p.stretch == "yarn":
    scaling = RopeScaling(
      "yarn", factor, original_max_length=p.original_max_length or p.max_length,
      beta_fast=p.beta_fast, beta_slow=p.beta_slow, attention_factor=p.yarn_amplitude,
    )
    return dataclasses.replace(scaling, attention_factor=p.amplitude * scaling.amplitude)
  if p.stretch == "none":
    factor = 1.0
  return None if factor == p.amplitude == 1 else RopeScaling(
    "linear", factor, attention_factor=amplitude
  )


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return Sizes("block_count", c.num_layers, {
    "embedding_length": c.width, "feed_forward_length": c.mlp_width,
    "attention.head_count * attention.key_length": c.num_heads * c.head_width,
  }),


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
