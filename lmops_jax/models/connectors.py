"""What leads an encoder's vectors into a language model, in place of word embeddings.

- resampler (Kosmos-1 and 2, arXiv:2302.14045, as published with arXiv:2306.14824): the vectors are
  taken to the decoder's width, and latent queries that all images share attend once to them and to
  the queries themselves. No residual sum, no norm, no feed-forward network.
- linear, and feed-forward (MetaLM, arXiv:2206.06336, section 2.3): each vector by itself.

Initial values are the connectors' own, whatever those of the language model: uniform up to
1 / sqrt(inputs) for plain products; for the resampler's attention Xavier's, queries, keys and
values with gain 1 / sqrt(2); latents with deviation 1. An image whose vectors have length 1 then
gives numbers of about 0.02 beside those latents, which is right for towers and decoders of the
published size and training; in short training from scratch images hardly enter. `unit_scale` starts
with numbers of deviation 1 instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Ge

from lmops_jax.config.setting_types import Decay, Size, component
from lmops_jax.models.attention_scores import heads_first, softmax_attention
from lmops_jax.models.config import ACTIVATIONS, TransformerConfig
from lmops_jax.models.dropout import dropped_probabilities
from lmops_jax.models.layers import Projection, activation


@runtime_checkable
class ConnectorConfig(Protocol):
  """A kind of connector and its settings."""

  def module(self, text: TransformerConfig, width: int) -> nn.Module:
    """The connector of an encoder of that width to a language model.

    Returns:
      A module with `__call__(features [N,P,width], keys [N] or None) -> [N,M,W]`, W being the
      width of word embeddings; features have the language model's dtype, `keys` are those of
      dropout.

    Raises:
      ValueError: for settings that do not fit the language model.
    """

  def num_vectors(self, num_features: int) -> int:
    """M for P features."""


@component(module="models")
@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
  """Settings of a `Resampler`.

  Attributes:
    num_latents: M, vectors of an image.
    num_heads: of its attention; None is the language model's number.
    dropout: share of attention's probabilities that are dropped.
    unit_scale: initial values that take vectors of length 1 to numbers of deviation 1.
  """

  num_latents: Size = 64
  num_heads: Size | None = None
  dropout: Decay = 0.0
  unit_scale: bool = False

  def module(self, text: TransformerConfig, width: int) -> Resampler:
    """See `ConnectorConfig`."""
    heads = self.num_heads or text.num_heads
    if text.token_width % heads:
      raise ValueError(
        f"models.ResamplerConfig.num_heads={heads} must divide the width of word embeddings, "
        f"{text.token_width}."
      )
    return Resampler(self, text, width)

  def num_vectors(self, num_features: int) -> int:
    """See `ConnectorConfig`."""
    return self.num_latents


class Resampler(nn.Module):
  """Attention of latent queries over an encoder's vectors and over themselves.

  Parameters: `dense`, `latents [M,W]`, `query`, `key`, `value`, `out`.
  """

  config: ResamplerConfig
  text: TransformerConfig
  width: int

  def setup(self):
    c, d = self.config, self.text.token_width
    heads = c.num_heads or self.text.num_heads
    self.dense = _plain(self.text, self.width, d, ("embed", None), c.unit_scale)
    self.latents = self.param(
      "latents", nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed")),
      (c.num_latents, d), jnp.dtype(self.text.param_dtype))
    xavier = dataclasses.replace(self.text, initialization="xavier")
    into_heads = functools.partial(
      Projection, xavier, (d,), (heads, d // heads), ("embed", "heads", "head_dim"), True,
      math.sqrt(0.5))
    self.query, self.key, self.value = into_heads(), into_heads(), into_heads()
    self.out = Projection(
      xavier, (heads, d // heads), (d,), ("heads", "head_dim", "embed"), True)

  def __call__(self, features: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """`[N,P,width]` to `[N,M,W]`; `keys [N]` are those of dropout, or None."""
    batch, num_latents = features.shape[0], self.config.num_latents
    latents = self.latents.astype(self.text.dtype)[None]
    inputs = self.dense(features)

    def of_all(x):
      return jnp.broadcast_to(x, (batch, *x.shape[1:]))

    q = of_all(self.query(latents))
    # What the latents give is the same for all images, and computed once.
    k, v = (
      jnp.concatenate([product(inputs), of_all(product(latents))], axis=1)
      for product in (self.key, self.value))
    drop = functools.partial(
      dropped_probabilities, keys=keys, rate=self.config.dropout,
      query_index=jnp.arange(num_latents), num_keys=k.shape[1])
    out = softmax_attention(*heads_first(q, k, v), True, drop=drop)
    return self.out(out.transpose(0, 3, 1, 2, 4).reshape(q.shape))


@component(module="models")
@dataclasses.dataclass(frozen=True)
class LinearConnectorConfig:
  """Settings of a `LinearConnector`.

  Attributes:
    unit_scale: initial values that take vectors of length 1 to numbers of deviation 1.
  """

  unit_scale: bool = False

  def module(self, text: TransformerConfig, width: int) -> LinearConnector:
    """See `ConnectorConfig`."""
    return LinearConnector(self, text, width)

  def num_vectors(self, num_features: int) -> int:
    """See `ConnectorConfig`."""
    return num_features


class LinearConnector(nn.Module):
  """A product and a bias, `dense`: a vector for each vector."""

  config: LinearConnectorConfig
  text: TransformerConfig
  width: int

  @nn.compact
  def __call__(self, features: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """`[N,P,width]` to `[N,P,W]`; draws nothing."""
    return _plain(
      self.text, self.width, self.text.token_width, ("embed", None), self.config.unit_scale,
      name="dense")(features)


@component(module="models")
@dataclasses.dataclass(frozen=True)
class FeedForwardConnectorConfig:
  """Settings of a `FeedForwardConnector`.

  Attributes:
    num_layers: products.
    hidden: width between them; None is that of word embeddings.
    activation: between them, one of `config.ACTIVATIONS`.
  """

  num_layers: Annotated[int, Ge(2)] = 3
  hidden: Size | None = None
  activation: Literal[ACTIVATIONS] = "gelu"

  def module(self, text: TransformerConfig, width: int) -> FeedForwardConnector:
    """See `ConnectorConfig`."""
    return FeedForwardConnector(self, text, width)

  def num_vectors(self, num_features: int) -> int:
    """See `ConnectorConfig`."""
    return num_features


class FeedForwardConnector(nn.Module):
  """Products with biases, `dense_0` to `dense_<n-1>`, and an activation between them."""

  config: FeedForwardConnectorConfig
  text: TransformerConfig
  width: int

  @nn.compact
  def __call__(self, features: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """`[N,P,width]` to `[N,P,W]`; draws nothing."""
    c, d = self.config, self.text.token_width
    hidden, last = c.hidden or d, c.num_layers - 1
    widths = [self.width, *[hidden] * last, d]
    x = features
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
      axes = ("embed" if i == 0 else "mlp", "mlp" if i == 0 else "embed" if i == last else None)
      x = _plain(self.text, inputs, outputs, axes, name=f"dense_{i}")(x)
      x = x if i == last else activation(c.activation)(x)
    return x


def _plain(text, inputs, outputs, axes, unit_scale=False, name=None):
  """A product with a bias whose kernel starts uniform."""
  gain = math.sqrt(3 * inputs) if unit_scale else 1.0
  uniform = dataclasses.replace(text, initialization="fan_in")
  return Projection(uniform, (inputs,), (outputs,), axes, True, gain, name=name)
