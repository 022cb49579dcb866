"""Texts to vectors: an encoder whose lower layers run once and whose upper ones may be trained.

The lower part is frozen, so what it makes of a text is computed once and kept; a step then costs no
more than the layers that are trained. Any trunk will do, bidirectional or causal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.config.setting_types import Count, Decay, PositiveInt, component
from lmops_jax.decoding.lengths import fine_bucket
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.dropout import folded
from lmops_jax.models.encoders import encoder_params
from lmops_jax.models.layers import unit_length
from lmops_jax.models.stacks import stacks
from lmops_jax.models.transformer import Transformer

_ROWS_AT_ONCE = 64


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Encoding:
  """How a text becomes a vector.

  Attributes:
    pooling: "mean" over a text's tokens, for sentence encoders and causal models; or its "first",
      which classifies in BERT and RoBERTa; or its "last".
    tuned_layers: number of last layers that are trained with the prototypes; 0 trains none.
    max_tokens: most tokens that are read of a text or pair, those around it included.
    dropout: in the layers that are trained, of parts' outputs and attention's probabilities.
    normalize: whether vectors are scaled to length 1, where distances are at most 4.
  """

  pooling: Literal["mean", "first", "last"] = "mean"
  tuned_layers: Count = 0
  max_tokens: PositiveInt = 128
  dropout: Decay = 0.0
  normalize: bool = False


class Encoded(NamedTuple):
  """What is kept of texts.

  Attributes:
    hidden: `[N,S,D] float32` before the layers that are trained; `[N,1,D]`, the vectors themselves,
      if none are.
    lengths: `[N] int32`, tokens of each text, at most S; 1 for vectors.
    num_cut: texts of which tokens were left out.
  """

  hidden: np.ndarray
  lengths: np.ndarray
  num_cut: int = 0


class Encoder:
  """A trunk in two parts.

  Args:
    config: of the trunk, with `vocab_size`.
    settings: how it is read.

  Raises:
    ValueError: for more trained layers or tokens than the trunk has.
  """

  def __init__(self, config: TransformerConfig, settings: Encoding):
    if settings.tuned_layers >= config.num_layers:
      raise ValueError(
        f"prototypes.Encoding.tuned_layers={settings.tuned_layers} must be below the encoder's "
        f"{config.num_layers} layers, of which the rest is run once."
      )
    if settings.tuned_layers and config.relative_buckets:
      raise ValueError(
        "this encoder's layers share a table of relative biases, so they cannot be split; set "
        "prototypes.Encoding.tuned_layers to 0."
      )
    if settings.max_tokens > config.max_length:
      raise ValueError(
        f"prototypes.Encoding.max_tokens={settings.max_tokens} is beyond the encoder's "
        f"{config.max_length} positions; set it to at most that."
      )
    self.settings, self.width, self._longest = settings, config.width, config.max_length
    self._has_types = config.num_token_types > 1
    parts = stacks(
      dataclasses.replace(
        config, residual_dropout=settings.dropout, attention_dropout=settings.dropout),
      settings.tuned_layers)
    self._lower = Transformer(parts["trunk"], with_unembedding=False)
    # Few layers are soon compiled one by one, and a loop over them would cost a tenth more time.
    self._top = None if "top" not in parts else Transformer(
      dataclasses.replace(parts["top"], scan_layers=False), with_unembedding=False,
      with_embedding=False)
    self._below, self._above = jax.jit(self._run_below), jax.jit(self.vectors)

  def split(self, params: Mapping[str, Any]) -> tuple[Any, Any]:
    """Parameters of a whole model as those of the frozen part and those that are trained."""
    whole = encoder_params(params, self.settings.tuned_layers)
    return whole["trunk"], whole.get("top", {})

  def init_top(self, key: jax.Array) -> Any:
    """Parameters of the trained layers at random, with Linen's boxes."""
    if self._top is None:
      return {}
    x = jnp.zeros((1, 1, self.width))
    return self._top.init(key, x, method="encode")["params"]

  def encode(
    self, lower: Any, tokens: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None = None, progress=None,
  ) -> Encoded:
    """What the frozen part makes of texts.

    Args:
      tokens: the ids of each text, those around it included, at most `max_tokens`.
      types: of each token, for models that tell a pair's second text by them (BERT); None is 0.
      progress: is called with the number of texts that are done since the last call.
    """
    lengths = np.array([max(len(row), 1) for row in tokens], np.int32)
    pooled = self._top is None
    size = 1 if pooled else self._bucket(lengths.max())
    hidden = np.zeros((len(tokens), size, self.width), np.float32)
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), _ROWS_AT_ONCE):
      rows = order[first : first + _ROWS_AT_ONCE]
      width = self._bucket(lengths[rows].max())
      of_rows = np.ones(_ROWS_AT_ONCE, np.int32)
      of_rows[: len(rows)] = lengths[rows]
      batch = _padded([tokens[row] for row in rows], width)
      has_types = types is not None and self._has_types
      of_tokens = _padded([types[row] for row in rows], width) if has_types else None
      found = np.asarray(self._below(lower, batch, of_rows, of_tokens))[: len(rows)]
      hidden[rows, : found.shape[1]] = found
      if progress:
        progress(len(rows))
    return Encoded(hidden, np.ones_like(lengths) if pooled else lengths)

  def _bucket(self, length) -> int:
    return min(fine_bucket(int(length)), self._longest)

  def _run_below(self, lower, tokens, lengths, types):
    segments = _segments(tokens.shape[1], lengths)
    hidden = self._lower.apply(
      {"params": lower}, tokens, segment_ids=segments, token_types=types)
    if self._top is None:
      return self._pooled(hidden, lengths)[:, None].astype(jnp.float32)
    return jnp.where(segments[:, :, None] > 0, hidden.astype(jnp.float32), 0)

  def vectors(self, top: Any, batch: Mapping[str, jax.Array], keys=None) -> jax.Array:
    """`[B,D] float32` of a batch with `hidden [B,S,D]` and `lengths [B]`.

    Args:
      top: the trained layers' parameters, {} if there are none.
      keys: `[B]` keys of dropout; None drops nothing.
    """
    hidden = batch["hidden"]
    if self._top is None:
      return hidden[:, 0]
    dropping = keys is not None and self.settings.dropout > 0
    hidden = self._top.apply(
      {"params": top}, hidden, segment_ids=_segments(hidden.shape[1], batch["lengths"]),
      keys=folded(keys, 0) if dropping else None, method="encode")
    return self._pooled(hidden, batch["lengths"])

  def all_vectors(self, top: Any, encoded: Encoded) -> np.ndarray:
    """`[N,D] float32` without dropout."""
    if self._top is None:
      return encoded.hidden[:, 0]
    found = []
    for first in range(0, len(encoded.hidden), _ROWS_AT_ONCE):
      batch = {name: getattr(encoded, name)[first : first + _ROWS_AT_ONCE]
               for name in ("hidden", "lengths")}
      number = len(batch["hidden"])
      batch = {name: np.pad(x, ((0, _ROWS_AT_ONCE - number),) + ((0, 0),) * (x.ndim - 1),
                            constant_values=int(name == "lengths"))
               for name, x in batch.items()}
      found.append(np.asarray(self._above(top, batch))[:number])
    return np.concatenate(found)

  def _pooled(self, hidden, lengths):
    hidden = hidden.astype(jnp.float32)
    if self.settings.pooling == "mean":
      real = _segments(hidden.shape[1], lengths)[:, :, None]
      vectors = jnp.sum(hidden * real, axis=1) / lengths[:, None]
    else:
      place = jnp.zeros_like(lengths) if self.settings.pooling == "first" else lengths - 1
      vectors = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    if self.settings.normalize:
      vectors = unit_length(vectors, 1e-12)
    return vectors


def _padded(rows, width):
  """`[_ROWS_AT_ONCE,width] int32` with zeros behind and below the rows."""
  found = np.zeros((_ROWS_AT_ONCE, width), np.int32)
  for i, row in enumerate(rows):
    found[i, : len(row)] = row
  return found


def _segments(length, lengths):
  """`[B,S] int32`: 1 for a text's tokens, 0 for padding."""
  return (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
