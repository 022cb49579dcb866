import sys
from collections import Counter

import pytest

from lmops_jax.data import PythonReference


def test_topics_become_documents():
  counts = Counter()
  documents = list(PythonReference().documents(counts))
  assert len(documents) > 60 and {d.kind for d in documents} == {"reference"}
  assert len({d.text for d in documents}) == len(documents)
  by_source = {d.source: d.text for d in documents}
  assert "Boolean operations" in by_source["pydoc_data/topics/booleans"]
  assert documents == list(PythonReference().documents())


def test_missing_topics_are_explained(monkeypatch):
  monkeypatch.setitem(sys.modules, "pydoc_data", None)
  with pytest.raises(ValueError, match="comes without pydoc_data"):
    PythonReference().fingerprint()
