"""The English of the Python language reference, which every CPython carries (`pydoc_data.topics`).

About 80 texts that explain the language, half a megabyte, without download: a small trusted text to
aim at, as LIMA is in PDS (arXiv 2410.07064).
"""

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator

import gin

from lmops_jax.data.documents import Corpus, Document, document_id
from lmops_jax.data.near_duplicates import Deduplicator


@gin.register(module="data")
@dataclasses.dataclass(frozen=True)
class PythonReference(Corpus):
  """One document a topic of `help()`; kind "reference"; repeated topics once."""

  def fingerprint(self) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, text in sorted(_topics().items()):
      state.update(f"{name}\0{text}\0".encode())
    return state.hexdigest()

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    deduplicator = Deduplicator()
    for name, text in sorted(_topics().items()):
      reason = deduplicator.reason(text)
      if reason is None:
        source = f"pydoc_data/topics/{name}"
        yield Document(document_id(source), text, "reference", source)
      else:
        counts[reason] += 1


def _topics() -> dict[str, str]:
  try:
    from pydoc_data import topics
  except ImportError as error:
    raise ValueError(
      f"this Python ({sys.executable}) comes without pydoc_data, which data.PythonReference reads; "
      "use a complete CPython, or give another target."
    ) from error
  return topics.topics
