"""Preparing a corpus, as stages of any system do it: what is left out, vocabulary, instances."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from lmops_jax.data import instance_writing, matching, packing
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.stages import pipeline
from lmops_jax.text import vocabularies
from lmops_jax.text.vocabulary_sources import VocabularySource

VOCABULARY_FOLDER = "vocabulary"


def log_left_out(context: pipeline.StageContext, **corpora: Corpus | None) -> None:
  """Tells which files and folders lie beside what is read, by the names of the settings."""
  for name, corpus in corpora.items():
    for line in [] if corpus is None else matching.left_out_lines(corpus.left_out()):
      context.log(f"{name}: {line}")


def build_vocabulary(
  context: pipeline.StageContext, source: VocabularySource, texts: Iterable[str]
) -> vocabularies.Vocabulary:
  """Writes the vocabulary into the stage and opens it. Reads no more texts than it needs."""
  source.build(texts, context.directory / VOCABULARY_FOLDER)
  vocabulary = open_vocabulary(context.directory)
  context.log(f"vocabulary: {vocabulary.vocab_size} pieces")
  return vocabulary


def open_vocabulary(folder: Path) -> vocabularies.Vocabulary:
  """The vocabulary that a finished stage has built."""
  return vocabularies.load_vocabulary(folder / VOCABULARY_FOLDER)


def pack(
  documents: Iterable[Document], vocabulary: vocabularies.Vocabulary, length: int
) -> Iterable[packing.Instance]:
  """Instances of `length` predicted tokens, in the documents' order."""
  return packing.pack(
    packing.encoded(documents, vocabulary), length=length, bos_id=vocabulary.bos_id,
    eos_id=vocabulary.eos_id)


def write_packed(
  context: pipeline.StageContext, part: str, documents: Iterable[Document],
  vocabulary: vocabularies.Vocabulary, length: int, *, most: int | None = None,
) -> int:
  """Packs documents into the stage's folder `part`; returns how many instances, `most` at most."""
  with context.progress(most, "instances", "packing") as bar:

    def shown():
      for instance in itertools.islice(pack(documents, vocabulary, length), most):
        bar.update()
        yield instance

    return instance_writing.write_encoded(context.directory / part, shown(), vocabulary, length)
