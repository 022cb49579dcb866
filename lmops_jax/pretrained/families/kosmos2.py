"""Kosmos-2 (arXiv:2306.14824): a decoder with sub-norms, CLIP's image tower, and a resampler.

Kosmos-1 has the same tensors with a smaller vocabulary and was never published. What no published
model has (xPos, another connector) stays in models that were written here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import ResamplerConfig
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.pretrained.families import clip, published
from lmops_jax.pretrained.families.explicit import explicit, explicit_vision
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  linear,
  mlp_rules,
  norm_rules,
  same,
  under,
  unembedding_rules,
)

_TEXT, _VISION, _CONNECTOR = "text_model", "vision_model.model", "image_to_text_projection"
_TOWER, _BLOCK = r"img_model\.visual\.", r"img_model\.visual\.transformer\.resblocks\.(\d+)\."
_LAYER = rf"{_VISION}.encoder.layers.\1."
_ORIGINALS = (  # names of fairseq's file, which the authors published first
  (r"gpt_model\.decoder\.output_projection\.", f"{_TEXT}.lm_head."),
  (r"gpt_model\.decoder\.", f"{_TEXT}.model."),
  (r"img_connector\.", f"{_CONNECTOR}."),
  (_TOWER + r"class_embedding$", f"{_VISION}.embeddings.class_embedding"),
  (_TOWER + r"positional_embedding$", f"{_VISION}.embeddings.position_embedding.weight"),
  (_TOWER + r"conv1\.", f"{_VISION}.embeddings.patch_embedding."),
  (_TOWER + r"ln_pre\.", f"{_VISION}.pre_layrnorm."),
  (_TOWER + r"ln_post\.", f"{_VISION}.post_layernorm."),
  (_BLOCK + r"ts_attn\.", _LAYER + "self_attn."),
  (_BLOCK + r"ln_([12])\.", _LAYER + r"layer_norm\2."),
  (_BLOCK + r"mlp\.c_fc\.", _LAYER + "mlp.fc1."),
  (_BLOCK + r"mlp\.c_proj\.", _LAYER + "mlp.fc2."),
)


def _read(r: ConfigReader) -> DockedConfig:
  p = r.read(published.Kosmos2)
  text, vision = p.text_config or published.Kosmos2Text(), p.vision_config
  return DockedConfig(
    text=TransformerConfig(
      vocab_size=text.vocab_size, num_layers=text.layers, width=text.embed_dim,
      num_heads=text.attention_heads, mlp_width=text.ffn_dim,
      max_length=text.max_position_embeddings, tied_embeddings=p.tie_word_embeddings,
      norm="layer", norm_eps=text.layer_norm_eps, sub_norm=True, positions="sinusoidal",
      position_offset=text.pad_token_id + 1, gated_mlp=False, qkv_bias=True, out_bias=True,
      mlp_bias=True, activation=r.activation("activation_function", text.activation_function),
      embedding_scale=math.sqrt(text.embed_dim) if text.scale_embedding else 1.0,
    ),
    vision=clip.read_vision(r, vision or published.Kosmos2Vision()),
    connector=ResamplerConfig(num_latents=p.latent_query_num),
  )


def _write(c: DockedConfig) -> dict[str, Any]:
  text = c.text
  return {
    "latent_query_num": c.vectors_per_image, "tie_word_embeddings": text.tied_embeddings,
    "text_config": {
      "vocab_size": text.vocab_size, "layers": text.num_layers, "embed_dim": text.width,
      "attention_heads": text.num_heads, "ffn_dim": text.mlp_width,
      "max_position_embeddings": text.max_length, "layer_norm_eps": text.norm_eps,
      "activation_function": written_activation(text.activation),
      "scale_embedding": text.embedding_scale != 1.0,
      "pad_token_id": max(text.position_offset - 1, 0),
    },
    "vision_config": clip.write_vision(c.vision),
  }


def _explicit(c: DockedConfig) -> DockedConfig:
  """See `Family.explicit`."""
  settings = dataclasses.asdict(c.connector)
  unsaid = {"unit_scale": False, "dropout": 0.0}
  if settings.get("num_heads") == c.text.num_heads:
    unsaid["num_heads"] = None
  connector = dataclasses.replace(
    c.connector, **{name: value for name, value in unsaid.items() if name in settings})
  return dataclasses.replace(
    c, text=explicit(c.text), vision=explicit_vision(c.vision), connector=connector)


def _sizes(c: DockedConfig) -> tuple[Sizes, ...]:
  text = Sizes(
    "text_config.layers", c.text.num_layers, {
      "text_config.embed_dim": c.text.width, "text_config.ffn_dim": c.text.mlp_width,
      "text_config.vocab_size": c.text.vocab_size, "latent_query_num": c.vectors_per_image,
    }, "text/")
  return text, clip.vision_sizes(c.vision)


def _rules(c: DockedConfig) -> list[Rule]:
  return [
    *under("text", _text_rules(c.text)),
    *under("vision", clip.vision_rules(c.vision, _VISION)),
    *under("connector", _connector_rules(c.text, c.vision.trunk.width)),
  ]


def _text_rules(c: TransformerConfig) -> list[Rule]:
  body, heads = f"{_TEXT}.model", (c.num_heads, c.head_width)
  layer = body + ".layers.{i}"
  inner = f"{layer}.self_attn.inner_attn_ln"
  return [
    same(f"{body}.embed_tokens.weight", "embedding"),
    *norm_rules(c, f"{layer}.self_attn_layer_norm", "layers/attention_norm"),
    *attention_rules(c, *(f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v", "out"))),
    same(f"{inner}.weight", "layers/attention/inner_norm/scale", heads),
    same(f"{inner}.bias", "layers/attention/inner_norm/bias", heads),
    *norm_rules(c, f"{layer}.final_layer_norm", "layers/mlp_norm"),
    *mlp_rules(c, f"{layer}.ffn.fc1", f"{layer}.ffn.fc2"),
    *norm_rules(c, f"{layer}.ffn.ffn_layernorm", "layers/mlp/inner_norm"),
    *norm_rules(c, f"{body}.layer_norm", "final_norm"),
    *unembedding_rules(c, f"{_TEXT}.lm_head"),
  ]


def _connector_rules(c: TransformerConfig, width: int) -> list[Rule]:
  into, heads = (c.width,), (c.num_heads, c.head_width)
  rules = [
    linear(f"{_CONNECTOR}.dense.weight", "dense/kernel", (width,), into),
    same(f"{_CONNECTOR}.dense.bias", "dense/bias"),
    same(f"{_CONNECTOR}.latent_query", "latents"),
    linear(f"{_CONNECTOR}.x_attn.out_proj.weight", "out/kernel", heads, into),
    same(f"{_CONNECTOR}.x_attn.out_proj.bias", "out/bias"),
  ]
  for ours in ("query", "key", "value"):
    theirs = f"{_CONNECTOR}.x_attn.{ours[0]}_proj"
    rules.append(linear(f"{theirs}.weight", f"{ours}/kernel", into, heads))
    rules.append(same(f"{theirs}.bias", f"{ours}/bias", heads))
  return rules


def _with_choices(c: DockedConfig, **choices) -> DockedConfig:
  trunk = dataclasses.replace(c.vision.trunk, **choices)
  vision = dataclasses.replace(c.vision, trunk=trunk)
  return dataclasses.replace(c, text=dataclasses.replace(c.text, **choices), vision=vision)


FAMILY = Family(
  name="kosmos-2", architecture="Kosmos2ForConditionalGeneration", prefix="",
  schema=published.Kosmos2, read_config=_read, write_config=_write, rules=_rules,
  tied={f"{_TEXT}.lm_head.weight": f"{_TEXT}.model.embed_tokens.weight"}, sizes=_sizes,
  ignored=(
    rf"{_TEXT}\.model\.embed_positions\.(weights|_float_tensor)", r".*embeddings\.position_ids",
    rf"{_TEXT}\.model\.self_attn_sope\.scale"),
  module=DockedLM, inputs=lambda config: (jax.ShapeDtypeStruct((1, 1), jnp.int32),),
  with_choices=_with_choices, config=DockedConfig, text=lambda config: config.text,
  decoder=lambda config: config.text, decoder_part="text",
  image_size=lambda config: config.vision.image_size, explicit=_explicit,
  originals=_ORIGINALS,
)
