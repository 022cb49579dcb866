"""GrIT's rows as pairs to train on: a picture and its caption, with boxes or without.

From the code of Kosmos-2 (arXiv:2306.14824): which regions of a row become stretches with boxes,
and how often. What cropping makes of the boxes is decided later, by `grounded_text.fitted`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from lmops_jax.config.setting_types import Probability, Seed, component
from lmops_jax.data.documents import document_id
from lmops_jax.data.grit.files import GritCorpus, GritExample
from lmops_jax.data.grit.spans import confident, merged, outermost
from lmops_jax.data.grounded_text import Located, trimmed
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record
from lmops_jax.host.hashing import order_key

MODES = ("expression", "phrase")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class GroundedPairs(ImageCorpus):
  """Pictures with captions that tell where things are.

  Attributes:
    corpus: GrIT's rows.
    mode: "expression", the referring expressions that lie in no other one; or "phrase", all noun
      chunks.
    min_score: regions whose score is not above it are left out.
    probability: of a caption with boxes; else it is plain. It depends on (seed, id) alone.
    seed: seed of that choice.
  """

  corpus: GritCorpus
  mode: Literal[MODES] = "expression"
  min_score: float = 0.65
  probability: Probability = 0.5
  seed: Seed = 0

  def fingerprint(self) -> str:
    return (f"{self.corpus.fingerprint()}-{self.mode}-{self.min_score}-{self.probability}-"
            f"{self.seed}")

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    """The pairs. `left_out` also gets regions of a "low_score", stretches "inside" others and
    those that are "crossing", and captions "drawn_plain" and "without_region"."""
    for example in self.corpus.examples(left_out):
      text = trimmed(example.row.caption, self._spans(example, left_out))
      text = text if text.spans else str(text)
      parts = (example.picture, text) if text else (example.picture,)
      yield Record(example.id, parts, 0, example.source)

  def _spans(self, example: GritExample, left_out: LeftOut) -> list[Located]:
    if draw(example.id, "grounded", self.seed) >= self.probability:
      left_out.counts["drawn_plain"] += 1
      return []
    row = example.row
    regions = row.ref_exps if self.mode == "expression" else row.noun_chunks
    spans = chosen(
      regions, left_out, min_score=self.min_score, only_outermost=self.mode == "expression")
    if not spans:
      left_out.counts["without_region"] += 1
    return spans


def chosen(regions, left_out: LeftOut, *, min_score: float, only_outermost: bool) -> list[Located]:
  """The stretches that are shown with boxes, and counts of the others, see `GroundedPairs.read`."""
  sure = confident(regions, min_score)
  outer = outermost(sure) if only_outermost else sure
  spans, num_crossing = merged(outer)
  for reason, num in (("low_score", len(regions) - len(sure)), ("inside", len(sure) - len(outer)),
                      ("crossing", num_crossing)):
    if num:
      left_out.counts[reason] += num
  return spans


def draw(identifier: int, what: str, seed: int) -> float:
  """A number in [0, 1) from (seed, id), another one for each thing that is drawn."""
  return (order_key(document_id(f"{what}:{identifier}"), seed) >> 11) * 2.0**-53
