"""Stable Diffusion's UNet and autoencoder: names of their tensors in the files of diffusers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.diffusion import parts
from lmops_jax.models.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from lmops_jax.models.diffusion.unet import UNet, UNetConfig
from lmops_jax.pretrained.families import published_diffusion as published
from lmops_jax.pretrained.families.family import ConfigReader, Family
from lmops_jax.pretrained.rules import (
  Rule,
  attention_rules,
  convolution,
  linear,
  norm_rules,
  pointwise,
  same,
  under,
)


def _read_unet(r: ConfigReader) -> UNetConfig:
  p = r.read(published.UNet)
  return UNetConfig(
    in_channels=p.in_channels, out_channels=p.out_channels, sample_size=p.sample_size,
    widths=p.block_out_channels, with_attention=p.with_attention, num_heads=p.heads,
    num_residuals=p.layers_per_block, num_blocks=p.transformer_layers_per_block,
    context_width=p.cross_attention_dim, norm_groups=p.norm_num_groups,
    linear_projections=p.use_linear_projection,
  )


def _write_unet(c: UNetConfig) -> dict[str, Any]:
  heads = c.num_heads[0] if len(set(c.num_heads)) == 1 else list(c.num_heads)
  return {
    "in_channels": c.in_channels, "out_channels": c.out_channels, "sample_size": c.sample_size,
    "block_out_channels": list(c.widths), **published.block_types(c.with_attention),
    "mid_block_type": "UNetMidBlock2DCrossAttn", "attention_head_dim": heads,
    "layers_per_block": c.num_residuals, "transformer_layers_per_block": c.num_blocks,
    "cross_attention_dim": c.context_width, "norm_num_groups": c.norm_groups, "norm_eps": 1e-5,
    "use_linear_projection": c.linear_projections, "act_fn": "silu", "center_input_sample": False,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "upcast_attention": True,  # Stable Diffusion 2 overflows float16 without, and ours has it
  }


def _unet_rules(c: UNetConfig) -> list[Rule]:
  first, time, last = c.widths[0], c.time_width, len(c.widths) - 1

  def residual(theirs, ours, inputs, outputs):
    return _residual(theirs, ours, inputs, outputs, time)

  rules = [
    *_linear("time_embedding.linear_1", "time_in", first, time),
    *_linear("time_embedding.linear_2", "time_out", time, time),
    *_convolution("conv_in", "convolution_in", c.in_channels, first),
  ]
  width, passed = first, [first]
  for i, new in enumerate(c.widths):
    for j in range(c.num_residuals):
      rules += residual(f"down_blocks.{i}.resnets.{j}", f"down_{i}_residual_{j}", width, new)
      if c.with_attention[i]:
        rules += _transformer(
          c, f"down_blocks.{i}.attentions.{j}", f"down_{i}_transformer_{j}", new, c.num_heads[i])
      width = new
      passed.append(width)
    if i < last:
      rules += _convolution(f"down_blocks.{i}.downsamplers.0.conv", f"down_{i}_halving", new, new)
      passed.append(width)
  for j in range(2):
    rules += residual(f"mid_block.resnets.{j}", f"middle_residual_{j}", width, width)
  rules += _transformer(
    c, "mid_block.attentions.0", "middle_transformer", width, c.num_heads[-1])
  for i, level in enumerate(reversed(range(len(c.widths)))):
    new = c.widths[level]
    for j in range(c.num_residuals + 1):
      rules += residual(
        f"up_blocks.{i}.resnets.{j}", f"up_{i}_residual_{j}", width + passed.pop(), new)
      if c.with_attention[level]:
        rules += _transformer(
          c, f"up_blocks.{i}.attentions.{j}", f"up_{i}_transformer_{j}", new, c.num_heads[level])
      width = new
    if level:
      rules += _convolution(f"up_blocks.{i}.upsamplers.0.conv", f"up_{i}_doubling", new, new)
  return [
    *rules, *_norm("conv_norm_out", "norm_out"),
    *_convolution("conv_out", "convolution_out", first, c.out_channels),
  ]


def _transformer(c: UNetConfig, theirs: str, ours: str, width: int, heads: int) -> list[Rule]:
  trunk = parts.products(c, width, heads)
  key_widths = {"attention": width, "cross_attention": c.context_width}
  outer = _linear if c.linear_projections else _pointwise
  rules = [
    *_norm(f"{theirs}.norm", f"{ours}/norm"),
    *outer(f"{theirs}.proj_in", f"{ours}/inside", width, width),
    *outer(f"{theirs}.proj_out", f"{ours}/outside", width, width),
  ]
  for i in range(c.num_blocks):
    block, at = f"{theirs}.transformer_blocks.{i}", f"{ours}/block_{i}"
    for number, part in ((1, "attention"), (2, "cross_attention")):
      names = (f"{block}.attn{number}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0"))
      rules += attention_rules(trunk, *names, at=f"{at}/{part}", key_width=key_widths[part])
      rules += norm_rules(trunk, f"{block}.norm{number}", f"{at}/{part}_norm")
    rules += norm_rules(trunk, f"{block}.norm3", f"{at}/mlp_norm")
    rules += _gated(f"{block}.ff.net.0.proj", f"{at}/mlp", width, trunk.mlp_width)
    rules += _linear(f"{block}.ff.net.2", f"{at}/mlp/down", trunk.mlp_width, width)
  return rules


def _gated(theirs: str, ours: str, inputs: int, outputs: int) -> list[Rule]:
  """The product whose first half is multiplied with the activated second one."""
  paths = (f"{ours}/up", f"{ours}/gate")
  return [
    Rule(
      f"{theirs}.weight", tuple(f"{path}/kernel" for path in paths),
      lambda x: [half.T for half in np.split(x, 2)],
      lambda y: np.concatenate([half.T for half in y]), (2 * outputs, inputs)),
    Rule(
      f"{theirs}.bias", tuple(f"{path}/bias" for path in paths), lambda x: np.split(x, 2),
      np.concatenate, (2 * outputs,)),
  ]


def _residual(theirs: str, ours: str, inputs: int, outputs: int, time: int = 0) -> list[Rule]:
  rules = [
    *_norm(f"{theirs}.norm1", f"{ours}/norm_1"),
    *_convolution(f"{theirs}.conv1", f"{ours}/convolution_1", inputs, outputs),
    *_norm(f"{theirs}.norm2", f"{ours}/norm_2"),
    *_convolution(f"{theirs}.conv2", f"{ours}/convolution_2", outputs, outputs),
  ]
  if time:
    rules += _linear(f"{theirs}.time_emb_proj", f"{ours}/time", time, outputs)
  if inputs != outputs:
    rules += _pointwise(f"{theirs}.conv_shortcut", f"{ours}/shortcut", inputs, outputs)
  return rules


def _norm(theirs: str, ours: str) -> list[Rule]:
  return [same(f"{theirs}.weight", f"{ours}/scale"), same(f"{theirs}.bias", f"{ours}/bias")]


def _with_bias(weight: Rule) -> list[Rule]:
  theirs, ours = weight.theirs.removesuffix(".weight"), weight.ours[0].removesuffix("/kernel")
  return [weight, same(f"{theirs}.bias", f"{ours}/bias")]


def _linear(theirs: str, ours: str, inputs: int, outputs: int) -> list[Rule]:
  return _with_bias(linear(f"{theirs}.weight", f"{ours}/kernel", (inputs,), (outputs,)))


def _pointwise(theirs: str, ours: str, inputs: int, outputs: int) -> list[Rule]:
  return _with_bias(pointwise(f"{theirs}.weight", f"{ours}/kernel", inputs, outputs))


def _convolution(theirs: str, ours: str, inputs: int, outputs: int) -> list[Rule]:
  return _with_bias(
    convolution(f"{theirs}.weight", f"{ours}/kernel", inputs, outputs, parts.SIDE))


def _unet_inputs(c: UNetConfig) -> tuple:
  return (
    jax.ShapeDtypeStruct((1, 8, 8, c.in_channels), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    jax.ShapeDtypeStruct((1, 1, c.context_width), jnp.float32),
  )


def _read_autoencoder(r: ConfigReader) -> AutoencoderConfig:
  p = r.read(published.Autoencoder)
  return AutoencoderConfig(
    image_channels=p.in_channels, latent_channels=p.latent_channels, sample_size=p.sample_size,
    widths=p.block_out_channels, num_residuals=p.layers_per_block, norm_groups=p.norm_num_groups,
    scaling_factor=p.scaling_factor,
  )


def _write_autoencoder(c: AutoencoderConfig) -> dict[str, Any]:
  num = len(c.widths)
  return {
    "in_channels": c.image_channels, "out_channels": c.image_channels,
    "latent_channels": c.latent_channels, "sample_size": c.sample_size,
    "block_out_channels": list(c.widths), "down_block_types": ["DownEncoderBlock2D"] * num,
    "up_block_types": ["UpDecoderBlock2D"] * num, "layers_per_block": c.num_residuals,
    "norm_num_groups": c.norm_groups, "scaling_factor": c.scaling_factor, "act_fn": "silu",
  }


def _autoencoder_rules(c: AutoencoderConfig) -> list[Rule]:
  moments = 2 * c.latent_channels
  return [
    *under("encoder", _encoder_rules(c)),
    *_pointwise("quant_conv", "moments", moments, moments),
    *_pointwise("post_quant_conv", "latents", c.latent_channels, c.latent_channels),
    *under("decoder", _decoder_rules(c)),
  ]


def _encoder_rules(c: AutoencoderConfig) -> list[Rule]:
  rules = _convolution("encoder.conv_in", "convolution_in", c.image_channels, c.widths[0])
  width = c.widths[0]
  for i, new in enumerate(c.widths):
    block = f"encoder.down_blocks.{i}"
    for j in range(c.num_residuals):
      rules += _residual(f"{block}.resnets.{j}", f"down_{i}_residual_{j}", width, new)
      width = new
    if i < len(c.widths) - 1:
      rules += _convolution(f"{block}.downsamplers.0.conv", f"down_{i}_halving", new, new)
  return [
    *rules, *_middle(c, "encoder"), *_norm("encoder.conv_norm_out", "norm_out"),
    *_convolution("encoder.conv_out", "convolution_out", width, 2 * c.latent_channels),
  ]


def _decoder_rules(c: AutoencoderConfig) -> list[Rule]:
  width = c.widths[-1]
  rules = _convolution("decoder.conv_in", "convolution_in", c.latent_channels, width)
  for i, new in enumerate(reversed(c.widths)):
    block = f"decoder.up_blocks.{i}"
    for j in range(c.num_residuals + 1):
      rules += _residual(f"{block}.resnets.{j}", f"up_{i}_residual_{j}", width, new)
      width = new
    if i < len(c.widths) - 1:
      rules += _convolution(f"{block}.upsamplers.0.conv", f"up_{i}_doubling", new, new)
  return [
    *rules, *_middle(c, "decoder"), *_norm("decoder.conv_norm_out", "norm_out"),
    *_convolution("decoder.conv_out", "convolution_out", width, c.image_channels),
  ]


def _middle(c: AutoencoderConfig, part: str) -> list[Rule]:
  block, width = f"{part}.mid_block", c.widths[-1]
  attention, ours = f"{block}.attentions.0", "middle_attention"
  trunk = dataclasses.replace(parts.products(c, width), qkv_bias=True)
  names = (f"{attention}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0"))
  return [
    *_residual(f"{block}.resnets.0", "middle_residual_0", width, width),
    *_norm(f"{attention}.group_norm", f"{ours}/norm"),
    *attention_rules(trunk, *names, at=f"{ours}/attention"),
    *_residual(f"{block}.resnets.1", "middle_residual_1", width, width),
  ]


def _autoencoder_inputs(c: AutoencoderConfig) -> tuple:
  side = c.reduction
  return (jax.ShapeDtypeStruct((1, side, side, c.image_channels), jnp.float32),)


_NO_TEXT = dict(tied={}, sizes=lambda c: (), text=lambda c: None, decoder=lambda c: None)
_ATTENTION = r"((?:en|de)coder\.mid_block\.attentions\.0)\."

UNET = Family(
  name="unet", architecture="UNet2DConditionModel", prefix="", schema=published.UNet,
  read_config=_read_unet, write_config=_write_unet, rules=_unet_rules, module=UNet,
  inputs=_unet_inputs, config=UNetConfig, **_NO_TEXT,
)
AUTOENCODER = Family(
  name="vae", architecture="AutoencoderKL", prefix="", schema=published.Autoencoder,
  read_config=_read_autoencoder, write_config=_write_autoencoder, rules=_autoencoder_rules,
  module=Autoencoder, inputs=_autoencoder_inputs, config=AutoencoderConfig,
  originals=tuple(  # names of the first releases
    (rf"{_ATTENTION}{old}\.", rf"\1.{new}.") for old, new in (
      ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))),
  **_NO_TEXT,
)
