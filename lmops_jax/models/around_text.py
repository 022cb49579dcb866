"""Base of language models that read vectors of encoders: a text model and what feeds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.models.dropout import folded
from lmops_jax.models.layers import unit_length

_IMAGES = 1 << 30  # folded into keys for images; layers of texts have the small numbers
_SMALLEST = 1e-12  # the least length that vectors are divided by, as in Kosmos-2's published code


class AroundText(nn.Module):
  """A module whose `text` is a `Transformer`, used as if it were that one.

  Parameters `text/` are the text model's and serve it alone, in generation for instance. The
  configuration has `text`, that of the text model.
  """

  config: Any

  def touch_encoders(self) -> None:
    """Makes the parameters of the encoders, which a call with tokens alone does not use."""
    raise NotImplementedError

  def connected(
    self, connector: nn.Module, features: jax.Array, unit: bool, keys: jax.Array | None
  ) -> jax.Array:
    """An encoder's vectors `[N,P,D]` as the text model takes them, `[N,M,W]`.

    Args:
      connector: one of `models.connectors`.
      features: `[N,P,D]`.
      unit: divide them by their lengths.
      keys: `[N]` typed keys of the connector's dropout, or None.
    """
    return connector(self.as_read(features, unit), keys)

  def as_read(self, features: jax.Array, unit: bool) -> jax.Array:
    """An encoder's vectors `[N,P,D]` as a connector reads them; `unit` as in `connected`."""
    if unit:
      features = unit_length(features, _SMALLEST)
    return features.astype(self.config.text.dtype)

  def __call__(self, tokens: jax.Array, *args, **kwargs) -> jax.Array:
    """Hidden states `[B,S,D]`; arguments as `Transformer.__call__`.

    Its `vectors` are those of `row_vectors`.
    """
    if self.is_initializing():
      self.touch_encoders()
    return self.text(tokens, *args, **kwargs)

  def logits(self, tokens: jax.Array, *args, **kwargs) -> jax.Array:
    """Next-token logits `[B,S,V] float32`; arguments as `Transformer.__call__`."""
    return self.unembed(self(tokens, *args, **kwargs))

  def extend(self, *args, **kwargs):
    """`Transformer.extend`."""
    return self.text.extend(*args, **kwargs)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """`Transformer.unembed`."""
    return self.text.unembed(hidden)

  def readout(self, hidden: jax.Array) -> jax.Array:
    """`Transformer.readout`."""
    return self.text.readout(hidden)

  def output_matrix(self) -> jax.Array:
    """`Transformer.output_matrix`."""
    return self.text.output_matrix()

  def output_bias(self) -> jax.Array | None:
    """`Transformer.output_bias`."""
    return self.text.output_bias()


def each_in_rows(
  encode: Callable[..., jax.Array], *arrays: jax.Array | None, keys: jax.Array | None
) -> jax.Array:
  """The vectors of each row's images one after the other, `[B,I*M,W]`.

  Args:
    encode: `(*arrays [N,...], keys [N]) -> [N,M,W]`, called with all rows' images at once.
    arrays: `[B,I,...]`, or None, which is handed on.
    keys: `[B]` typed keys of dropout; each image draws from one of its own. None drops nothing.
  """
  batch, num = next(x for x in arrays if x is not None).shape[:2]
  if keys is not None:
    of_images = functools.partial(folded, folded(keys, _IMAGES))
    keys = jax.vmap(of_images, out_axes=1)(jnp.arange(num)).reshape(-1)
  flat = (None if x is None else x.reshape(-1, *x.shape[2:]) for x in arrays)
  vectors = encode(*flat, keys)
  return vectors.reshape(batch, -1, vectors.shape[-1])
