"""Published and trained encoders of text, less their heads, as `models.encoders.TextEncoder`s.

BERT, RoBERTa and ELECTRA's two networks are such encoders, and so is the discriminator that
`training.replaced_tokens` trains.
"""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lmops_jax.config.setting_types import Count, Decay, Text, component
from lmops_jax.models.attention import ATTENTION_KINDS
from lmops_jax.models.config import DTYPES, REMAT_POLICIES, TransformerConfig
from lmops_jax.models.encoders import TextEncoderConfig, encoder_params
from lmops_jax.pretrained.families import by_name
from lmops_jax.pretrained.families.explicit import explicit
from lmops_jax.pretrained.model import PretrainedModel, load


@component(module="pretrained")
def text_encoder(
  path: Text | PathLike,
  top_layers: Count = 0,
  dropout: Decay = 0.0,
  dtype: Literal[DTYPES] = "float32",
  param_dtype: Literal[DTYPES] = "float32",
  attention: Literal[ATTENTION_KINDS] = "xla",
  scan_layers: bool = True,
  remat: Literal[REMAT_POLICIES] = "none",
) -> TextEncoderConfig:
  """The configuration of a published encoder of text; `text_encoder_params` reads its weights.

  Args:
    path: what `pretrained.load` takes.
    top_layers: number of its last layers whose parameters are a stack of their own.
    dropout: of embeddings, of parts' outputs and of attention's probabilities, in training.
    dtype, param_dtype, attention, scan_layers, remat: as `pretrained.load` has them.

  Raises:
    ValueError: if nothing there can be read, or it is no encoder of text.
  """
  found = _opened(
    path, dtype=dtype, param_dtype=param_dtype, attention=attention, scan_layers=scan_layers,
    remat=remat)
  trunk = dataclasses.replace(
    without_heads(found.config), embedding_dropout=dropout, residual_dropout=dropout,
    attention_dropout=dropout)
  return TextEncoderConfig(trunk, top_layers)


def without_heads(config: TransformerConfig) -> TransformerConfig:
  """The same encoder, of which nothing is left that predicts."""
  return dataclasses.replace(
    config, tied_embeddings=True, head_transform=False, unembedding_bias=False, pooler=False,
    detector=False)


def check_text_encoder(path: str | PathLike, config: TextEncoderConfig) -> None:
  """Raises ValueError unless a published encoder is the one that `config` describes.

  Only configurations are read. How a model runs, starts and is trained may differ.
  """
  theirs, ours = (explicit(without_heads(c)) for c in (_opened(path).config, config.trunk))
  for field in dataclasses.fields(TransformerConfig):
    there, here = getattr(theirs, field.name), getattr(ours, field.name)
    if there != here:
      raise ValueError(
        f"the encoder in {str(path)!r} has {field.name}={there!r} and models.TextEncoderConfig."
        f"trunk has {here!r}; give both the same, or take @pretrained.text_encoder() of that path "
        "as the encoder."
      )


def text_encoder_params(
  path: str | PathLike, config: TextEncoderConfig, partitioner=None
) -> dict[str, Any]:
  """The weights of a published encoder for a `TextEncoder` of `config`.

  Args:
    path: what `pretrained.load` takes.
    config: the encoder's, such as `text_encoder` gives.
    partitioner: see `PretrainedModel.params`.

  Raises:
    ValueError: as `check_text_encoder`, and if the weights do not fit their own configuration.
  """
  check_text_encoder(path, config)
  found = _opened(path, param_dtype=config.trunk.param_dtype)
  return encoder_params(found.params(partitioner), config.top_layers)


def _opened(path: str | PathLike, **choices: Any) -> PretrainedModel:
  found = load(Path(path), **choices)
  if by_name(found.family).config is not TransformerConfig or found.config.causal:
    raise ValueError(
      f"{str(path)!r} is a model of the family {found.family!r}, which is no encoder of text; give "
      "a BERT, RoBERTa or ELECTRA."
    )
  return found
