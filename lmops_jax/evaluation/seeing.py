"""Contexts with pictures for scoring options: `in_context.Encoder` for a docked language model.

The texts between pictures are encoded one by one, without the blanks and line ends beside a
picture, as `data.multimodal` lays prompts out. Options follow the last text, or the last picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.multimodal import IMAGE, Picture, parts_of
from lmops_jax.data.tfds_images import StoredPicture
from lmops_jax.decoding.image_prompts import (
  PictureEncoder,
  check_fits,
  laid_out,
  most_pictures,
)
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import Request
from lmops_jax.evaluation.in_context import Encoder, check_options


def picture_at(path: str | Picture | StoredPicture) -> Picture | StoredPicture:
  """The picture of a task's row, by its path; one that is a picture already as it is."""
  if not isinstance(path, str):
    return path
  return Picture(path, os.path.abspath(os.path.expanduser(path)))


class SeeingEncoder(Encoder):
  """Contexts with pictures, whose vectors are made once, and options to what `OptionScorer` takes.

  Args:
    tokenizer: the model's.
    ids: of `decoding.image_prompts.image_tokens`.
    pictures: makes the vectors.
    max_length: positions of the model; demonstrations without room are left out.
  """

  sees = True
  rows_at_once = 256  # the vectors of all rows at once may be too many

  def __init__(
    self, tokenizer, ids: ImageTokens, pictures: PictureEncoder, max_length: int
  ):
    super().__init__(tokenizer, max_length=max_length)
    self._ids, self._pictures = ids, pictures
    self.most_images = most_pictures(ids, max_length)
    self._behind = Encoder(tokenizer, start=())

  def read(self, images: Sequence[str | Picture]) -> None:
    """Makes the vectors of pictures together, as far as the cache holds them."""
    self._pictures([picture_at(path) for path in images])

  def split(
    self, context: str, options: Sequence[str], images: Sequence[str | Picture] = ()
  ) -> Request:
    """As `Encoder.split`.

    Args:
      images: the pictures that stand for each `<image>` of the context, or their paths.

    Raises:
      ValueError: another number of pictures than places, more than the model has room for, one that
        cannot be read, or options without tokens or of the same ones.
    """
    if not images:
      return super().split(context, options)
    front, place, last = context.rpartition(IMAGE)
    parts, _ = parts_of(front + place, [picture_at(path) for path in images], "a context")
    row = laid_out(parts, self._tokenizer, self._ids)
    check_fits(row, self._ids, self.max_length, "a context")
    seen, = self._pictures.prompts([row])
    behind = self._behind.split(last.lstrip(), options)
    check_options(behind, options, "option")
    index = np.concatenate([row.vectors, np.full(len(behind.context), -1, np.int32)])
    return behind._replace(
      context=Prompt([*seen.ids, *behind.context], seen.vectors, index))
