"""A corpus in sorted buckets: documents, then their tokens, then instances in shards.

Bucket b of n holds the documents whose order key lies in the b-th n-th of all keys, in order, so
that all buckets one after another are the corpus in the order of `Corpus.documents`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lmops_jax.data import documents as documents_lib
from lmops_jax.data import packing
from lmops_jax.data.distributed import chains
from lmops_jax.data.distributed.engine import Engine
from lmops_jax.host import seals
from lmops_jax.host.hashing import order_key


@dataclasses.dataclass(frozen=True)
class Buckets:
  """The files of a corpus's buckets.

  Attributes:
    folder: a folder that every worker can read and write; it is made if it is missing.
    count: number of buckets.
  """

  folder: Path
  count: int

  def __post_init__(self):
    self.folder.mkdir(parents=True, exist_ok=True)

  def path(self, what: str, number: int) -> Path:
    """The file of a bucket, or of a piece for what reading leaves."""
    return self.folder / f"{what}-{number:06d}"

  def missing(self, *what: str) -> list[int]:
    """Buckets that lack one of these files, or have one that is not as it was written."""
    whole = seals.all_whole([self.path(name, n) for name in what] for n in range(self.count))
    return [n for n in range(self.count) if not whole[n]]

  # --- documents ---------------------------------------------------------------------------------

  def sort(self, corpus: documents_lib.Corpus, engine: Engine, counts: Counter[str]) -> None:
    """Reads the corpus piece by piece and writes its documents in order.

    Args:
      counts: gets the number of documents left out, by reason.

    Raises:
      ValueError: for no usable document, or two documents with one id.
    """
    pieces = list(enumerate(corpus.pieces()))
    missing = self.missing("documents")
    if missing or not all(seals.all_whole([self.path("piece", n)] for n, _ in pieces)):
      for bucket in missing:
        self.path("documents", bucket).unlink(missing_ok=True)
      engine.group(
        functools.partial(_read_piece, self), pieces,
        functools.partial(_write_documents, self, str(corpus)),
      )
      for bucket in range(self.count):
        if not self.path("documents", bucket).exists():
          _write_documents(self, str(corpus), bucket, ())
    num_read = 0
    for number, _ in pieces:
      piece = json.loads(self.path("piece", number).read_text())
      num_read += piece["num_documents"]
      counts.update(piece["left_out"])
    num_written = 0
    for bucket in range(self.count):
      with self.path("documents", bucket).open("rb") as file:
        num_written += pickle.load(file)
    if num_written != num_read:
      for bucket in range(self.count):
        self.path("documents", bucket).unlink()
      raise ValueError(
        f"{num_read} documents of {corpus} were read, but {num_written} sorted: its files changed "
        "meanwhile, or workers do not share the folder of this run; run the stage again."
      )
    documents_lib.check_not_empty(num_read, corpus, counts)

  def documents(self, bucket: int) -> Iterator[documents_lib.Document]:
    """A bucket's documents, in order."""
    with self.path("documents", bucket).open("rb") as file:
      for _ in range(pickle.load(file)):
        yield documents_lib.Document(*pickle.load(file))

  def all_documents(self) -> Iterator[documents_lib.Document]:
    return itertools.chain.from_iterable(map(self.documents, range(self.count)))

  # --- tokens ------------------------------------------------------------------------------------

  def write_tokens(
    self, bucket: int, encoded: Iterable[tuple[int, list[int]]], *, length: int, eos_id: int
  ) -> None:
    """Writes a bucket's (document id, token ids); `length` is an instance's."""
    ids, parts = [], []
    for identifier, tokens in encoded:
      ids.append(identifier)
      parts.append(np.array([*tokens, eos_id], np.int32))
    sizes = np.array([len(part) for part in parts], np.int64)
    stream = np.concatenate([np.zeros(0, np.int32), *parts])
    with seals.replacing_shared(self.path("tokens", bucket)) as partial, partial.open("wb") as file:
      np.savez(
        file, ids=np.array(ids, np.int64), sizes=sizes, stream=stream, head=stream[:length]
      )

  def encoded(self, bucket: int) -> Iterator[tuple[int, np.ndarray]]:
    """A bucket's (document id, token ids), as `write_tokens` got them."""
    with np.load(self.path("tokens", bucket)) as arrays:
      ids, sizes, stream = arrays["ids"], arrays["sizes"], arrays["stream"]
    stops = np.cumsum(sizes)
    for identifier, size, stop in zip(ids.tolist(), sizes.tolist(), stops.tolist(), strict=True):
      yield identifier, stream[stop - size : stop - 1]

  # --- instances ---------------------------------------------------------------------------------

  def write_chain(self, settings: dict, bucket: int) -> None:
    """Writes a bucket's map (`chains.Chain`); the tokens of all buckets must be there.

    Args:
      settings: those of `packing.pack`: length, bos_id, eos_id, sentence_end.
    """
    with np.load(self.path("tokens", bucket)) as arrays:
      tokens = arrays["stream"]
    heads, missing = [np.zeros(0, np.int32)], settings["length"]
    for following in range(bucket + 1, self.count):
      with np.load(self.path("tokens", following)) as arrays:
        heads.append(arrays["head"][:missing])
      missing -= len(heads[-1])
      if not missing:
        break
    part = chains.chain(tokens, np.concatenate(heads), **settings)
    with seals.replacing_shared(self.path("chain", bucket)) as partial, partial.open("wb") as file:
      np.savez(file, exits=part.exits, counts=part.counts)

  def follow_chains(self) -> tuple[list[chains.Entry], int]:
    """Entries of all buckets, and the number of instances of the corpus."""
    def read():
      for bucket in range(self.count):
        with np.load(self.path("chain", bucket)) as arrays:
          yield chains.Chain(arrays["exits"], arrays["counts"])

    return chains.follow(read())

  def instances(
    self, settings: dict, entries: list[chains.Entry], start: int, stop: int
  ) -> Iterator[packing.Instance]:
    """The instances `start .. stop` of the packed corpus, by index."""
    firsts = [entry.first_index for entry in entries]
    bucket = int(np.searchsorted(firsts, start, side="right")) - 1
    documents = itertools.chain.from_iterable(map(self.encoded, range(bucket, self.count)))
    packed = packing.pack(documents, skip=entries[bucket].offset, **settings)
    return itertools.islice(packed, start - firsts[bucket], stop - firsts[bucket])


def _read_piece(buckets: Buckets, item) -> Iterator[tuple[int, tuple]]:
  number, piece = item
  counts: Counter[str] = Counter()
  num_documents = 0
  for document in piece.usable(counts):
    num_documents += 1
    yield order_key(document.id) * buckets.count >> 64, tuple(document)
  with seals.replacing_shared(buckets.path("piece", number)) as partial:
    partial.write_text(json.dumps({"num_documents": num_documents, "left_out": counts}))


def _write_documents(buckets: Buckets, corpus: str, bucket: int, rows: Iterable[tuple]) -> None:
  documents = sorted(
    (documents_lib.Document(*row) for row in rows),
    key=lambda document: (order_key(document.id), document.source),
  )
  path = buckets.path("documents", bucket)
  with seals.replacing_shared(path) as partial, partial.open("wb") as file:
    pickle.dump(len(documents), file)
    for document in documents_lib.distinct(documents, corpus):
      pickle.dump(tuple(document), file, pickle.HIGHEST_PROTOCOL)
