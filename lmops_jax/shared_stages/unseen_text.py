"""A corpus as packed instances to train on, and documents that no model is trained on.

Documents are split by a hash of (seed, id), so the same ones stay unseen in every run. The corpus
is read twice, first for the vocabulary and the unseen part, then for the training instances; memory
does not grow with it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lmops_jax.config.setting_types import ByteCount, Part, PositiveInt, Seed
from lmops_jax.data import near_duplicates
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.data.instances import Instances, open_instances
from lmops_jax.host.hashing import order_key
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.text.vocabulary_sources import VocabularySource

_TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class SplitTexts:
  """What text to use and how to cut it. Settings of systems extend it, under a name of their own.

  Attributes:
    corpus: a corpus of gin module `data` (`data.InstalledText`, `data.Jsonl`, ...).
    vocabulary: a vocabulary of gin module `data`: trained here, or an existing file.
    length: tokens of a training instance.
    validation_fraction: share of the documents that are never trained on.
    validation_bytes: the most text of the validation part; its other documents are counted and not
      used.
    seed: seed of the split.
  """

  setting: ClassVar[str] = "training.SplitTexts"  # its name in gin files, for messages

  corpus: Corpus
  vocabulary: VocabularySource
  length: PositiveInt = 256
  validation_fraction: Part = 0.02
  validation_bytes: ByteCount = 200_000
  seed: Seed = 0


class Split(NamedTuple):
  """What `write` made.

  Attributes:
    vocabulary: of all texts. unseen: the documents for validation.
    statistics: counts of instances and documents, of those left out too.
  """

  vocabulary: Vocabulary
  unseen: list[Document]
  statistics: dict[str, Any]


def is_unseen(document: Document, fraction: float, seed: int) -> bool:
  """Whether a document belongs to the share that is never trained on."""
  # Hashed twice, since a corpus cut to a part of its documents keeps those with the smallest keys.
  return order_key(order_key(document.id, seed), seed) < fraction * 2.0**64


def write(context: pipeline.StageContext, config: SplitTexts) -> Split:
  """Writes the vocabulary and the training instances, without what overlaps with unseen documents.

  Raises:
    ValueError: a corpus without a document for validation.
  """
  unseen_part = functools.partial(
    is_unseen, fraction=config.validation_fraction, seed=config.seed)
  counts: collections.Counter[str] = collections.Counter()
  dropped: collections.Counter[str] = collections.Counter()
  unseen: list[Document] = []
  num_bytes = 0

  def first_reading() -> Iterator[str]:
    nonlocal num_bytes
    for document in config.corpus.documents(dropped):
      if not unseen_part(document):
        yield document.text
      elif num_bytes < config.validation_bytes:
        unseen.append(document)
        num_bytes += len(document.text.encode())

  reading = first_reading()
  vocabulary = corpora.build_vocabulary(context, config.vocabulary, reading)
  for _ in reading:  # a vocabulary reads no more than it needs
    if num_bytes >= config.validation_bytes:
      break
  if not unseen:
    raise ValueError(
      "the corpus has no document for validation; give it more documents or raise "
      f"{config.setting}.validation_fraction={config.validation_fraction}."
    )
  context.log(f"{len(unseen)} validation documents")
  corpora.log_left_out(context, corpus=config.corpus)
  index, used = near_duplicates.OverlapIndex(unseen), {document.id for document in unseen}

  def second_reading() -> Iterator[Document]:
    dropped.clear()
    for document in config.corpus.documents(dropped):
      if unseen_part(document):
        counts["unused_documents"] += document.id not in used
      elif index.find(document) is not None:
        counts["overlaps_with_validation"] += 1
      else:
        counts["train_documents"] += 1
        yield document

  num_train = corpora.write_packed(context, _TRAIN, second_reading(), vocabulary, config.length)
  return Split(vocabulary, unseen, {
    "train_instances": num_train, "train_tokens": num_train * config.length,
    "validation_documents": len(unseen), "validation_bytes": num_bytes, **counts,
    "dropped": dict(sorted(dropped.items())),
  })


def keep_statistics(context: pipeline.StageContext, statistics: Mapping[str, Any]) -> None:
  """Puts statistics into the stage's manifest and its log."""
  context.extra["statistics"] = dict(statistics)
  told = {key: value for key, value in statistics.items() if key != "dropped"}
  told |= {
    f"documents or files left out ({why})": num for why, num in statistics["dropped"].items()}
  context.log(", ".join(f"{value} {key}" for key, value in told.items()))


class Prepared:
  """The finished folder of a stage that called `write`."""

  def __init__(self, directory: Path):
    self.directory = Path(directory)

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """That of all texts."""
    return corpora.open_vocabulary(self.directory)

  @functools.cached_property
  def train(self) -> Instances:
    """The instances to train on."""
    return open_instances(self.directory / _TRAIN)
