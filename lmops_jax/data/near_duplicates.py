"""Exact and near-duplicates by sampled shingles.

A text is lower-cased, its white space is collapsed, and every window of `WINDOW` bytes is hashed
with a rolling polynomial; the hashes that are 0 modulo `RATE` are its fingerprint (Manber, "Finding
similar files in a large file system", USENIX 1994). Which hashes are kept depends on the content
alone, so the share of common fingerprints estimates the share of common text, and copies inside a
longer text are found as well. The work is NumPy over bytes.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from lmops_jax.config.setting_types import Share, component
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.host.hashing import GOLDEN, mix64

WINDOW = 32
RATE = 32
_BLOCK = 1 << 17
_BASE = GOLDEN  # odd, therefore invertible modulo 2^64


def normalize(text: str) -> bytes:
  """Lower case, white space collapsed to single spaces."""
  return " ".join(text.lower().split()).encode("utf-8", "replace")


@functools.lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
  """`_BASE**i` and `_BASE**-i` modulo 2^64 for one block, `[_BLOCK + WINDOW] uint64` each."""
  powers = []
  for base in (_BASE, pow(_BASE, -1, 2**64)):
    factors = np.full(_BLOCK + WINDOW, base, np.uint64)
    factors[0] = 1
    powers.append(np.multiply.accumulate(factors))
  return powers[0], powers[1]


def _window_hashes(data: np.ndarray) -> np.ndarray:
  """Hashes of the windows of `data [n] uint8`, `WINDOW <= n <= _BLOCK + WINDOW - 1`."""
  powers, inverses = _powers()
  sums = np.empty(len(data) + 1, np.uint64)
  sums[0] = 0
  np.cumsum(data * powers[: len(data)], out=sums[1:])
  count = len(data) - WINDOW + 1
  return mix64((sums[WINDOW:] - sums[:count]) * inverses[:count])


def fingerprints(text: str) -> np.ndarray:
  """The sampled window hashes of a text, sorted and distinct; at least one.

  A text shorter than a window has one: the hash of the whole.
  """
  return _fingerprints(normalize(text))


def _fingerprints(normalized: bytes) -> np.ndarray:
  data = np.frombuffer(normalized, np.uint8)
  if len(data) < WINDOW:
    data = np.concatenate([data, np.zeros(WINDOW - len(data), np.uint8)])
  chosen, smallest = [], []
  for start in range(0, len(data) - WINDOW + 1, _BLOCK):
    hashes = _window_hashes(data[start : start + _BLOCK + WINDOW - 1])
    chosen.append(hashes[hashes % np.uint64(RATE) == 0])
    smallest.append(hashes.min())
  chosen = np.unique(np.concatenate(chosen))
  return chosen if len(chosen) else np.array([min(smallest)], np.uint64)


class Deduplicator:
  """Tells for one text after another whether it is new.

  Keeps 8 bytes of digest a text and one number for each `RATE` bytes of text.

  Args:
    threshold: a text is a near-duplicate when at least this share of its fingerprints occurs in
      texts that were new; 0 < threshold <= 1.
  """

  def __init__(self, threshold: float = 0.8):
    if not 0 < threshold <= 1:
      raise ValueError(f"threshold={threshold} is not in (0, 1].")
    self._threshold = threshold
    self._digests: set[bytes] = set()
    self._seen: set[int] = set()

  def reason(self, text: str) -> str | None:
    """"duplicate", "near_duplicate", or None for a new text, which is remembered."""
    normalized = normalize(text)
    digest = hashlib.blake2b(normalized, digest_size=8).digest()
    if digest in self._digests:
      return "duplicate"
    marks = _fingerprints(normalized).tolist()
    num_seen = sum(mark in self._seen for mark in marks)
    if num_seen >= self._threshold * len(marks):
      return "near_duplicate"
    self._digests.add(digest)
    self._seen.update(marks)
    return None


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Deduplicated(Corpus):
  """Another corpus without exact and near-duplicates; of each group the first in its order stays.

  Attributes:
    corpus: any corpus of this package.
    threshold: see `Deduplicator`.
  """

  corpus: Corpus
  threshold: Share = 0.8

  def fingerprint(self) -> str:
    return f"deduplicated {self.threshold} {self.corpus.fingerprint()}"

  def left_out(self) -> dict[str, list[str]]:
    return self.corpus.left_out()

  def read(self, counts):
    deduplicator = Deduplicator(self.threshold)
    for document in self.corpus.documents(counts):
      reason = deduplicator.reason(document.text)
      if reason is None:
        yield document
      else:
        counts[reason] += 1


class OverlapIndex:
  """Finds which of a few texts (the target) a document of the corpus repeats.

  Two documents overlap when they are equal after normalisation, or when the fingerprints that they
  share are at least `threshold` of either's: a copy inside a longer text counts, and so does an
  excerpt.

  Args:
    targets: held in memory as fingerprints.
    threshold: 0 < threshold <= 1.
  """

  def __init__(self, targets: Iterable[Document], threshold: float = 0.5):
    if not 0 < threshold <= 1:
      raise ValueError(f"threshold={threshold} is not in (0, 1].")
    self._threshold = threshold
    self._targets = list(targets)
    self._owners: dict[int, list[int]] = {}
    self._sizes: list[int] = []
    for i, target in enumerate(self._targets):
      marks = fingerprints(target.text).tolist()
      self._sizes.append(len(marks))
      for mark in marks:
        self._owners.setdefault(mark, []).append(i)
    self._marks = np.array(sorted(self._owners), np.uint64)

  def find(self, document: Document) -> Document | None:
    """The target document that shares most with `document`, or None if none shares enough."""
    marks = fingerprints(document.text)
    common = np.intersect1d(marks, self._marks, assume_unique=True)
    if not len(common):
      return None
    shared = Counter(owner for mark in common.tolist() for owner in self._owners[mark])
    enough = [
      (-count, owner)
      for owner, count in shared.items()
      if count >= self._threshold * min(len(marks), self._sizes[owner])
    ]
    return self._targets[min(enough)[1]] if enough else None


def overlapping_documents(
  corpus_documents: Iterable[Document],
  target_documents: Iterable[Document],
  threshold: float = 0.5,
) -> dict[int, int]:
  """Corpus documents that repeat a target document: corpus id -> target id.

  The corpus is streamed, the target is held in memory. See `OverlapIndex` for what counts.
  """
  index = OverlapIndex(target_documents, threshold)
  matches = {}
  for document in corpus_documents:
    match = index.find(document)
    if match is not None:
      matches[document.id] = match.id
  return matches
