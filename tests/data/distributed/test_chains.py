"""Instances found part by part are those that packing from end to end gives."""

import numpy as np
import pytest

from lmops_jax.data import packing
from lmops_jax.data.distributed import chains

BOS, EOS, V = 3, 1, 30


def _documents(seed, num):
  rng = np.random.default_rng(seed)
  return [(i, rng.integers(4, V, rng.integers(0, 25)).tolist()) for i in range(num)]


def _rule(kind):
  rng = np.random.default_rng(99)
  flags = [rng.random(V) < 0.1 for _ in range(4)]
  return {
    "none": None, "table": flags[0],
    "rule": packing.SentenceEnds(flags[0], flags[1] | flags[2], flags[2], flags[3]),
  }[kind]


def _stream(documents):
  return np.array([t for _, ids in documents for t in [*ids, EOS]], np.int32)


@pytest.mark.parametrize("bos", [BOS, EOS])
@pytest.mark.parametrize("kind", ["none", "table", "rule"])
@pytest.mark.parametrize("length", [2, 5, 16])
def test_parts_of_any_size_give_the_instances_of_the_whole(length, kind, bos):
  documents = _documents(length, 60)
  settings = {"length": length, "bos_id": bos, "eos_id": EOS, "sentence_end": _rule(kind)}
  want = list(packing.pack(documents, **settings))
  for num_parts in (1, 2, 7, 45):  # of 45 parts, most hold one document and some hold none
    cuts = np.sort(np.random.default_rng(num_parts).integers(0, 61, num_parts - 1))
    parts = [
      documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(documents)], strict=True)
    ]
    maps = [
      chains.chain(_stream(part), _stream(sum(parts[i + 1 :], [])), **settings)
      for i, part in enumerate(parts)
    ]
    entries, num = chains.follow(maps)
    assert num == len(want)
    starts = _starts(documents, want, **settings)
    begins = np.cumsum([0, *(len(_stream(part)) for part in parts)])
    for begin, end, entry in zip(begins, begins[1:], entries, strict=False):
      if entry.offset < end - begin:
        assert begin + entry.offset in starts
      assert entry.first_index == sum(1 for s, shown in starts.items() if shown and s < begin)


def _starts(documents, instances, *, length, bos_id, eos_id, sentence_end):
  """Begin of every instance, also of those left out, to whether it is shown; one at a time."""
  stream, cut = _stream(documents), packing._cut_rule(sentence_end, eos_id)
  starts, place = {}, 0
  while place < len(stream):
    window = stream[place : place + length]
    kept = len(window)
    if cut is not None and place + length < len(stream):
      kept = cut(window, int(stream[place + length])) or length
    starts[place] = any([bos_id, *window[: kept - 1]][i] != eos_id for i in range(kept))
    place += kept
  assert sum(starts.values()) == len(instances)
  return starts


def test_a_rule_that_is_no_table_is_refused():
  with pytest.raises(ValueError, match="no flag a token"):
    chains.chain(
      np.array([5, EOS]), np.zeros(0, int), length=4, bos_id=BOS, eos_id=EOS,
      sentence_end=lambda tokens, following: 1,
    )
