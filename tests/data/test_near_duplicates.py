import random

import numpy as np
import pytest

from lmops_jax.data import near_duplicates as lib
from lmops_jax.data.documents import Document


def prose(seed, num_words=400):
  generator = random.Random(seed)
  words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9)))
           for _ in range(num_words)]
  return " ".join(words)


def document(text, source="x"):
  return Document(abs(hash(source)) % 2**62, text, "text", source)


def test_window_hashes_equal_a_direct_polynomial():
  data = np.frombuffer(lib.normalize(prose(0, 60)), np.uint8)
  got = lib._window_hashes(data)
  want = []
  for start in range(len(data) - lib.WINDOW + 1):
    value = sum(int(b) * pow(lib._BASE, j, 2**64)
                for j, b in enumerate(data[start : start + lib.WINDOW])) % 2**64
    want.append(value)
  np.testing.assert_array_equal(got, lib.mix64(np.array(want, np.uint64)))


def test_fingerprints_do_not_depend_on_blocks_or_position(monkeypatch):
  text = prose(1, 2000)
  whole = lib.fingerprints(text)
  assert len(whole) == pytest.approx(len(text) / lib.RATE, rel=0.2)
  monkeypatch.setattr(lib, "_BLOCK", 1000)
  lib._powers.cache_clear()
  np.testing.assert_array_equal(lib.fingerprints(text), whole)
  lib._powers.cache_clear()
  monkeypatch.undo()
  shifted = lib.fingerprints("something else before " + text)
  assert np.isin(whole, shifted).all()


@pytest.mark.parametrize("text", ["", "a", "x" * 31, "x" * 32, "y" * 33])
def test_short_texts_have_a_fingerprint(text):
  assert len(lib.fingerprints(text)) >= 1


def test_deduplicator_reasons():
  judge = lib.Deduplicator(0.8)
  text = prose(2)
  words = text.split()
  assert judge.reason(text) is None
  assert judge.reason(text) == "duplicate"
  assert judge.reason("  " + text.upper().replace(" ", "\n ")) == "duplicate"
  words[200] = "changed"
  assert judge.reason(" ".join(words)) == "near_duplicate"
  assert judge.reason(prose(3)) is None
  assert judge.reason(text + " " + prose(4)) is None  # half of it is new
  assert judge.reason(text[:1000]) == "near_duplicate"


def test_overlap_finds_copies_excerpts_and_embedded_texts():
  targets = [document(prose(10), "t0"), document(prose(11), "t1"), document("Short one.", "t2")]
  index = lib.OverlapIndex(targets)
  assert index.find(document(prose(11).upper())) == targets[1]
  assert index.find(document(prose(11)[500:1500])) == targets[1]
  assert index.find(document(prose(20, 3000) + prose(10))) == targets[0]
  assert index.find(document("short  ONE.")) == targets[2]
  assert index.find(document(prose(21))) is None
  assert index.find(document(prose(22, 2000) + prose(10)[:300])) is None  # too little of either


def test_overlapping_documents_maps_ids():
  targets = [Document(5, prose(30), "text", "a"), Document(6, prose(31), "text", "b")]
  corpus = [Document(100 + i, prose(30 + i), "text", str(i)) for i in range(4)]
  assert lib.overlapping_documents(iter(corpus), iter(targets)) == {100: 5, 101: 6}


@pytest.mark.parametrize("threshold", [0, 1.1, float("nan")])
def test_bad_threshold(threshold):
  with pytest.raises(ValueError, match="threshold"):
    lib.Deduplicator(threshold)
  with pytest.raises(ValueError, match="threshold"):
    lib.OverlapIndex([], threshold)
