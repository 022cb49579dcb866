"""What the configuration files of diffusers may hold: those of the parts of Stable Diffusion.

Absent fields have the defaults of the classes of diffusers. See `published` for the manner.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from lmops_jax.host.foreign_files import shown
from lmops_jax.pretrained.families.published import Count, Length, Published, only

_MOST_LEVELS, _MOST_LAYERS = 16, 64  # of any sane model; every one of them is traced
Layers = Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
Widths = Annotated[list[Count], Field(min_length=1, max_length=_MOST_LEVELS)]
ClassName = Annotated[list[str], Field(min_length=2, max_length=2)]  # library and name
TEXT, PLAIN = "CrossAttn", ""
_DOWN = {TEXT: "CrossAttnDownBlock2D", PLAIN: "DownBlock2D"}
_UP = {TEXT: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}


def _levels(part: Published, **wanted: tuple[str, Any]) -> None:
  """Raises ValueError unless each field has one value for each width, and those that are wanted."""
  for field, (why, values) in wanted.items():
    found = getattr(part, field)
    if found != values:
      raise ValueError(f"{field}={shown(found)} should be {shown(values)}, {why}.")


class UNet(Published):
  """`unet/config.json`."""

  sample_size: Length = 64
  in_channels: Count = 4
  out_channels: Count = 4
  center_input_sample: only(bool, False) = False
  flip_sin_to_cos: only(bool, True) = True
  freq_shift: only(float, 0) = 0
  down_block_types: list[Literal[tuple(_DOWN.values())]] = [_DOWN[TEXT]] * 3 + [_DOWN[PLAIN]]
  mid_block_type: only(str | None, "UNetMidBlock2DCrossAttn") = "UNetMidBlock2DCrossAttn"
  up_block_types: list[Literal[tuple(_UP.values())]] = [_UP[PLAIN]] + [_UP[TEXT]] * 3
  only_cross_attention: only(Any, False) = False
  block_out_channels: Widths = [320, 640, 1280, 1280]
  layers_per_block: Layers = 2
  downsample_padding: only(int, 1) = 1
  mid_block_scale_factor: only(float, 1) = 1
  act_fn: only(str, "silu", "swish") = "silu"
  norm_num_groups: Count = 32
  norm_eps: only(float, 1e-5) = 1e-5
  cross_attention_dim: Count = 1280
  transformer_layers_per_block: Layers = 1
  reverse_transformer_layers_per_block: only(Any, None) = None
  encoder_hid_dim: only(int | None, None) = None
  encoder_hid_dim_type: only(str | None, None) = None
  attention_head_dim: Count | Widths = 8  # which are numbers of heads, whatever they are called
  num_attention_heads: only(Any, None) = None
  dual_cross_attention: only(bool, False) = False
  use_linear_projection: bool = False
  class_embed_type: only(str | None, None) = None
  addition_embed_type: only(str | None, None) = None
  num_class_embeds: only(int | None, None) = None
  upcast_attention: bool = False  # scores are float32 here in any case
  resnet_time_scale_shift: only(str, "default") = "default"
  resnet_skip_time_act: only(bool, False) = False
  resnet_out_scale_factor: only(float, 1) = 1
  time_embedding_type: only(str, "positional") = "positional"
  time_embedding_dim: only(int | None, None) = None
  time_embedding_act_fn: only(str | None, None) = None
  timestep_post_act: only(str | None, None) = None
  time_cond_proj_dim: only(int | None, None) = None
  conv_in_kernel: only(int, 3) = 3
  conv_out_kernel: only(int, 3) = 3
  projection_class_embeddings_input_dim: only(int | None, None) = None
  attention_type: only(str, "default") = "default"
  mid_block_only_cross_attention: only(bool | None, None, False) = None
  cross_attention_norm: only(str | None, None) = None

  @pydantic.model_validator(mode="after")
  def _fits(self):
    num = len(self.block_out_channels)
    if len(self.down_block_types) != num:
      raise ValueError(
        f"down_block_types={shown(self.down_block_types)} should be one for each of the {num} "
        "block_out_channels."
      )
    mirrored = [_UP[TEXT if has_text else PLAIN] for has_text in reversed(self.with_attention)]
    _levels(self, up_block_types=("the down_block_types from the last to the first", mirrored))
    if len(self.heads) != num:
      raise ValueError(
        f"attention_head_dim={shown(self.attention_head_dim)} should be a number or one for each "
        f"of the {num} block_out_channels."
      )
    return self

  @property
  def with_attention(self) -> tuple[bool, ...]:
    """For each level, whether it has transformers."""
    return tuple(kind == _DOWN[TEXT] for kind in self.down_block_types)

  @property
  def heads(self) -> tuple[int, ...]:
    """For each level, heads of its transformers."""
    heads = self.attention_head_dim
    return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else tuple(heads)


def block_types(with_attention: tuple[bool, ...]) -> dict[str, list[str]]:
  """The fields that say which levels have transformers."""
  kinds = [TEXT if has_text else PLAIN for has_text in with_attention]
  return {
    "down_block_types": [_DOWN[kind] for kind in kinds],
    "up_block_types": [_UP[kind] for kind in reversed(kinds)],
  }


class Autoencoder(Published):
  """`vae/config.json`."""

  in_channels: Count = 3
  out_channels: Count = 3
  down_block_types: list[Literal["DownEncoderBlock2D"]] = ["DownEncoderBlock2D"]
  up_block_types: list[Literal["UpDecoderBlock2D"]] = ["UpDecoderBlock2D"]
  block_out_channels: Widths = [64]
  layers_per_block: Layers = 1
  act_fn: only(str, "silu", "swish") = "silu"
  latent_channels: Count = 4
  norm_num_groups: Count = 32
  sample_size: Length = 32
  scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.18215
  shift_factor: only(float | None, None) = None
  latents_mean: only(Any, None) = None
  latents_std: only(Any, None) = None
  use_quant_conv: only(bool, True) = True
  use_post_quant_conv: only(bool, True) = True
  mid_block_add_attention: only(bool, True) = True

  @pydantic.model_validator(mode="after")
  def _fits(self):
    num, why = len(self.block_out_channels), "one for each of the block_out_channels"
    _levels(
      self, down_block_types=(why, ["DownEncoderBlock2D"] * num),
      up_block_types=(why, ["UpDecoderBlock2D"] * num),
      out_channels=("as many as in_channels", self.in_channels))
    return self


class PipelineIndex(Published):
  """`model_index.json`: the class of each part."""

  unet: ClassName
  vae: ClassName
  text_encoder: ClassName
  tokenizer: ClassName
  scheduler: ClassName
