"""Pictures and texts to numbers in one compiled program: CLIP's two towers and the aesthetic head.

Pictures go in as bytes of any one size; per picture a cosine and a rating come out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding.results import on_host
from lmops_jax.mesh.meshes import Partitioner, activated, shards_of
from lmops_jax.models.aesthetic import Folded, rate
from lmops_jax.models.clip import Clip
from lmops_jax.models.pixels import normalise, resized_middle
from lmops_jax.text.clip import ClipTexts, cleaned, clip_texts


class Ratings(NamedTuple):
  """Numbers of the pictures of P prompts, n of each, on the host.

  Attributes:
    cosine: `[P,n] float32` of picture and text, -1 .. 1.
    aesthetic: `[P,n] float32`.
    cut: of each text the end that was too much for CLIP, else empty.
  """

  cosine: np.ndarray
  aesthetic: np.ndarray
  cut: list[str]


def ratings(model: Clip, params, head: Folded, images: jax.Array, tokens: jax.Array) -> jax.Array:
  """Cosines and ratings; a pure function.

  Args:
    model: both towers.
    params: its parameters.
    head: of the width of CLIP's common space.
    images: `[P,n,height,width,3] uint8`.
    tokens: `[P,S] int32`, of `clip_texts`.

  Returns:
    `[2,P,n] float32`.
  """
  vision = model.config.vision
  shape = images.shape[:2]
  pixels = normalise(
    resized_middle(images.reshape(-1, *images.shape[2:]), vision.image_size),
    vision.pixel_mean, vision.pixel_std)
  pictures = model.apply({"params": params}, pixels, method="image_features")
  texts = model.apply({"params": params}, tokens, method="text_features")
  cosine = jnp.einsum(
    "pnd,pd->pn", pictures.reshape(*shape, -1), texts, precision=jax.lax.Precision.HIGHEST)
  return jnp.stack([cosine, rate(head, pictures).reshape(shape)])


class Rater:
  """Rates pictures with one program for each size of picture.

  Attributes:
    num_rows: prompts of a call of the program; fewer are filled up.
  """

  def __init__(
    self, model: Clip, params, head: Folded, tokenizer, partitioner: Partitioner | None = None, *,
    num_rows: int = 8,
  ):
    """
    Args:
      model, params: CLIP, its parameters on the partitioner's mesh.
      head: the folded aesthetic predictor.
      tokenizer: CLIP's.
      partitioner: mesh of this process whose batch axes the prompts are split over; None is the
        default device.
      num_rows: prompts of a call, rounded up to a multiple of the mesh's shards.

    Raises:
      ValueError: a head for vectors of another width.
    """
    width, = head.kernel.shape
    if width != model.config.projection_width:
      raise ValueError(
        f"the aesthetic predictor takes vectors of {width} numbers and CLIP gives "
        f"{model.config.projection_width}; take the CLIP model that it was trained on (ViT-L/14)."
      )
    shards = shards_of(partitioner)
    self.num_rows = -(-num_rows // shards) * shards
    self._params, self._head, self._tokenizer = params, head, tokenizer
    self._partitioner, self._length = partitioner, model.config.text.max_length
    self._program = jax.jit(functools.partial(ratings, model))

  def cut(self, texts: Sequence[str]) -> list[str]:
    """Of each text, cleaned, the end that is too much for CLIP; empty if all of it is read."""
    return self._read(texts).cut

  def __call__(self, images: np.ndarray, texts: Sequence[str]) -> Ratings:
    """Rates pictures against texts.

    Args:
      images: `[P,n,height,width,3] uint8`.
      texts: P of them.

    Raises:
      ValueError: another number of texts, or pixels that are not uint8.
    """
    images = np.asarray(images)
    if len(images) != len(texts) or images.ndim != 5:
      raise ValueError(
        f"pictures of shape {list(images.shape)} are to be rated against {len(texts)} texts; give "
        "[texts, pictures of each, height, width, 3]."
      )
    tokens, cut = self._read(texts)
    found = [
      self._rated(images[i : i + self.num_rows], tokens[i : i + self.num_rows])
      for i in range(0, len(images), self.num_rows)]
    cosine, aesthetic = np.concatenate(found, axis=1) if found else np.zeros((2, *images.shape[:2]))
    return Ratings(cosine, aesthetic, cut)

  def _read(self, texts: Sequence[str]) -> ClipTexts:
    return clip_texts(self._tokenizer, [*map(cleaned, texts)], self._length)

  def _rated(self, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    num = len(images)
    rows = {"images": _filled(images, self.num_rows), "tokens": _filled(tokens, self.num_rows)}
    if self._partitioner is not None:
      rows = self._partitioner.place_rows(rows)
    with activated(self._partitioner):
      found = self._program(self._params, self._head, rows["images"], rows["tokens"])
    return on_host(found)[:, :num]


def _filled(rows: np.ndarray, num: int) -> np.ndarray:
  """The rows and copies of the last one, `num` in all."""
  return np.concatenate([rows, np.repeat(rows[-1:], num - len(rows), axis=0)])
