"""CLIP (arXiv:2103.00020): names of both towers' tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.models.clip import Clip, ClipConfig
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import Rule, attention_rules, linear, mlp_rules, norm_rules, same

_FIRST_EOS = 2  # what the first checkpoints' config.json says, which is not their EOS


def _read(r: ConfigReader) -> ClipConfig:
  p = r.read(published.Clip)
  text = p.text_config_dict or p.text_config or published.ClipText()
  vision = p.vision_config_dict or p.vision_config or published.ClipVision()
  trunk = TransformerConfig(
    **_parts(r, vision), positions="none", causal=False, final_norm=False,
    max_length=(vision.image_size // vision.patch_size) ** 2 + 1,
  )
  return ClipConfig(
    text=TransformerConfig(
      **_parts(r, text), vocab_size=text.vocab_size, positions="learned",
      max_length=text.max_position_embeddings, tied_embeddings=True,
    ),
    vision=VisionConfig(trunk, vision.image_size, vision.patch_size),
    projection_width=p.projection_dim,
    eos_id=None if text.eos_token_id == _FIRST_EOS else text.eos_token_id,
  )


def _parts(r: ConfigReader, p: published.ClipText | published.ClipVision) -> dict[str, Any]:
  return dict(
    num_layers=p.num_hidden_layers, width=p.hidden_size, num_heads=p.num_attention_heads,
    mlp_width=p.intermediate_size, norm_eps=p.layer_norm_eps,
    activation=r.activation("hidden_act", p.hidden_act), norm="layer", gated_mlp=False,
    qkv_bias=True, out_bias=True, mlp_bias=True,
  )


def _sizes(c: ClipConfig) -> tuple[Sizes, ...]:
  def tower(name: str, part: str, t: TransformerConfig, **axes: int) -> Sizes:
    axes |= {"hidden_size": t.width, "intermediate_size": t.mlp_width}
    return Sizes(
      f"{name}.num_hidden_layers", t.num_layers,
      {f"{name}.{field}": size for field, size in axes.items()}, part,
    )

  text = tower(
    "text_config", "text/", c.text, vocab_size=c.text.vocab_size,
    max_position_embeddings=c.text.max_length,
  )
  vision = tower(
    "vision_config", "vision/", c.vision.trunk, patch_size=c.vision.patch_size,
    **{"(image_size / patch_size)^2": c.vision.num_patches},
  )
  return text._replace(axes={**text.axes, "projection_dim": c.projection_width}), vision


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
  images = jax.ShapeDtypeStruct((1, size, size, NUM_CHANNELS), jnp.float32)
  return jax.ShapeDtypeStruct((1, 1), jnp.int32), images


def _with_choices(c: ClipConfig, **choices) -> ClipConfig:
  trunk = dataclasses.replace(c.vision.trunk, **choices)
  text, vision = dataclasses.replace(c.text, **choices), dataclasses.replace(c.vision, trunk=trunk)
  return dataclasses.replace(c, text=text, vision=vision)


FAMILY = Family(
  name="clip", architecture="CLIPModel", prefix="", schema=published.Clip, read_config=_read,
  write_config=_write, rules=_rules, tied={}, sizes=_sizes,
  ignored=(r".*embeddings\.position_ids",), module=Clip, inputs=_inputs,
  with_choices=_with_choices,
)
