"""Stage `texts`: a corpus as packed instances, and unseen text packed at several lengths.

Documents are split by a hash of (seed, id), so the same ones stay unseen in every run. The corpus
is read twice, for the vocabulary with the validation part and for the instances; memory does not
grow with it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from annotated_types import MultipleOf

from lmops_jax.config.setting_types import ByteCount, Part, Seed, at_least, component
from lmops_jax.data import instance_writing, near_duplicates
from lmops_jax.data import instances as instances_lib
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.host.hashing import order_key
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline
from lmops_jax.text.vocabulary_sources import VocabularySource


@component(module="momentum")
@dataclasses.dataclass(frozen=True)
class Texts:
  """What text to use and how to cut it.

  Attributes:
    corpus: a corpus of module `data` (`data.InstalledText`, `data.Jsonl`, ...).
    vocabulary: a vocabulary of module `data`: trained here, or an existing file.
    length: tokens of a training instance, a multiple of 4; validation is packed at a quarter, a
      half and all of it.
    validation_fraction: share of the documents that are never trained on.
    validation_bytes: most text of the validation part; further documents of it go unused, counted.
    seed: of the split.
  """

  corpus: Corpus
  vocabulary: VocabularySource
  length: Annotated[at_least(8), MultipleOf(4)] = 256
  validation_fraction: Part = 0.02
  validation_bytes: ByteCount = 200_000
  seed: Seed = 0

  def lengths(self) -> tuple[int, ...]:
    """Of the validation instances, ascending."""
    return self.length // 4, self.length // 2, self.length


def is_unseen(document: Document, fraction: float, seed: int) -> bool:
  """Whether a document belongs to the share that is never trained on."""
  # Hashed twice: a corpus that takes a part of its documents takes those with the smallest key.
  return order_key(order_key(document.id, seed), seed) < fraction * 2.0**64


def run(context: pipeline.StageContext, config: Texts) -> None:
  """Writes vocabulary, train and validation/<length>."""
  out = context.directory
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
      f"momentum.Texts.validation_fraction={config.validation_fraction}."
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

  num_train = corpora.write_packed(
    context, "train", second_reading(), vocabulary, config.length)
  statistics = {
    "train_instances": num_train, "train_tokens": num_train * config.length,
    "validation_documents": len(unseen), "validation_bytes": num_bytes, **counts,
    "dropped": dict(sorted(dropped.items())),
  }
  for length in config.lengths():
    statistics[f"validation_instances_{length}"] = instance_writing.write_encoded(
      out / "validation" / str(length), corpora.pack(unseen, vocabulary, length), vocabulary,
      length,
    )
  context.extra["statistics"] = statistics
  told = {key: value for key, value in statistics.items() if key != "dropped"}
  told |= {f"documents or files left out ({why})": num for why, num in dropped.items()}
  context.log(", ".join(f"{value} {key}" for key, value in told.items()))


class Prepared:
  """The finished folder of `texts`."""

  def __init__(self, directory: Path):
    self.directory = directory

  @property
  def vocabulary(self):
    return corpora.open_vocabulary(self.directory)

  @property
  def train(self) -> instances_lib.Instances:
    return instances_lib.open_instances(self.directory / "train")

  def validation(self, length: int) -> instances_lib.Instances:
    return instances_lib.open_instances(self.directory / "validation" / str(length))
