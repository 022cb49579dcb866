import subprocess
import sys
from collections import Counter

import pytest

from lmops_jax.data import documents as lib
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.data.near_duplicates import Deduplicated


class ListCorpus(Corpus):
  def __init__(self, documents):
    object.__setattr__(self, "_documents", documents)

  def read(self, counts):
    yield from self._documents


def make(count):
  return [
    Document(lib.document_id(f"doc/{i}"), f"text number {i}", "text", f"doc/{i}")
    for i in range(count)
  ]


def test_ids_are_stable_63_bit_numbers():
  assert lib.document_id("numpy/linalg/linalg.py") == 7996915340273482897  # b2sum -l 64
  ids = {lib.document_id(f"{i}") for i in range(10_000)}
  assert len(ids) == 10_000 and 0 <= min(ids) and max(ids) <= lib.MAX_ID
  assert max(ids) > 2**62  # the whole range is used


def test_order_does_not_depend_on_the_order_of_reading():
  documents = make(200)
  forward = list(ListCorpus(documents).documents())
  backward = list(ListCorpus(documents[::-1]).documents())
  assert forward == backward
  assert sorted(forward) == sorted(documents)
  assert forward != documents
  # A document more leaves the others in their order.
  more = list(ListCorpus([*documents, Document(7, "x", "text", "x")]).documents())
  assert [d for d in more if d.id != 7] == forward


def test_order_of_a_corpus_that_does_not_fit_in_memory_is_the_same():
  documents = make(500)
  in_memory = list(lib.shuffled(documents))
  assert list(lib.shuffled(documents, memory_bytes=300, num_buckets=8)) == in_memory
  assert list(lib.shuffled(iter(documents), memory_bytes=0, num_buckets=1)) == in_memory


def test_empty_documents_are_counted_and_left_out():
  counts = Counter()
  documents = [*make(3), Document(1, " \n\t ", "text", "blank")]
  assert len(list(ListCorpus(documents).documents(counts))) == 3
  assert counts == {"empty": 1}


def test_empty_corpus_says_what_was_dropped():
  with pytest.raises(ValueError, match=r"is empty.*1 empty"):
    list(ListCorpus([Document(1, "", "text", "blank")]).documents())


def test_repeated_id_names_both_documents():
  documents = [*make(3), Document(make(2)[1].id, "other", "text", "impostor")]
  with pytest.raises(ValueError, match="doc/1 and impostor|impostor and doc/1"):
    list(ListCorpus(documents).documents())


def test_split_is_a_function_of_seed_and_ids():
  documents = make(101)
  first, second = lib.split_documents(documents, 0.3, seed=5)
  assert len(first) == 30 and sorted(first + second) == sorted(documents)
  again, _ = lib.split_documents(documents[::-1], 0.3, seed=5)
  assert sorted(again) == sorted(first)
  other, _ = lib.split_documents(documents, 0.3, seed=6)
  assert sorted(other) != sorted(first)


@pytest.mark.parametrize("count,fraction", [(1, 0.5), (10, 0.01), (10, 0.99), (10, 0), (10, 1.5)])
def test_split_refuses_an_empty_part(count, fraction):
  with pytest.raises(ValueError, match="fraction"):
    lib.split_documents(make(count), fraction, seed=0)


def test_deduplicated_keeps_the_first_in_corpus_order():
  text = " ".join(f"word{i * i}" for i in range(300))
  documents = [
    Document(lib.document_id(str(i)), text if i < 3 else f"{i} " * 200, "text", str(i))
    for i in range(6)
  ]
  corpus = ListCorpus(documents)
  kept = next(d for d in corpus.documents() if d.text == text)
  counts = Counter()
  result = list(Deduplicated(corpus).documents(counts))
  assert counts == {"duplicate": 2}
  assert len(result) == 4 and kept in result


def test_given_ids():
  assert lib.given_id(12, "x", "id") == 12
  assert lib.given_id("a", "x", "id") == lib.given_id(b"a", "x", "id") == lib.document_id("a")
  for bad in (-1, 2**63, 1.5, None, True):
    with pytest.raises(ValueError, match="row 3.*'id'"):
      lib.given_id(bad, "row 3", "id")


def test_importing_the_package_imports_no_tensorflow():
  code = (
    "import sys, pkgutil, importlib, lmops_jax.data as data, lmops_jax.text as text\n"
    "for package in (data, text):\n"
    "  for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
    "    if not module.name.endswith('.seqio_vocabulary'):\n"
    "      importlib.import_module(module.name)\n"
    "heavy = {'tensorflow', 'seqio', 'jax'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
