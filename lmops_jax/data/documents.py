"""Documents and corpora: what every reader yields, in which order, and how it is split.

A corpus is a frozen dataclass with `documents(counts)` and `fingerprint()`. Ids come from where a
document was found (a path, a row), never from the order of reading, and the order is that of a hash
of the id, so that neither depends on the file system, on the number of readers, or on what else is
in the corpus. Nothing is dropped in silence: whoever passes a `Counter` learns how many documents
were left out and why. This module imports no TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import pickle
import reprlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lmops_jax.host.hashing import order_key

MAX_ID = 2**63 - 1


class Document(NamedTuple):
  """One text.

  Attributes:
    id: 0 <= id < 2^63, stable: from the source, or given by the data itself.
    text: never empty, without surrogates.
    kind: a label such as "code" or "licence"; for reports, no method may look at it.
    source: where it was found: a path relative to the corpus, with a row or part if there are
      several ("numpy/linalg/linalg.py#docstrings", "part-0.jsonl:17").
  """

  id: int
  text: str
  kind: str
  source: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Base of the corpora: a subclass reads, this class checks, counts and orders.

  Reasons in `counts`: "empty" (white space only, or missing), "duplicate" and "near_duplicate"
  (if a corpus removes them), "undecodable" (not UTF-8), "too_large", "too_short", "unreadable",
  "over_budget"; for files and folders those of `matching.Found`.
  """

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    """Yields documents in any order that depends on the data only; counts what it leaves out."""
    raise NotImplementedError

  def fingerprint(self) -> str:
    """Changes when the settings or the underlying data change; cheap, reads no text."""
    raise NotImplementedError

  def left_out(self) -> dict[str, list[str]]:
    """Names of files and folders that stand beside what is read, by reason."""
    return {}

  def pieces(self) -> "list[Corpus]":
    """Corpora that read the same documents, each a part of them, for readers side by side.

    Ids and sources are those of the whole. A corpus that can only be read from one end to the other
    is its own single piece.
    """
    return [self]

  def documents(self, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Yields every usable document once, in the order of a hash of its id.

    Args:
      counts: filled with the number of documents (or files) left out, by reason; complete once the
        iterator is exhausted.

    Raises:
      ValueError: for no usable document, or two documents with one id.
    """
    counts = Counter() if counts is None else counts
    number = 0
    for number, document in enumerate(distinct(shuffled(self.usable(counts)), self), 1):  # noqa: B007
      yield document
    check_not_empty(number, self, counts)

  def usable(self, counts: Counter[str]) -> Iterator[Document]:
    """What `read` yields without the empty documents, which are counted."""
    for document in self.read(counts):
      if document.text.strip():
        yield document
      else:
        counts["empty"] += 1


def distinct(documents: Iterable[Document], corpus: Corpus) -> Iterator[Document]:
  """Passes on documents that come in order; equal ids, which then are neighbours, are an error."""
  previous = None
  for document in documents:
    if previous is not None and previous.id == document.id:
      raise ValueError(
        f"documents {previous.source} and {document.source} of {corpus} both have id "
        f"{document.id}; ids must be unique, so drop id_field or repair the data."
      )
    yield document
    previous = document


def check_not_empty(num_documents: int, corpus: Corpus, counts: Counter[str]) -> None:
  """Refuses a corpus without a usable document, and says what was left out."""
  if not num_documents:
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "none found"
    raise ValueError(f"the corpus {corpus} is empty: it has no usable document ({dropped}).")


def document_id(source: str | bytes) -> int:
  """A 63-bit id from a name, the same on every machine; bytes give that of the text they encode."""
  if isinstance(source, str):
    source = source.encode("utf-8", "surrogatepass")
  digest = hashlib.blake2b(source, digest_size=8).digest()
  return int.from_bytes(digest, "little") & MAX_ID


def given_id(value: object, where: str, field: str) -> int:
  """An id from the data: an integer in range as it is; texts, bytes and UUIDs hashed.

  Raises:
    ValueError: for a number out of range, or anything else.
  """
  if isinstance(value, uuid.UUID):
    value = value.bytes
  if isinstance(value, str | bytes):
    return document_id(value)
  if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID:
    return value
  raise ValueError(
    f"{where}: field {field!r} holds {reprlib.repr(value)}, which is no id (a text, bytes, or a "
    "number from 0 to 2^63 - 1)."
  )


def kind_label(value: object) -> str:
  """A kind from the data, as a text.

  Raises:
    UnicodeDecodeError: for bytes that are not UTF-8.
  """
  return value.decode() if isinstance(value, bytes) else str(value)


def shuffled(
  documents: Iterable[Document], *, memory_bytes: int = 1 << 29, num_buckets: int = 64
) -> Iterator[Document]:
  """Documents in the order of a hash of their ids, whatever order they come in.

  Up to `memory_bytes` of text are sorted in memory; more is spread over temporary files by the top
  bits of the key, and each file is sorted on its own, so that memory stays near
  `total / num_buckets`.
  """
  held: list[tuple[int, Document]] = []
  held_bytes = 0
  documents = iter(documents)
  for document in documents:
    held.append((order_key(document.id), document))
    held_bytes += len(document.text)
    if held_bytes > memory_bytes:
      break
  else:
    held.sort(key=lambda item: item[0])
    for _, document in held:
      yield document
    return

  with contextlib.ExitStack() as stack:
    buckets = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_buckets)]

    def spill(key: int, document: Document) -> None:
      pickle.dump((key, *document), buckets[key * num_buckets >> 64], pickle.HIGHEST_PROTOCOL)

    for key, document in held:
      spill(key, document)
    held.clear()
    for document in documents:
      spill(order_key(document.id), document)
    for bucket in buckets:
      rows = []
      end = bucket.tell()
      bucket.seek(0)
      while bucket.tell() < end:
        rows.append(pickle.load(bucket))
      rows.sort(key=lambda row: row[0])
      for _, *fields in rows:
        yield Document(*fields)
      bucket.truncate(0)


def split_documents(
  documents: Iterable[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
  """Splits by a hash of (seed, id), each part in the order of its input.

  Args:
    fraction: share of the documents, rounded, that go to the first list; 0 < fraction < 1.

  Raises:
    ValueError: for a fraction out of range, or one that leaves a part without a document.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"fraction={fraction} is not between 0 and 1.")
  documents = list(documents)
  num_first = round(fraction * len(documents))
  if not 0 < num_first < len(documents):
    raise ValueError(
      f"{len(documents)} documents cannot be split with fraction={fraction}: one part would be "
      "empty; give more documents or another fraction."
    )
  ranked = sorted(documents, key=lambda document: order_key(document.id, seed))
  first = {document.id for document in ranked[:num_first]}
  return (
    [document for document in documents if document.id in first],
    [document for document in documents if document.id not in first],
  )
