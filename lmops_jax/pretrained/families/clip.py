"""CLIP (arXiv:2103.00020): names of both towers' tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lmops_jax.models.clip import Clip, ClipConfig
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig
from lmops_jax.pretrained.families.family import ConfigReader, Family, written_activation
from lmops_jax.pretrained.rules import Rule, attention_rules, linear, mlp_rules, norm_rules, same

_FIRST_EOS = 2  # what the first checkpoints' config.json says, which is not their EOS
_COMMON = dict(norm="layer", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True)
_DEFAULTS = {  # of transformers, which writes only what differs from them in old files
  "text": dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
    vocab_size=49408, max_position_embeddings=77,
  ),
  "vision": dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    image_size=224, patch_size=32,
  ),
}


def _read(r: ConfigReader) -> ClipConfig:
  readers = {}
  for tower, defaults in _DEFAULTS.items():
    given = r.get(f"{tower}_config") or r.get(f"{tower}_config_dict") or {}
    readers[tower] = ConfigReader({**defaults, **given}, f"{r.where} ({tower}_config)")
  text, vision = readers["text"], readers["vision"]
  vision.refuse("num_channels", NUM_CHANNELS)
  image_size, patch_size = vision.need("image_size"), vision.need("patch_size")
  trunk = TransformerConfig(
    **_sizes(vision), **_COMMON, positions="none", causal=False, final_norm=False,
    max_length=(image_size // patch_size) ** 2 + 1,
  )
  eos_id = text.get("eos_token_id", _FIRST_EOS)
  return ClipConfig(
    text=TransformerConfig(
      **_sizes(text), **_COMMON, vocab_size=text.need("vocab_size"), positions="learned",
      max_length=text.need("max_position_embeddings"), tied_embeddings=True,
    ),
    vision=VisionConfig(trunk, image_size, patch_size),
    projection_width=r.get("projection_dim", 512),
    eos_id=None if eos_id == _FIRST_EOS else eos_id,
  )


def _sizes(r: ConfigReader) -> dict[str, Any]:
  return dict(
    num_layers=r.need("num_hidden_layers"), width=r.need("hidden_size"),
    num_heads=r.need("num_attention_heads"), mlp_width=r.need("intermediate_size"),
    norm_eps=r.get("layer_norm_eps", 1e-5),
    activation=r.activation("hidden_act", "quick_gelu"),
  )


def _write(c: ClipConfig) -> dict[str, Any]:
  def tower(t: TransformerConfig, **more):
    return {
      "hidden_size": t.width, "intermediate_size": t.mlp_width, "num_hidden_layers": t.num_layers,
      "num_attention_heads": t.num_heads, "layer_norm_eps": t.norm_eps,
      "hidden_act": written_activation(t.activation), "projection_dim": c.projection_width, **more,
    }

  return {
    "projection_dim": c.projection_width,
    "text_config": tower(
      c.text, vocab_size=c.text.vocab_size, max_position_embeddings=c.text.max_length,
      eos_token_id=_FIRST_EOS if c.eos_id is None else c.eos_id,
    ),
    "vision_config": tower(
      c.vision.trunk, image_size=c.vision.image_size, patch_size=c.vision.patch_size
    ),
  }


def _rules(c: ClipConfig) -> list[Rule]:
  p, trunk = c.vision.patch_size, c.vision.trunk
  text, vision, width = "text_model", "vision_model", (c.projection_width,)
  patch = Rule(
    f"{vision}.embeddings.patch_embedding.weight", ("vision/patch_embedding",),
    lambda x: [x.transpose(2, 3, 1, 0)], lambda y: y[0].transpose(3, 2, 0, 1),
    (trunk.width, NUM_CHANNELS, p, p),
  )
  return [
    same("logit_scale", "logit_scale"),
    linear("text_projection.weight", "text_projection/kernel", (c.text.width,), width),
    linear("visual_projection.weight", "visual_projection/kernel", (trunk.width,), width),
    same(f"{text}.embeddings.token_embedding.weight", "text/embedding"),
    same(f"{text}.embeddings.position_embedding.weight", "text/position_embedding"),
    *_tower(c.text, text, "text"),
    *norm_rules(c.text, f"{text}.final_layer_norm", "text/final_norm"),
    same(f"{vision}.embeddings.class_embedding", "vision/class_embedding"),
    same(f"{vision}.embeddings.position_embedding.weight", "vision/position_embedding"),
    patch,
    *norm_rules(trunk, f"{vision}.pre_layrnorm", "vision/pre_norm"),
    *_tower(trunk, vision, "vision/trunk"),
    *norm_rules(trunk, f"{vision}.post_layernorm", "vision/post_norm"),
  ]


def _tower(c: TransformerConfig, theirs: str, ours: str) -> list[Rule]:
  layer = theirs + ".encoder.layers.{i}"
  rules = [
    *norm_rules(c, f"{layer}.layer_norm1", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.layer_norm2", "layers/mlp_norm"),
    *attention_rules(c, *(f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v", "out"))),
    *mlp_rules(c, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
  ]
  return [rule._replace(ours=tuple(f"{ours}/{path}" for path in rule.ours)) for rule in rules]


def _inputs(c: ClipConfig) -> tuple:
  size = c.vision.image_size
  return jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, NUM_CHANNELS))


def _with_choices(c: ClipConfig, **choices) -> ClipConfig:
  trunk = dataclasses.replace(c.vision.trunk, **choices)
  text, vision = dataclasses.replace(c.text, **choices), dataclasses.replace(c.vision, trunk=trunk)
  return dataclasses.replace(c, text=text, vision=vision)


FAMILY = Family(
  name="clip", architecture="CLIPModel", prefix="", read_config=_read, write_config=_write,
  rules=_rules, tied=(), ignored=(r".*embeddings\.position_ids",), module=Clip, inputs=_inputs,
  with_choices=_with_choices,
)
