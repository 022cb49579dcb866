"""CLIP (arXiv:2103.00020): names of both towers' tensors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmops_jax.models.clip import Clip, ClipConfig
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.explicit import explicit, explicit_vision
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  convolution,
  linear,
  mlp_rules,
  norm_rules,
  same,
  under,
)

_FIRST_EOS = 2  # what the first checkpoints' config.json says, which is not their EOS


def _read(r: ConfigReader) -> ClipConfig:
  p = r.read(published.Clip)
  text = p.text_config_dict or p.text_config or published.ClipText()
  vision = p.vision_config_dict or p.vision_config or published.ClipVision()
  return ClipConfig(
    text=_read_text(r, text),
    vision=read_vision(r, vision),
    projection_width=p.projection_dim,
    eos_id=None if text.eos_token_id == _FIRST_EOS else text.eos_token_id,
  )


def _read_text(r: ConfigReader, p: published.ClipText) -> TransformerConfig:
  return TransformerConfig(
    **_parts(r, p), vocab_size=p.vocab_size, positions="learned",
    max_length=p.max_position_embeddings, tied_embeddings=True,
  )


def read_vision(r: ConfigReader, p: published.ClipVision) -> VisionConfig:
  """The image tower of a `vision_config`."""
  trunk = TransformerConfig(
    **_parts(r, p), positions="none", causal=False, final_norm=False,
    max_length=(p.image_size // p.patch_size) ** 2 + 1,
  )
  return VisionConfig(trunk, p.image_size, p.patch_size)


def _parts(r: ConfigReader, p: published.ClipText | published.ClipVision) -> dict[str, Any]:
  return dict(
    num_layers=p.num_hidden_layers, width=p.hidden_size, num_heads=p.num_attention_heads,
    mlp_width=p.intermediate_size, norm_eps=p.layer_norm_eps,
    activation=r.activation("hidden_act", p.hidden_act), norm="layer", gated_mlp=False,
    qkv_bias=True, out_bias=True, mlp_bias=True,
  )


def _sizes(c: ClipConfig) -> tuple[Sizes, ...]:
  text = _text_sizes(c.text, "text_config.", "text/")
  text.axes["projection_dim"] = c.projection_width
  return text, vision_sizes(c.vision)


def _text_sizes(c: TransformerConfig, name: str = "", part: str = "") -> Sizes:
  return _tower_sizes(
    name, part, c, vocab_size=c.vocab_size, max_position_embeddings=c.max_length)


def vision_sizes(c: VisionConfig) -> Sizes:
  """What a `vision_config` declares."""
  return _tower_sizes(
    "vision_config.", "vision/", c.trunk, patch_size=c.patch_size,
    **{"(image_size / patch_size)^2": c.num_patches},
  )


def _tower_sizes(name: str, part: str, t: TransformerConfig, **axes: int) -> Sizes:
  axes |= {"hidden_size": t.width, "intermediate_size": t.mlp_width}
  return Sizes(
    f"{name}num_hidden_layers", t.num_layers,
    {f"{name}{field}": size for field, size in axes.items()}, part,
  )


def _write(c: ClipConfig) -> dict[str, Any]:
  width = {"projection_dim": c.projection_width}
  return {
    **width,
    "text_config": _write_text(c.text) | width | {
      "eos_token_id": _FIRST_EOS if c.eos_id is None else c.eos_id,
    },
    "vision_config": write_vision(c.vision) | width,
  }


def _write_text(c: TransformerConfig) -> dict[str, Any]:
  return _written(c) | {"vocab_size": c.vocab_size, "max_position_embeddings": c.max_length}


def write_vision(c: VisionConfig) -> dict[str, Any]:
  """The `vision_config` of an image tower."""
  return _written(c.trunk) | {"image_size": c.image_size, "patch_size": c.patch_size}


def _written(t: TransformerConfig) -> dict[str, Any]:
  return {
    "hidden_size": t.width, "intermediate_size": t.mlp_width, "num_hidden_layers": t.num_layers,
    "num_attention_heads": t.num_heads, "layer_norm_eps": t.norm_eps,
    "hidden_act": written_activation(t.activation),
  }


def _rules(c: ClipConfig) -> list[Rule]:
  width = (c.projection_width,)
  return [
    same("logit_scale", "logit_scale"),
    linear("text_projection.weight", "text_projection/kernel", (c.text.width,), width),
    linear(
      "visual_projection.weight", "visual_projection/kernel", (c.vision.trunk.width,), width),
    *under("text", _text_rules(c.text)),
    *under("vision", vision_rules(c.vision, "vision_model")),
  ]


def _text_rules(c: TransformerConfig) -> list[Rule]:
  text = "text_model"
  return [
    same(f"{text}.embeddings.token_embedding.weight", "embedding"),
    same(f"{text}.embeddings.position_embedding.weight", "position_embedding"),
    *_tower(c, text),
    *norm_rules(c, f"{text}.final_layer_norm", "final_norm"),
  ]


def vision_rules(c: VisionConfig, theirs: str) -> list[Rule]:
  """The tensors of an image tower whose names begin with `theirs`."""
  trunk, p = c.trunk, c.patch_size
  below = trunk.num_layers - c.top_layers
  patch = convolution(
    f"{theirs}.embeddings.patch_embedding.weight", "patch_embedding", NUM_CHANNELS, trunk.width, p)
  layers = _tower(trunk, theirs)
  top = [rule._replace(first=below) for rule in layers] if c.top_layers else []
  return [
    same(f"{theirs}.embeddings.class_embedding", "class_embedding"),
    same(f"{theirs}.embeddings.position_embedding.weight", "position_embedding"),
    patch,
    *norm_rules(trunk, f"{theirs}.pre_layrnorm", "pre_norm"),
    *under("trunk", layers),
    *under("top", top),
    *norm_rules(trunk, f"{theirs}.post_layernorm", "post_norm"),
  ]


def _tower(c: TransformerConfig, theirs: str) -> list[Rule]:
  layer = theirs + ".encoder.layers.{i}"
  return [
    *norm_rules(c, f"{layer}.layer_norm1", "layers/attention_norm"),
    *norm_rules(c, f"{layer}.layer_norm2", "layers/mlp_norm"),
    *attention_rules(c, *(f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v", "out"))),
    *mlp_rules(c, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
  ]


def _inputs(c: ClipConfig) -> tuple:
  size = c.vision.image_size
  images = jax.ShapeDtypeStruct((1, size, size, NUM_CHANNELS), jnp.float32)
  return jax.ShapeDtypeStruct((1, 1), jnp.int32), images


def _with_choices(c: ClipConfig, **choices) -> ClipConfig:
  trunk = dataclasses.replace(c.vision.trunk, **choices)
  text, vision = dataclasses.replace(c.text, **choices), dataclasses.replace(c.vision, trunk=trunk)
  return dataclasses.replace(c, text=text, vision=vision)


def _explicit(c: ClipConfig) -> ClipConfig:
  """See `Family.explicit`."""
  return dataclasses.replace(c, text=explicit(c.text), vision=explicit_vision(c.vision))


_IGNORED = (r".*embeddings\.position_ids",)

FAMILY = Family(
  name="clip", architecture="CLIPModel", prefix="", schema=published.Clip, read_config=_read,
  write_config=_write, rules=_rules, tied={}, sizes=_sizes,
  ignored=_IGNORED, module=Clip, inputs=_inputs,
  with_choices=_with_choices, config=ClipConfig, text=lambda config: config.text,
  decoder=lambda config: None, explicit=_explicit,
)

# The text tower alone, without projection: what guides Stable Diffusion.
TEXT = Family(
  name="clip_text_model", architecture="CLIPTextModel", prefix="text_model.",
  schema=published.ClipText,
  read_config=lambda r: _read_text(r, r.read(published.ClipText)), write_config=_write_text,
  rules=_text_rules, tied={}, sizes=lambda c: (_text_sizes(c),), ignored=_IGNORED,
  module=functools.partial(Transformer, with_unembedding=False), decoder=lambda config: None,
)
