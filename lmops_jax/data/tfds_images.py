"""Pictures of a tfds dataset, by name: with captions, with the names of classes, or alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lmops_jax.config.setting_types import Text, component
from lmops_jax.data.documents import document_id
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Picture, Record
from lmops_jax.data.named_datasets import Tfds, as_text, feature_at


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TfdsImages(ImageCorpus):
  """Pairs of a picture and a text; a row with several captions gives a pair for each.

  Attributes:
    dataset: the dataset; only its name, split, folder and download are used.
    image_field: the feature with the picture.
    text_field: the feature with the text, texts, or class, whose name then is the text; `/` leads
      into nested ones ("captions/text").
  """

  dataset: Tfds
  image_field: Text = "image"
  text_field: Text = "caption"

  def fingerprint(self) -> str:
    return f"{self.dataset.fingerprint()}-{self.image_field}-{self.text_field}"

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    names = self._class_names(tfds)
    features = self.dataset.builder.info.features
    if self.image_field not in features:
      raise ValueError(
        f"the tfds dataset {self.dataset.name!r} has no feature {self.image_field!r} (there are "
        f"{', '.join(sorted(features))}); set data.TfdsImages.image_field to one of them."
      )
    title = f"{self.dataset.builder.info.full_name}[{self.dataset.split}]"
    for row, example in enumerate(undecoded(self.dataset)):
      where = f"{title}:{row}"
      data = feature_at(example, self.image_field, where, "data.TfdsImages.image_field")
      texts = feature_at(example, self.text_field, where, "data.TfdsImages.text_field")
      several = np.ndim(texts) > 0
      for number, value in enumerate(texts if several else [texts]):
        source = f"{where}#{number}" if several else where
        if names is not None:
          value = names(int(value))
        text = as_text(value, left_out.counts)
        if text is not None:
          text = text.strip()
          parts = (Picture(where, data=bytes(data)), *([text] if text else []))
          yield Record(document_id(source), parts, 0, source)

  def _class_names(self, tfds):
    """`number -> name`, if the text is that of a class."""
    feature_of = self.dataset.builder.info.features
    for part in self.text_field.split("/"):
      try:
        feature_of = feature_of[part]
      except (KeyError, TypeError):
        return None  # `read` says what is missing
    return feature_of.int2str if isinstance(feature_of, tfds.features.ClassLabel) else None


class StoredPicture(NamedTuple):
  """A picture in a dataset with random access, which is read when it is needed, as a `Picture` is.

  Attributes:
    where: names it in errors.
    dataset: with its split.
    row: in storage order.
    field: the feature with the picture.
  """

  where: str
  dataset: Tfds
  row: int
  field: str = "image"

  def read(self) -> bytes:
    """The contents of the picture's file."""
    return bytes(_opened(self.dataset)[self.row][self.field])


def undecoded(dataset: Tfds):
  """The examples of a dataset as `Tfds.examples` gives them, pictures as their files' contents."""
  import tensorflow_datasets as tfds

  class Undecoded(tfds.decode.SkipDecoding):
    """Also within sequences that are read without TensorFlow."""

    def decode_batch_example_np(self, contents):
      return contents

  def decoders(features) -> dict:
    found = {}
    for name, feature in features.items():
      inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
      if isinstance(inner, tfds.features.Image):
        found[name] = Undecoded()
      elif isinstance(inner, tfds.features.FeaturesDict):
        found |= {name: below} if (below := decoders(inner)) else {}
    return found

  return dataset.examples(decoders(dataset.builder.info.features))


_opened = functools.lru_cache(maxsize=8)(undecoded)
