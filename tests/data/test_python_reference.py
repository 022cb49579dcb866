import sys
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest

from lmops_jax.data import PythonReference, split_documents
from lmops_jax.data.near_duplicates import fingerprints, normalize


def test_topics_become_documents():
  counts = Counter()
  documents = list(PythonReference().documents(counts))
  assert len(documents) > 60 and {d.kind for d in documents} == {"reference"}
  assert len({d.text for d in documents}) == len(documents)
  by_source = {d.source: d.text for d in documents}
  assert "Boolean operations" in by_source["pydoc_data/topics/booleans"]
  assert documents == list(PythonReference().documents())
  assert counts["repeated_paragraphs"] > 50


def test_parts_of_a_split_share_no_text():
  """Of the topics as they come, a fifth and more of one half is found in the other."""
  documents = list(PythonReference().documents())
  as_they_come = [d._replace(text=topics[d.source.split("/")[-1]]) for d in documents]

  def shared(documents, seed):
    first, second = split_documents(documents, 0.5, seed)
    marks = [np.unique(np.concatenate([fingerprints(d.text) for d in part]))
             for part in (first, second)]
    return np.isin(*marks).mean()

  assert max(shared(documents, seed) for seed in range(5)) < 0.02
  assert max(shared(as_they_come, seed) for seed in range(5)) > 0.1


def test_topics_lose_nothing_but_repetitions():
  kept = {normalize(p) for d in PythonReference().documents() for p in d.text.split("\n\n")}
  for text in topics.values():
    for paragraph in text.split("\n\n"):
      mark = normalize(paragraph)
      assert len(mark) < 60 or mark in kept


def test_missing_topics_are_explained(monkeypatch):
  monkeypatch.setitem(sys.modules, "pydoc_data", None)
  with pytest.raises(ValueError, match="comes without pydoc_data"):
    PythonReference().fingerprint()
