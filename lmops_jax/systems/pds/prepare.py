"""Stage `prepare`: raw text to a vocabulary and packed, indexed instances (PDS, section 4 and 5).

The corpus is read twice, once for a sample to train the vocabulary on and once to tokenise and
pack, so memory does not grow with it. Documents keep their ids; an instance's id tells where it
begins (`packing.instance_id`), its index is its row number in corpus order. Kind labels go into a
file of their own that only the report opens.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.config.setting_types import (
  Count,
  Part,
  PositiveInt,
  Seed,
  at_least,
  component,
)
from lmops_jax.data import documents as documents_lib
from lmops_jax.data import instance_writing, near_duplicates, packing
from lmops_jax.data import instances as instances_lib
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline
from lmops_jax.text.vocabulary_sources import VocabularySource

LABELS_FILE = "labels.jsonl"  # document id, kind, source: read by the report alone
STATISTICS_FILE = "statistics.json"


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Prepare:
  """What text to use and how to cut it.

  Attributes:
    corpus: the corpus to select from (`data.InstalledText`, `data.Jsonl`, ...).
    target: the trusted text whose loss is to fall; split by document into dev and test.
    vocabulary: a vocabulary of module `data`: trained here, or an existing file.
    length: tokens of an instance's input, `S`; `S + 1` are stored.
    target_test: text of the test part; None takes `test_fraction` of the target's documents.
    test_fraction: share of the target's documents that become the test part.
    sentence_ends: cut instances back to the last sentence end, as the paper's code does.
    pack_target: pack the target like the corpus; False makes one instance of each document, as the
      paper does, so that every document counts once in J; what exceeds the length is cut, counted.
    num_held_out: instances at the corpus's end that are never selected (corpus loss).
    max_target_instances: most instances of each target part; the rest is counted as unused.
    seed: of the target's split.
  """

  corpus: documents_lib.Corpus
  target: documents_lib.Corpus
  vocabulary: VocabularySource
  length: at_least(2) = 128
  target_test: documents_lib.Corpus | None = None
  test_fraction: Part = 0.5
  sentence_ends: bool = False
  pack_target: bool = True
  num_held_out: Count = 256
  max_target_instances: PositiveInt | None = None
  seed: Seed = 0


@dataclasses.dataclass
class Totals:
  """What is known of the corpus once it is packed."""

  num_documents: int = 0
  num_tokens: int = 0
  num_characters: int = 0
  overlaps: list[dict[str, str]] = dataclasses.field(default_factory=list)


class Packed(NamedTuple):
  """What `write_corpus` tells of its work; `left_out` counts documents by reason."""

  num_instances: int
  num_held_out: int
  totals: Totals
  left_out: collections.Counter[str]


def write_corpus(context: pipeline.StageContext, config: Prepare, targets) -> Packed:
  """Writes vocabulary, labels, corpus and held_out.

  Args:
    targets: documents that the corpus must not repeat.
  """
  out = context.directory
  left_out: collections.Counter[str] = collections.Counter()
  vocabulary = corpora.build_vocabulary(
    context, config.vocabulary, (d.text for d in config.corpus.documents(left_out)))
  index = near_duplicates.OverlapIndex(targets)
  held_out: collections.deque[packing.Instance] = collections.deque()
  totals = Totals()
  left_out.clear()
  with (out / LABELS_FILE).open("w", encoding="utf-8") as labels:
    kept = without_overlap(config.corpus.documents(left_out), index, totals, labels)
    packed = _pack(kept, vocabulary, config, totals)
    with context.progress(None, "instances", "packing") as bar:
      num_corpus = instance_writing.write_encoded(
        out / "corpus", _hold_back(packed, held_out, config.num_held_out, bar), vocabulary,
        config.length,
      )
  check_corpus(num_corpus, totals, config)
  instance_writing.write_encoded(out / "held_out", held_out, vocabulary, config.length)
  return Packed(num_corpus, len(held_out), totals, left_out)


def run(context: pipeline.StageContext, config: Prepare, *, write_corpus=write_corpus) -> None:
  """Writes vocabulary, corpus, held_out, target_dev, target_test, labels and statistics.

  Args:
    write_corpus: does all but the target, in this process unless another is given.
  """
  out = context.directory
  statistics: dict[str, Any] = {}
  target_dev, target_test = _target_documents(config, statistics)
  context.log(f"target: {len(target_dev)} documents for dev, {len(target_test)} for test")
  corpora.log_left_out(
    context, corpus=config.corpus, target=config.target, target_test=config.target_test)

  packed = write_corpus(context, config, [*target_dev, *target_test])
  totals, vocabulary = packed.totals, corpora.open_vocabulary(out)
  statistics["corpus"] = {
    "num_documents": totals.num_documents,
    "num_instances": packed.num_instances,
    "num_held_out": packed.num_held_out,
    "num_tokens": totals.num_tokens,
    "num_characters": totals.num_characters,
    "dropped": dict(sorted(packed.left_out.items())),
    "overlaps_with_target": totals.overlaps,
  }
  for name, part in (("target_dev", target_dev), ("target_test", target_test)):
    statistics[name] = _write_target(out / name, part, vocabulary, config)
  (out / STATISTICS_FILE).write_text(json.dumps(statistics, indent=1, sort_keys=True) + "\n")
  context.extra["statistics"] = statistics
  if totals.overlaps:
    context.log(
      f"{len(totals.overlaps)} corpus documents share their text with the target and were left "
      f"out; {STATISTICS_FILE} names them"
    )


def check_corpus(num_instances: int, totals: Totals, config: Prepare) -> None:
  """Refuses a corpus of which nothing remains."""
  if num_instances <= 0:
    raise ValueError(
      f"the corpus holds {totals.num_documents} usable documents, too few for one instance beside "
      f"pds.Prepare.num_held_out={config.num_held_out}; give it more text or hold out less."
    )


def _target_documents(config: Prepare, statistics: dict[str, Any]):
  dropped: collections.Counter[str] = collections.Counter()
  documents = list(config.target.documents(dropped))
  if config.target_test is not None:
    dev, test = documents, list(config.target_test.documents(dropped))
  else:
    test, dev = documents_lib.split_documents(documents, config.test_fraction, config.seed)
  statistics["target"] = {"dropped": dict(sorted(dropped.items()))}
  return dev, test


def without_overlap(documents, index, totals: Totals, labels):
  """Passes on what the target does not hold too; counts it and writes its labels."""
  for document in documents:
    match = index.find(document)
    if match is not None:
      totals.overlaps.append({"corpus": document.source, "target": match.source})
      continue
    totals.num_documents += 1
    totals.num_characters += len(document.text)
    json.dump({"id": document.id, "kind": document.kind, "source": document.source}, labels)
    labels.write("\n")
    yield document


def packing_settings(vocabulary, config: Prepare) -> dict[str, Any]:
  """How the corpus is cut: arguments of `packing.pack`."""
  return {
    "length": config.length, "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id,
    "sentence_end": packing.sentence_end_table(vocabulary) if config.sentence_ends else None,
  }


def _pack(documents, vocabulary, config: Prepare, totals: Totals) -> Iterator[packing.Instance]:
  encoded = packing.encoded(documents, vocabulary)
  for instance in packing.pack(encoded, **packing_settings(vocabulary, config)):
    totals.num_tokens += len(instance.tokens)
    yield instance


def _hold_back(instances, held_out, num: int, bar) -> Iterator[packing.Instance]:
  """Passes all but the last `num` instances on and leaves those in `held_out`."""
  for instance in instances:
    bar.update()
    held_out.append(instance)
    if len(held_out) > num:
      yield held_out.popleft()


def _write_target(directory: Path, documents, vocabulary, config: Prepare) -> dict[str, int]:
  """Writes a target part, without sentence cuts; what exceeds a limit is counted, not hidden."""
  cut: collections.Counter[str] = collections.Counter()
  if config.pack_target:
    packed = list(corpora.pack(documents, vocabulary, config.length))
  else:
    packed = list(packing.one_per_document(
      packing.encoded(documents, vocabulary), length=config.length, counts=cut,
      bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id))
  order = np.random.default_rng(config.seed).permutation(len(packed))
  kept = np.sort(order[: config.max_target_instances])
  num = instance_writing.write_encoded(
    directory, (packed[i] for i in kept), vocabulary, config.length
  )
  return {
    "num_documents": len(documents), "num_instances": num, "num_unused": len(packed) - num,
    **cut,
  }


class Prepared:
  """The finished folder of `prepare`, opened part by part.

  `target_test` and `labels` are for the evaluation and the report; no stage before them opens them.
  """

  def __init__(self, directory: Path):
    self.directory = directory

  @property
  def vocabulary(self):
    return corpora.open_vocabulary(self.directory)

  @property
  def corpus(self) -> instances_lib.Instances:
    return instances_lib.open_instances(self.directory / "corpus")

  @property
  def held_out(self) -> instances_lib.Instances:
    return instances_lib.open_instances(self.directory / "held_out")

  @property
  def target_dev(self) -> instances_lib.Instances:
    return instances_lib.open_instances(self.directory / "target_dev")

  @property
  def target_test(self) -> instances_lib.Instances:
    return instances_lib.open_instances(self.directory / "target_test")

  def labels(self) -> dict[int, tuple[str, str]]:
    """Document id to (kind, source)."""
    with (self.directory / LABELS_FILE).open(encoding="utf-8") as lines:
      rows = map(json.loads, lines)
      return {row["id"]: (row["kind"], row["source"]) for row in rows}

  def statistics(self) -> dict[str, Any]:
    return json.loads((self.directory / STATISTICS_FILE).read_text())
