"""What a configuration computes: every width written out, and nothing that leaves results alone.

Two configurations of one function are equal in this form, which no `config.json` says more than.
"""

from __future__ import annotations

import dataclasses

from lmops_jax.models.config import RopeScaling, TransformerConfig
from lmops_jax.models.vision import VisionConfig
from lmops_jax.pretrained.families import published

# How a model runs, and how it starts and is trained.
_PLAIN = dict(
  attention="xla", attention_chunk=1, scan_layers=True, remat="none", dtype="float32",
  param_dtype="float32", initialization="normal", branch_gain=1.0, embedding_dropout=0.0,
  residual_dropout=0.0, attention_dropout=0.0,
)


def explicit(config: TransformerConfig) -> TransformerConfig:
  """The same model, with every width written out and no choice of how it runs or starts.

  Momentum attention is left aside: it has no tensors, and an export refuses it.
  """
  scaling = config.rope_scaling
  if scaling is not None:
    scaling = dataclasses.replace(scaling, attention_factor=scaling.amplitude)
  return dataclasses.replace(
    config, **_PLAIN, num_kv_heads=config.key_heads, head_dim=config.head_width,
    embedding_width=config.token_width, momentum=None,
    narrow_embeddings=config.narrow_embeddings and config.token_width != config.width,
    rotary_dim=config.rotary_width if config.positions == "rotary" else None,
    rope_scaling=scaling, max_length=stretched_length(config.max_length, config.rope_scaling),
  )


def explicit_vision(config: VisionConfig) -> VisionConfig:
  """The same image encoder, its layers in one stack; other sizes of images are left aside."""
  trunk = dataclasses.replace(explicit(config.trunk), max_length=config.num_patches + 1)
  return dataclasses.replace(config, trunk=trunk, any_size=False, top_layers=0)


def stretched_length(declared: int, scaling: RopeScaling | None) -> int:
  """Positions of a model: the declared number, or what YaRN stretches to if that is more."""
  if scaling is None or scaling.kind != "yarn":
    return declared
  return max(declared, int(min(scaling.factor * scaling.original_max_length, published.LONGEST)))
