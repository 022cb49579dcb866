from collections import Counter

import numpy as np
import pytest

from lmops_jax.data import packing
from lmops_jax.data.documents import Document

BOS, EOS = 3, 1


def random_documents(seed, count=40, vocab_size=50, longest=60):
  generator = np.random.default_rng(seed)
  return [
    (int(generator.integers(0, 2**62)), generator.integers(4, vocab_size, size).tolist())
    for size in generator.integers(0, longest, count)
  ]


def plain_pack(documents, length, ends=None):
  """The definition, token by token: a list of [(token, document id), ...] without BOS."""
  stream = [(token, i) for i, ids in documents for token in [*ids, EOS]]
  chunks = []
  while stream:
    chunk = stream[:length]
    if ends is not None and len(stream) > length:
      for cut in range(len(chunk), 0, -1):
        if ends(chunk[cut - 1][0], stream[cut][0]):
          chunk = chunk[:cut]
          break
    chunks.append(chunk)
    stream = stream[len(chunk):]
  return chunks


def assert_same(instances, chunks):
  assert len(instances) == len(chunks)
  place = Counter()  # tokens of each document in earlier instances
  for instance, chunk in zip(instances, chunks):
    assert instance.id == packing.instance_id(chunk[0][1], place[chunk[0][1]])
    place.update(owner for _, owner in chunk)
    assert instance.tokens.dtype == np.int32
    assert instance.tokens.tolist() == [BOS] + [token for token, _ in chunk]
    owners = [owner for _, owner in chunk]
    runs = [owner for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
    assert instance.document_ids.tolist() == runs
    assert instance.document_num_tokens.tolist() == [owners.count(owner) for owner in runs]


@pytest.mark.parametrize("length", [1, 7, 16, 200, 5000])
def test_packing_equals_the_definition(length):
  documents = random_documents(seed=length)
  got = list(packing.pack(documents, length=length, bos_id=BOS, eos_id=EOS))
  assert_same(got, plain_pack(documents, length))


@pytest.mark.parametrize("length", [5, 16, 33])
def test_cutting_at_marked_tokens_equals_the_definition(length):
  documents = random_documents(seed=length)
  table = np.zeros(50, bool)
  table[[7, 8, 20, 30]] = True
  got = list(packing.pack(documents, length=length, bos_id=BOS, eos_id=EOS, sentence_end=table))
  assert_same(got, plain_pack(documents, length, lambda t, following: table[t] or t == EOS))
  assert not table[EOS]  # the caller's array is left alone
  assert any(len(i.tokens) < length + 1 for i in got[:-1])


class Words:
  """A vocabulary of a few pieces."""

  bos_id, eos_id, pad_id = BOS, EOS, 0
  texts = ["", "", "?unk?", "", " the", ".", " U", "S", "\n", " end.", " (a.", ").", " 3", "14",
           "; ", "!", " why?", "x"]

  def token_texts(self):
    return self.texts


def reference_rule(token, following):
  """The rule of the PDS code in words: EOS or a line break; or an end mark, no bracket left open
  in the token, and white space after the mark (in this token or at the start of the next)."""
  text, after = Words.texts[token], Words.texts[following]
  if token == EOS or "\n" in text:
    return True
  marks = [i for i, c in enumerate(text) if c in ".!?;"]
  if not marks or sum(c in "([{" for c in text) > sum(c in ")]}" for c in text):
    return False
  return any(c.isspace() for c in text[marks[-1] + 1 :]) or after[:1].isspace()


@pytest.mark.parametrize("length", [4, 9, 24])
def test_sentence_ends_of_a_vocabulary(length):
  documents = random_documents(seed=length, vocab_size=len(Words.texts))
  rule = packing.sentence_end_table(Words())
  got = list(packing.pack(documents, length=length, bos_id=BOS, eos_id=EOS, sentence_end=rule))
  assert_same(got, plain_pack(documents, length, reference_rule))


def test_abbreviations_and_numbers_stay_whole():
  rule = packing.sentence_end_table(Words())
  the, dot, us, s, three, fourteen = 4, 5, 6, 7, 12, 13
  assert rule(np.array([the, us, dot]), s) == 0  # "the U.S"
  assert rule(np.array([the, us, dot]), the) == 3  # "the U. the"
  assert rule(np.array([the, dot, the, three, dot]), fourteen) == 2  # "the. the 3.14"
  assert rule(np.array([the, 10]), the) == 0  # " (a." leaves a bracket open
  assert rule(np.array([the, 11]), the) == 2
  assert rule(np.array([the, 14, s]), s) == 2  # "; " brings its own space


@pytest.mark.parametrize("skip", [0, 1, 100, 333])
def test_packing_goes_on_where_earlier_instances_end(skip):
  documents = random_documents(seed=1)
  settings = {"length": 10, "bos_id": BOS, "eos_id": EOS}
  want = list(packing.pack(documents, **settings))
  first = skip // 10
  got = list(packing.pack(documents, skip=first * 10, **settings))
  assert [i.id for i in got] == [i.id for i in want[first:]]
  assert [i.tokens.tolist() for i in got] == [i.tokens.tolist() for i in want[first:]]


def test_ids_are_those_of_the_places_where_instances_begin():
  documents = [(7, [5] * 9), (8, []), (9, [6] * 4)]  # EOS of 7 at offset 9, of 8 at 0
  got = list(packing.pack(documents, length=3, bos_id=BOS, eos_id=EOS))
  places = [(7, 0), (7, 3), (7, 6), (7, 9), (9, 1), (9, 4)]
  assert [i.id for i in got] == [packing.instance_id(*place) for place in places]
  assert packing.instance_id(7, 3) == 1196508733449348778 and max(i.id for i in got) < 2**63
  many = {packing.instance_id(d, 64 * i) for d in range(300) for i in range(300)}
  assert len(many) == 90_000


def test_a_new_document_changes_no_id_of_the_others():
  """Before it none; after it none once an instance begins at the same place as without it."""
  documents = [(i, ids) for i, (_, ids) in enumerate(random_documents(seed=3, count=60))]
  settings = {"length": 16, "bos_id": BOS, "eos_id": EOS}
  table = np.arange(50) % 5 == 0
  for place in (0, 20, 60):
    for size, ends in ((31, None), (37, table)):  # with its EOS two whole instances; any length
      new = (10**9, list(np.random.default_rng(0).integers(4, 50, size)))
      more = [*documents[:place], new, *documents[place:]]
      if ends is None:  # each part fills its instances
        documents = [(i, ids[:15]) for i, ids in documents if len(ids) >= 15]
        more = [*documents[:place], new, *documents[place:]]
      before = list(packing.pack(documents, sentence_end=ends, **settings))
      after = {i.id: i for i in packing.pack(more, sentence_end=ends, **settings)}
      kept = [i for i in before if i.id in after]
      if ends is None:
        assert kept == before and len(after) == len(before) + 2
      else:  # the few instances behind it, until both are cut at the same place
        assert len(before) - 4 <= len(kept)
        assert sum(i.tokens.tolist() != after[i.id].tokens.tolist() for i in kept) <= 1


def test_instances_of_nothing_but_eos_are_left_out_and_counted():
  counts = Counter()
  documents = [(1, [5, 6]), (2, []), (3, []), (4, [7, 8, 9])]
  got = list(packing.pack(documents, length=2, bos_id=EOS, eos_id=EOS, counts=counts))
  assert [i.tokens.tolist() for i in got] == [[1, 5, 6], [1, 8, 9]]
  assert [i.id for i in got] == [packing.instance_id(1, 0), packing.instance_id(4, 1)]
  # Left out, after BOS = EOS: EOS EOS, EOS 7 (what follows EOS is not predicted), and EOS.
  assert counts == {"empty_instances": 3}


def test_one_per_document():
  counts = Counter()
  documents = [(10, [5, 6]), (11, list(range(4, 20))), (12, [])]
  got = list(packing.one_per_document(
    documents, length=6, bos_id=BOS, eos_id=EOS, counts=counts))
  assert [i.tokens.tolist() for i in got] == [[3, 5, 6, 1], [3, 4, 5, 6, 7, 8, 9], [3, 1]]
  assert [i.document_ids.tolist() for i in got] == [[10], [11], [12]]
  assert [i.id for i in got] == [packing.instance_id(d, 0) for d in (10, 11, 12)]
  assert [i.document_num_tokens.tolist() for i in got] == [[3], [6], [1]]
  assert counts == {"cut_documents": 1, "cut_tokens": 11}


def test_length_must_be_positive():
  with pytest.raises(ValueError, match="length=0"):
    next(packing.pack([(0, [1])], length=0, bos_id=0, eos_id=1))
  with pytest.raises(ValueError, match="length=0"):
    next(packing.one_per_document([(0, [1])], length=0, bos_id=0, eos_id=1))


class _Words:
  """A token a word."""

  def encode_batch(self, texts):
    return [[len(word) for word in text.split()] for text in texts]


def test_lines_may_end_with_a_token_of_their_own():
  documents = [
    Document(3, "a bb\n\nccc\n", "text", ""), Document(5, "dddd", "text", ""),
    Document(7, " \n", "text", ""),
  ]
  want = [(3, [1, 2, 99, 3, 99]), (5, [4, 99]), (7, [])]
  for block in (1, 2, 256):
    assert list(packing.encoded(documents, _Words(), block, line_end_id=99)) == want
  assert list(packing.encoded(documents, _Words())) == [(3, [1, 2, 3]), (5, [4]), (7, [])]
