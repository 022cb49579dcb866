"""Web pages with pictures among their text, chosen as for Kosmos-1 (kosmos1 section 5).

Left to whoever makes the corpus: choosing English pages and those without spam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Probability, Seed, component
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record, tried
from lmops_jax.host.hashing import order_key


@component(module="data")
@dataclasses.dataclass(frozen=True)
class WebPages(ImageCorpus):
  """Documents of another corpus, without pictures that show nothing.

  Left out are pictures that cannot be read or are too small ("unreadable"), or of one colour
  ("one_colour"); then pages without any picture ("no_picture"), and of those with a single one a
  share ("single_picture"), by (seed, id). `write_rows` limits the pictures of a page.

  Attributes:
    corpus: the pages.
    images: how pictures are tried; `min_side` is the least that they may have.
    single_share: of the pages with one picture, how many are kept.
    seed: of that choice.
    num_threads: that decode; no result depends on it.
  """

  corpus: ImageCorpus
  images: ImageSettings = ImageSettings(min_side=64)
  single_share: Probability = 0.5
  seed: Seed = 0
  num_threads: PositiveInt = dataclasses.field(default=8, repr=False)

  def fingerprint(self) -> str:
    own = dataclasses.replace(self, num_threads=1)
    return f"{self.corpus.fingerprint()}-{own.images}-{own.single_share}-{own.seed}"

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    records = self.corpus.read(left_out)
    for record, pixels in tried(
      records, self.images, left_out.counts, num_threads=self.num_threads):
      record = self._without_empty_pictures(record, pixels, left_out)
      num_pictures = len(record.pictures)
      if not num_pictures:
        left_out.add("no_picture", record.source)
      elif num_pictures == 1 and order_key(record.id, self.seed) >= self.single_share * 2**64:
        left_out.add("single_picture", record.source)
      else:
        yield record

  def _without_empty_pictures(self, record: Record, pixels, left_out: LeftOut) -> Record:
    rest, parts, num_given = iter(pixels), [], record.num_given
    for number, part in enumerate(record.parts):
      if not isinstance(part, str):
        found = next(rest)
        if isinstance(found, str):
          reason, what = "unreadable", found
        elif np.ptp(found, axis=(0, 1)).max() == 0:
          reason, what = "one_colour", part.where
        else:
          reason = None
        if reason is not None:
          left_out.add(reason, what)
          num_given -= number < record.num_given
          continue
      parts.append(part)
    return record._replace(parts=tuple(parts), num_given=num_given)
