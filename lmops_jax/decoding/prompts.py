"""Prompts: token ids, with vectors in the place of some of them, those of images for instance.

Vectors take the place of word embeddings (`models.vectors`) when a prompt is read, and never again:
what follows sees them through the cache. Who makes them makes them once; beams, sampled answers,
options and further turns use them as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lmops_jax.decoding.lengths import bucket


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """Token ids and vectors. Its length is the number of ids.

  Attributes:
    ids: of all tokens. Those in the slots of vectors only hold the place: their value is never
      read, need not be in the vocabulary, and is no token to repetition penalties and n-grams.
    vectors: `[m,W]`, W being the width of word embeddings, on the host or a device of this process;
      None for none. Several prompts may share one array, each using some of it.
    index: which of the vectors stands at each id, -1 for a word; None if `vectors` is.
  """

  ids: Sequence[int]
  vectors: np.ndarray | jax.Array | None = None
  index: Sequence[int] | np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def slots(self) -> np.ndarray:
    """`[ids] bool`, where vectors stand."""
    if self.index is None:
      return np.zeros(len(self.ids), bool)
    return np.asarray(self.index) >= 0

  def part(self, start: int, stop: int | None = None) -> Prompt:
    """The tokens from `start` to `stop`, with the vectors that stand there."""
    index = None if self.index is None else self.index[start:stop]
    return Prompt(self.ids[start:stop], self.vectors, index)

  def own_vectors(self) -> np.ndarray:
    """`[slots,W] float32`, the vectors of a checked prompt's slots in their order."""
    return np.asarray(self.vectors[self.index[self.slots]], np.float32)


class Padded(NamedTuple):
  """Prompts as arrays.

  Attributes:
    tokens: `[B,S] int32`, 0 in slots and in padding.
    valid: `[B,S] bool`, False for padding.
    vectors: `[B,M,W] float32`, or None where no prompt has any.
    vector_index: `[B,S] int32`, -1 for words and padding; None if `vectors` is.
  """

  tokens: np.ndarray
  valid: np.ndarray
  vectors: np.ndarray | None
  vector_index: np.ndarray | None


def checked(prompt: Prompt | Sequence[int], width: int, name: str) -> Prompt:
  """A prompt in the one form that the rest of decoding reads.

  Args:
    prompt: with vectors, or ids alone.
    width: W.
    name: of the prompt, for errors.

  Returns:
    Ids as a list with 0 in slots, the vectors on the host, and the index as an array; None for both
    where there is no slot.

  Raises:
    ValueError: vectors without index or the reverse, another shape or width, an index that is not
      one for each id or points outside of the vectors, or vectors that are not finite.
  """
  if not isinstance(prompt, Prompt):
    prompt = Prompt(prompt)
  ids = [int(token) for token in prompt.ids]
  if prompt.vectors is None and prompt.index is None:
    return Prompt(ids)
  if prompt.vectors is None or prompt.index is None:
    given, missing = ("index", "vectors")[:: 1 if prompt.vectors is None else -1]
    raise ValueError(f"{name} has {given} and no {missing}; give both, or neither.")
  vectors, index = np.asarray(prompt.vectors), np.asarray(prompt.index)
  if vectors.ndim != 2 or vectors.shape[1] != width:
    raise ValueError(
      f"{name} has vectors of the shape {vectors.shape}, and this model's word embeddings have "
      f"width {width}; give [vectors, {width}], from the model's own connector."
    )
  if index.shape != (len(ids),) or (len(ids) and not np.issubdtype(index.dtype, np.integer)):
    raise ValueError(
      f"{name} has {len(ids)} ids and an index of shape {index.shape} and type {index.dtype}; give "
      "one whole number for each id, -1 for a word."
    )
  outside = np.flatnonzero((index < -1) | (index >= len(vectors)))
  if outside.size:
    raise ValueError(
      f"{name} has index {index[outside[0]]} at token {outside[0]}, and there are {len(vectors)} "
      "vectors; an index is that of a vector, from 0 on, or -1 for a word."
    )
  slots = index >= 0
  if not slots.any():
    return Prompt(ids)
  ids = [0 if slot else token for token, slot in zip(ids, slots.tolist())]
  prompt = Prompt(ids, vectors, index.astype(np.int32))
  finite = np.isfinite(prompt.own_vectors()).all(axis=1)
  if not finite.all():
    place = np.flatnonzero(slots)[np.argmin(finite)]
    raise ValueError(
      f"{name} has a vector at token {place} that is not finite; check the picture and the model "
      "that made it."
    )
  return prompt


def numbered(slots: np.ndarray, rows: Sequence[Sequence[Prompt]]) -> tuple[np.ndarray, np.ndarray]:
  """The vectors of rows that hold one prompt behind the other, and which stands where.

  Args:
    slots: `[B,S] bool`, at least one of them True.
    rows: of each row the checked prompts whose slots these are, in their order; rows after the last
      have none.

  Returns:
    Vectors `[B,M,W] float32`, M from few sizes, and their index `[B,S] int32`.
  """
  own = [[p.own_vectors() for p in row if p.index is not None] for row in rows]
  width = next(part for row in own for part in row).shape[1]
  vectors = np.zeros((len(slots), bucket(int(slots.sum(axis=1).max())), width), np.float32)
  for into, parts in zip(vectors, own):
    if parts:
      together = np.concatenate(parts)
      into[: len(together)] = together
  return vectors, np.where(slots, np.cumsum(slots, axis=1) - 1, -1).astype(np.int32)


def common_length(a: Prompt, b: Prompt, limit: int) -> int:
  """Tokens, at most `limit`, that two checked prompts both begin with.

  The same words, and the same vectors where vectors stand: two pictures have the same ids.
  """
  length = min(limit, len(a), len(b))
  length = next((i for i, (x, y) in enumerate(zip(a.ids[:length], b.ids)) if x != y), length)
  if a.vectors is None and b.vectors is None:
    return length
  differ = a.slots[:length] != b.slots[:length]
  length = int(np.argmax(differ)) if differ.any() else length
  a, b = a.part(0, length), b.part(0, length)
  if not a.slots.any() or (a.vectors is b.vectors and np.array_equal(a.index, b.index)):
    return length
  unequal = (a.own_vectors() != b.own_vectors()).any(axis=1)
  return int(np.flatnonzero(a.slots)[np.argmax(unequal)]) if unequal.any() else length


def padded(prompts: Sequence[Prompt], num_rows: int, width: int, side: str = "left") -> Padded:
  """Checked prompts as rows of one width.

  The number of vectors is padded too, to few sizes.

  Args:
    prompts: at most `num_rows`; rows without one are all padding.
    num_rows: B.
    width: S, at least the longest prompt's.
    side: "left" or "right", where the padding is.
  """
  tokens, valid = np.zeros((num_rows, width), np.int32), np.zeros((num_rows, width), bool)
  slots = np.zeros((num_rows, width), bool)
  for row, prompt in enumerate(prompts):
    n = len(prompt)
    place = slice(width - n, None) if side == "left" else slice(n)
    tokens[row, place], valid[row, place], slots[row, place] = prompt.ids, True, prompt.slots
  if not slots.any():
    return Padded(tokens, valid, None, None)
  return Padded(tokens, valid, *numbered(slots, [[prompt] for prompt in prompts]))
