"""What `config.json` of each family may hold: names, types, ranges and published defaults.

Each `model_type` has one class, which is its schema and its table of defaults. The defaults are
those of the configuration classes of transformers, since most published files leave out what equals
them. An absent field has its default; a null one is null, and is refused if the family gives null
no meaning. Fields that change the function and are not modelled are listed with the values that
are. If a file holds several names of one field, the one that transformers takes counts.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import AliasChoices, Field

from lmops_jax.host.foreign_files import shown

LONGEST = 2**31 - 1  # positions are int32
Count = Annotated[int, Field(ge=1)]  # checked against the tensors later
Length = Annotated[int, Field(ge=1, le=LONGEST)]
Index = Annotated[int, Field(ge=0, le=LONGEST)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _named(default: Any, *names: str) -> Any:
  """A field with several names; what is under an earlier one counts."""
  return Field(default, validation_alias=AliasChoices(*names))


def _modelled(allowed, value, info):
  if value not in allowed:
    raise ValueError(
      f"{info.field_name}={shown(value)} is not modelled by lmops_jax; it reads models with "
      f"{info.field_name} {' or '.join(map(shown, allowed))}."
    )
  return value


def only(kind: Any, *allowed: Any) -> Any:
  """A field of which only the values in `allowed` are modelled."""
  return Annotated[kind, pydantic.AfterValidator(functools.partial(_modelled, allowed))]


class Published(pydantic.BaseModel):
  """Any part of a `config.json`; further fields are left alone."""

  model_config = pydantic.ConfigDict(extra="ignore", frozen=True, protected_namespaces=())
  multiples: ClassVar[tuple[tuple[str, str], ...]] = ()  # (field, field that divides it)
  overriding: ClassVar[tuple[str, ...]] = ()  # fields that go before others

  @pydantic.model_validator(mode="after")
  def _divides(self):
    for whole, part in self.multiples:
      value, divisor = getattr(self, whole), getattr(self, part)
      if divisor is not None and value % divisor:
        raise ValueError(f"{whole}={value} should be a multiple of {part}={divisor}.")
    return self

  @classmethod
  def superseding(cls) -> tuple[str, ...]:
    """Fields and names that go before those that `Family.write_config` gives."""
    names = (field.validation_alias for field in cls.model_fields.values())
    return (*cls.overriding, *(
      name for alias in names if isinstance(alias, AliasChoices) for name in alias.choices[:-1]
    ))

  @classmethod
  def __get_pydantic_json_schema__(cls, schema, handler):
    """The schema, with a field under each of its names, so that an error can look it up."""
    made = handler(schema)
    properties = handler.resolve_ref_schema(made).get("properties", {})
    for field in cls.model_fields.values():
      if isinstance(field.validation_alias, AliasChoices):
        names = field.validation_alias.choices
        for name in names[1:]:
          properties[name] = properties[names[0]]
    return made


class AnyModel(Published):
  """What the files of all families have in common."""

  architectures: list[str] | None = None
  dtype: str | None = None
  torch_dtype: str | None = None
  bos_token_id: int | list[int] | None = None
  eos_token_id: int | list[int] | None = None
  pad_token_id: int | None = None
  quantization_config: only(dict | None, None, {}) = None
  pruned_heads: only(dict | None, None, {}) = None


class GPT2(AnyModel):
  multiples = (("n_embd", "n_head"),)
  vocab_size: Count = 50257
  n_positions: Length = _named(1024, "max_position_embeddings", "n_positions")
  n_embd: Count = _named(768, "hidden_size", "n_embd")
  n_layer: Count = _named(12, "num_hidden_layers", "n_layer")
  n_head: Count = _named(12, "num_attention_heads", "n_head")
  n_inner: Count | None = None
  activation_function: str = "gelu_new"
  layer_norm_epsilon: Positive = 1e-5
  scale_attn_weights: only(bool, True) = True
  scale_attn_by_inverse_layer_idx: only(bool, False) = False
  add_cross_attention: only(bool, False) = False
  tie_word_embeddings: bool = True


class GPTJ(AnyModel):
  multiples = (("n_embd", "n_head"),)
  vocab_size: Count = 50400
  n_positions: Length = _named(2048, "max_position_embeddings", "n_positions")
  n_embd: Count = _named(4096, "hidden_size", "n_embd")
  n_layer: Count = _named(28, "num_hidden_layers", "n_layer")
  n_head: Count = _named(16, "num_attention_heads", "n_head")
  rotary_dim: Count = 64
  n_inner: Count | None = None
  activation_function: str = "gelu_new"
  layer_norm_epsilon: Positive = 1e-5
  tie_word_embeddings: bool = False


class Bloom(AnyModel):
  multiples = (("hidden_size", "n_head"),)
  overriding = ("n_embed",)
  vocab_size: Count = 250880
  hidden_size: Count = 64
  n_embed: Count | None = None
  n_layer: Count = _named(2, "num_hidden_layers", "n_layer")
  n_head: Count = _named(8, "num_attention_heads", "n_head")
  layer_norm_epsilon: Positive = 1e-5
  apply_residual_connection_post_layernorm: only(bool, False) = False
  tie_word_embeddings: bool = True
  seq_length: Length = 2048  # in training; transformers has no such field, for ALiBi has no end


class OPT(AnyModel):
  multiples = (("hidden_size", "num_attention_heads"),)
  vocab_size: Count = 50272
  hidden_size: Count = 768
  num_hidden_layers: Count = 12
  ffn_dim: Count = 3072
  num_attention_heads: Count = 12
  max_position_embeddings: Length = 2048
  do_layer_norm_before: bool = True
  remove_final_layer_norm: bool = _named(False, "_remove_final_layer_norm")
  word_embed_proj_dim: Count | None = None
  activation_function: str = "relu"
  enable_bias: bool = True
  layer_norm_elementwise_affine: only(bool, True) = True
  tie_word_embeddings: bool = True


class XGLM(AnyModel):
  multiples = (("d_model", "attention_heads"),)
  vocab_size: Count = 256008
  max_position_embeddings: Length = 2048
  d_model: Length = _named(1024, "hidden_size", "d_model")
  ffn_dim: Count = 4096
  num_layers: Count = _named(24, "num_hidden_layers", "num_layers")
  attention_heads: Count = _named(16, "num_attention_heads", "attention_heads")
  activation_function: str = "gelu"
  scale_embedding: bool = True
  add_cross_attention: only(bool, False) = False
  pad_token_id: only(int | None, None, 0, 1) = 1  # others empty the row of a position
  tie_word_embeddings: bool = True


class Stretch(Published):
  """`rope_parameters` or `rope_scaling`: how rotary frequencies are stretched."""

  rope_theta: Positive | None = None
  rope_type: str = _named("default", "rope_type", "type")
  partial_rotary_factor: only(float | None, None, 1.0) = None
  factor: Positive | None = None
  low_freq_factor: Positive | None = None
  high_freq_factor: Positive | None = None
  original_max_position_embeddings: Length | None = None
  attention_factor: Positive | None = None
  beta_fast: Share | None = None
  beta_slow: Share | None = None
  mscale: Share | None = None
  mscale_all_dim: Share | None = None
  truncate: bool | None = True
  short_factor: list[Positive] | None = None
  long_factor: list[Positive] | None = None
  full_attention: only(dict | None, None) = None
  sliding_attention: only(dict | None, None) = None


class _Rotary(AnyModel):
  """Llama and its relatives."""

  multiples = (("num_attention_heads", "num_key_value_heads"),)
  overriding = (
    "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor", "layer_types",
  )
  hidden_size: Count = 4096
  num_hidden_layers: Count = 32
  num_attention_heads: Count = 32
  hidden_act: str = "silu"
  rms_norm_eps: Positive = 1e-6
  head_dim: Count | None = None
  tie_word_embeddings: bool = False
  rope_theta: Positive = 1e4
  rope_scaling: Stretch | None = None
  rope_parameters: Stretch | None = None
  original_max_position_embeddings: Length | None = None
  partial_rotary_factor: only(float | None, None, 1.0) = None

  @pydantic.model_validator(mode="after")
  def _has_head_dim(self):
    if self.head_dim is None and self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f"hidden_size={self.hidden_size} should be a multiple of num_attention_heads="
        f"{self.num_attention_heads}, or head_dim be given."
      )
    return self


class Llama(_Rotary):
  vocab_size: Count = 32000
  intermediate_size: Count = 11008
  num_key_value_heads: Count | None = None
  max_position_embeddings: Length = 2048
  attention_bias: bool = False
  mlp_bias: bool = False


class Mistral(_Rotary):
  vocab_size: Count = 32000
  intermediate_size: Count = 14336
  num_key_value_heads: Count | None = 8
  max_position_embeddings: Length = 4096 * 32
  sliding_window: Length | None = 4096
  layer_types: list[str] | None = None
  attention_bias: only(bool, False) = False
  mlp_bias: only(bool, False) = False


class Qwen2(_Rotary):
  vocab_size: Count = 151936
  intermediate_size: Count = 22016
  num_key_value_heads: Count | None = 32
  max_position_embeddings: Length = 32768
  use_sliding_window: bool = False
  sliding_window: Length | None = 4096
  max_window_layers: Index = 28
  layer_types: list[str] | None = None
  mlp_bias: only(bool, False) = False


class Bert(AnyModel):
  multiples = (("hidden_size", "num_attention_heads"),)
  vocab_size: Count = 30522
  hidden_size: Count = 768
  num_hidden_layers: Count = 12
  num_attention_heads: Count = 12
  intermediate_size: Count = 3072
  hidden_act: str = "gelu"
  max_position_embeddings: Length = 512
  type_vocab_size: Index = 2
  layer_norm_eps: Positive = 1e-12
  position_embedding_type: only(str, "absolute") = "absolute"
  is_decoder: only(bool, False) = False
  add_cross_attention: only(bool, False) = False
  tie_word_embeddings: bool = True


class Roberta(Bert):
  vocab_size: Count = 50265
  pad_token_id: only(int | None, 1) = 1  # the first position is the row after the padding's


class Electra(Bert):
  embedding_size: Count = 128
  hidden_size: Count = 256
  num_attention_heads: Count = 4
  intermediate_size: Count = 1024


class _Tower(Published):
  multiples = (("hidden_size", "num_attention_heads"),)
  num_hidden_layers: Count = 12
  hidden_act: str = "quick_gelu"
  layer_norm_eps: Positive = 1e-5


class ClipText(_Tower):
  vocab_size: Count = 49408
  hidden_size: Count = 512
  intermediate_size: Count = 2048
  num_attention_heads: Count = 8
  max_position_embeddings: Length = 77
  eos_token_id: Index = 49407


class ClipVision(_Tower):
  hidden_size: Count = 768
  intermediate_size: Count = 3072
  num_attention_heads: Count = 12
  image_size: Length = 224
  patch_size: Length = 32
  num_channels: only(int, 3) = 3

  @pydantic.model_validator(mode="after")
  def _has_a_patch(self):
    if self.patch_size > self.image_size:
      raise ValueError(
        f"patch_size={self.patch_size} should not exceed image_size={self.image_size}."
      )
    return self


class Clip(AnyModel):
  """Both towers; if an early file has a `..._config_dict`, that alone counts."""

  overriding = ("text_config_dict", "vision_config_dict")
  projection_dim: Count = 512
  text_config: ClipText | None = None
  text_config_dict: ClipText | None = None
  vision_config: ClipVision | None = None
  vision_config_dict: ClipVision | None = None


class Kosmos2Text(Published):
  multiples = (("embed_dim", "attention_heads"),)
  vocab_size: Count = 65037
  max_position_embeddings: Length = 2048
  embed_dim: Length = _named(2048, "hidden_size", "embed_dim")  # its root is the scale
  layers: Count = _named(24, "num_hidden_layers", "layers")
  ffn_dim: Count = 8192
  attention_heads: Count = _named(32, "num_attention_heads", "attention_heads")
  activation_function: str = "gelu"
  layer_norm_eps: Positive = 1e-5
  scale_embedding: bool = True
  add_cross_attention: only(bool, False) = False
  pad_token_id: Index = 1  # positions begin behind it


class Kosmos2Vision(ClipVision):
  num_hidden_layers: Count = 24
  hidden_size: Count = 1024
  intermediate_size: Count = 4096
  num_attention_heads: Count = 16
  patch_size: Length = 14


class Kosmos2(AnyModel):
  text_config: Kosmos2Text | None = None
  vision_config: Kosmos2Vision | None = None
  latent_query_num: Count = 64
  tie_word_embeddings: bool = True
