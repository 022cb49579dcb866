"""Vectors that take the place of word embeddings: how images and encoded texts enter a decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def replaced(
  words: jax.Array, vectors: jax.Array | None, vector_index: jax.Array | None
) -> jax.Array:
  """Word embeddings `[B,S,W]` with vectors at chosen positions.

  No gradient reaches the words that are replaced, nor does their value matter, were it NaN.

  Args:
    words: `[B,S,W]`.
    vectors: `[B,M,W]`, of each row, or None.
    vector_index: `[B,S] int32`, the vector that stands there; negative keeps the word, and M or
      more gives NaN. None if `vectors` is.

  Raises:
    ValueError: for one of `vectors` and `vector_index` without the other, or shapes that disagree.
  """
  if vectors is None and vector_index is None:
    return words
  _check(words.shape, *(None if x is None else x.shape for x in (vectors, vector_index)))
  index = jnp.maximum(vector_index, 0)[:, :, None]
  chosen = jnp.take_along_axis(
    vectors.astype(words.dtype), index, axis=1, mode="fill", fill_value=jnp.nan)
  return jnp.where(vector_index[:, :, None] < 0, words, chosen)


def _check(words, vectors, index):
  batch, length, width = words
  if vectors is None or len(vectors) != 3 or index != (batch, length) or vectors != (
      batch, vectors[1], width):
    raise ValueError(
      f"vectors have the shape {vectors} and vector_index {index} beside {batch} rows of {length} "
      f"tokens; give vectors [{batch}, vectors of a row, {width}] and an index "
      f"[{batch}, {length}], or neither."
    )
