"""The English of the Python language reference, which every CPython carries (`pydoc_data.topics`).

About 75 texts, a third of a megabyte, explain the language. They need no download and serve as a
small trusted text to aim at, as LIMA does in PDS (arXiv 2410.07064).

The topics repeat each other: a chapter holds sections that are topics of their own. A paragraph
stays only in the shortest topic that has it, so that the parts of a split share no text.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator

from lmops_jax.config.setting_types import component
from lmops_jax.data.documents import Corpus, Document, document_id
from lmops_jax.data.near_duplicates import normalize
from lmops_jax.host.hashing import digest

_MIN_PARAGRAPH_BYTES = 60  # headings and one-line examples may repeat


@component(module="data")
@dataclasses.dataclass(frozen=True)
class PythonReference(Corpus):
  """One document a topic of `help()`; kind "reference".

  It counts "duplicate" topics, which have nothing of their own, and "repeated_paragraphs".
  """

  def fingerprint(self) -> str:
    return digest(f"{name}\0{text}\0" for name, text in sorted(_topics().items()))

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for name, text in sorted(_topics().items(), key=lambda item: (len(item[1]), item[0])):
      paragraphs = [(normalize(part), part) for part in text.split("\n\n")]
      own = [
        (mark, part) for mark, part in paragraphs
        if len(mark) < _MIN_PARAGRAPH_BYTES or mark not in seen
      ]
      marks = {mark for mark, _ in own if len(mark) >= _MIN_PARAGRAPH_BYTES}
      if not marks:
        counts["duplicate"] += 1
        continue
      seen |= marks
      counts["repeated_paragraphs"] += len(paragraphs) - len(own)
      source = f"pydoc_data/topics/{name}"
      yield Document(
        document_id(source), "\n\n".join(part for _, part in own), "reference", source
      )


def _topics() -> dict[str, str]:
  try:
    from pydoc_data import topics
  except ImportError as error:
    raise ValueError(
      f"this Python ({sys.executable}) comes without pydoc_data, which data.PythonReference reads; "
      "use a complete CPython, or give another target."
    ) from error
  return topics.topics
