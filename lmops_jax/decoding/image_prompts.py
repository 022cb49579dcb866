"""Prompts of texts and pictures for a docked language model (`models.docked`).

Pictures go through the encoder once each, found again by their contents, and their vectors stand in
as many prompts, beams, options and demonstrations as want them. Layout and ids are those of
`data.image_tokens`:

    <s> <image> vectors </image> text <image> vectors </image> text
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from lmops_jax.config.setting_types import ByteCount, PositiveInt
from lmops_jax.data.image_tokens import Encoded, ImageTokens, lay_out
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.multimodal import Part, Picture
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.mesh.meshes import Partitioner, activated, shards_of

CACHE_BYTES = 1 << 30
_WORDS = {"image_id": "<image>", "image_end_id": "</image>", "line_end_id": "</line>"}


def image_tokens(tokenizer, num_slots: int) -> ImageTokens:
  """The ids of a layout with pictures, by the words of a model's tokenizer.

  Args:
    tokenizer: of `lmops_jax.text`.
    num_slots: vectors of a picture.

  Raises:
    ValueError: the tokenizer lacks one of the words.
  """
  ids = {field: tokenizer.token_id(word) for field, word in _WORDS.items()}
  named = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
  for field, value in (ids | named).items():
    if value is None:
      word = _WORDS.get(field, f"for {field.removesuffix('_id').upper()}")
      raise ValueError(
        f"the tokenizer of {tokenizer.path} has no token {word}, which texts with pictures need; "
        "take the tokenizer that the model was published or trained with."
      )
  return ImageTokens(vocab_size=tokenizer.vocab_size, num_slots=num_slots, **ids, **named)


def laid_out(parts: Sequence[Part], tokenizer, ids: ImageTokens) -> Encoded:
  """Texts and pictures as the tokens of a prompt, whose vectors are not made yet.

  Args:
    parts: as `data.multimodal.parts_of` gives them.
    tokenizer: of `lmops_jax.text`; special tokens in a text are taken as such.
    ids: of `image_tokens`.
  """
  texts = [part for part in parts if isinstance(part, str)]
  return lay_out(0, parts, tokenizer.encode_batch(texts, False), len(parts), ids, end=False)


def most_pictures(ids: ImageTokens, max_length: int) -> int:
  """The most pictures of a prompt for a model of `max_length` positions, behind `<s>`."""
  return (max_length - 1) // len(ids.block)


def check_fits(row: Encoded, ids: ImageTokens, max_length: int, name: str) -> None:
  """Holds a prompt's pictures against the model's context.

  Raises:
    ValueError: more pictures than it has place for.
  """
  most = most_pictures(ids, max_length)
  if len(row.pictures) > most:
    raise ValueError(
      f"{name} has {len(row.pictures)} pictures of {len(ids.block)} tokens each, and the model's "
      f"context is {max_length} tokens; give at most {most} pictures."
    )


def check_pictures(pictures: Iterable[Picture], settings: ImageSettings) -> None:
  """Reads and decodes every picture once and keeps none.

  Raises:
    ValueError: one that cannot be read or decoded.
  """
  for picture in dict.fromkeys(pictures):
    settings.pixels(picture.read(), picture.where)


class PictureEncoder:
  """Vectors of pictures, each computed once while the cache has place for it.

  Attributes:
    num_encoded: pictures that went through the encoder so far.
  """

  def __init__(
    self, model, params, settings: ImageSettings, partitioner: Partitioner | None = None, *,
    batch_size: PositiveInt = 8, cache_bytes: ByteCount = CACHE_BYTES,
  ):
    """
    Args:
      model: `DockedLM`.
      params: its parameters, of which `vision` and `connector` are used.
      settings: how a picture becomes pixels of the model's size.
      partitioner: mesh that the parameters are on; None is the default device.
      batch_size: pictures at a time; the vectors do not depend on it.
      cache_bytes: of vectors that are kept; the longest unused go first.
    """
    self._model, self._settings, self._partitioner = model, settings, partitioner
    self._params = {name: params[name] for name in ("vision", "connector")}
    self._batch_size = batch_size
    self._cache: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
    self._cache_bytes, self._held_bytes = cache_bytes, 0
    self.num_encoded = 0

  def __call__(self, pictures: Sequence[Picture]) -> list[np.ndarray]:
    """`[slots,W] float32` of each picture, the same array for equal contents.

    Raises:
      ValueError: a picture that cannot be read or decoded.
    """
    found: dict[bytes, np.ndarray | None] = {}
    keys: dict[Picture, bytes] = {}
    waiting: dict[bytes, np.ndarray] = {}
    for picture in dict.fromkeys(pictures):
      data = picture.read()
      key = keys[picture] = hashlib.blake2b(data, digest_size=16).digest()
      if key in found:
        continue
      found[key] = self._cached(key)
      if found[key] is None:
        waiting[key] = self._settings.pixels(data, picture.where)
      if len(waiting) == self._batch_size:
        found |= self._encode(waiting)
        waiting = {}
    if waiting:
      found |= self._encode(waiting)
    return [found[keys[picture]] for picture in pictures]

  def _cached(self, key: bytes) -> np.ndarray | None:
    if key in self._cache:
      self._cache.move_to_end(key)
    return self._cache.get(key)

  def _encode(self, pixels: dict[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
    """Vectors of pictures, which the cache then holds; few numbers of pictures are compiled."""
    shards = shards_of(self._partitioner)
    size = shards * (1 << (-(-len(pixels) // shards) - 1).bit_length())
    first = next(iter(pixels.values()))
    images = np.zeros((size, *first.shape), np.uint8)
    images[: len(pixels)] = list(pixels.values())
    with activated(self._partitioner):
      if self._partitioner is not None:
        images = self._partitioner.place_rows({"images": images})["images"]
      vectors = np.asarray(_vectors(self._model, self._params, images), np.float32)
    made = {key: vector.copy() for key, vector in zip(pixels, vectors)}  # views would hold them all
    self.num_encoded += len(made)
    for key, vector in made.items():
      self._cache[key] = vector
      self._held_bytes += vector.nbytes
    while self._held_bytes > self._cache_bytes:
      _, oldest = self._cache.popitem(last=False)
      self._held_bytes -= oldest.nbytes
    return made

  def prompts(self, rows: Sequence[Encoded]) -> list[Prompt]:
    """Prompts with the vectors of their pictures; the array of a single picture is not copied.

    Raises:
      ValueError: as `__call__`.
    """
    vectors = iter(self([picture for row in rows for picture in row.pictures]))
    return [_with_vectors(row, [next(vectors) for _ in row.pictures]) for row in rows]


@functools.partial(jax.jit, static_argnums=0)
def _vectors(model, params, images):
  """`[B,slots,W]`; encoders of equal models share the program."""
  return model.apply({"params": params}, images, method="image_vectors")


def _with_vectors(row: Encoded, vectors: list[np.ndarray]) -> Prompt:
  if not vectors:
    return Prompt(row.tokens.tolist())
  table = vectors[0] if len(vectors) == 1 else np.concatenate(vectors)
  return Prompt(row.tokens.tolist(), table, row.vectors)
