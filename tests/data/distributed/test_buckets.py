"""Sorted buckets hold the corpus in its order, and any range of instances can be read from them."""

import dataclasses
import functools
from collections import Counter

import numpy as np
import pytest

from lmops_jax.data import documents, instance_writing, instances, packing
from lmops_jax.data.distributed import buckets as buckets_lib
from lmops_jax.data.distributed import export
from lmops_jax.host import seals

BOS, EOS, V = 3, 1, 40
SETTINGS = {"length": 12, "bos_id": BOS, "eos_id": EOS, "sentence_end": np.arange(V) % 9 == 4}


@dataclasses.dataclass(frozen=True)
class Rows(documents.Corpus):
  """Documents 0 .. num of a few words, in pieces of five; each seventh is empty."""

  start: int
  stop: int

  def read(self, counts):
    for i in range(self.start, self.stop):
      text = " " if i % 7 == 3 else "w" * (i % 23)
      yield documents.Document(i, text, "text", f"row {i}")

  def pieces(self):
    return [Rows(i, min(i + 5, self.stop)) for i in range(self.start, self.stop, 5)]


def _encoded(rows):
  return ((d.id, [4 + (d.id * 5 + i) % (V - 4) for i in range(len(d.text))]) for d in rows)


@pytest.fixture(scope="module", params=[1, 4, 150], ids="{} buckets".format)
def packed(request, here, tmp_path_factory):
  """A corpus in buckets, of which 150 are mostly empty, up to its entries."""
  corpus, counts = Rows(0, 90), Counter()
  buckets = buckets_lib.Buckets(tmp_path_factory.mktemp("buckets"), request.param)
  buckets.sort(corpus, here, counts)
  for bucket in range(buckets.count):
    buckets.write_tokens(
      bucket, _encoded(buckets.documents(bucket)), length=SETTINGS["length"], eos_id=EOS
    )
  for bucket in reversed(range(buckets.count)):
    buckets.write_chain(SETTINGS, bucket)
  return corpus, counts, buckets


def test_documents_come_in_the_order_of_the_corpus(packed):
  corpus, counts, buckets = packed
  want = Counter()
  assert list(buckets.all_documents()) == list(corpus.documents(want))
  assert counts == want and counts["empty"] > 10


def _same(got, want):
  assert [i.id for i in got] == [i.id for i in want]
  for a, b in zip(got, want, strict=True):
    for x, y in zip(a[1:], b[1:], strict=True):
      np.testing.assert_array_equal(x, y)


def test_any_range_of_instances_can_be_read(packed):
  corpus, _, buckets = packed
  want = list(packing.pack(_encoded(corpus.documents()), **SETTINGS))
  entries, num = buckets.follow_chains()
  assert num == len(want)
  for start, stop in ((0, num), (0, 1), (num - 1, num), (num, num), (13, 29), (29, 30)):
    _same(list(buckets.instances(SETTINGS, entries, start, stop)), want[start:stop])


@pytest.mark.parametrize("per_shard", [7, 1000])
def test_shards_are_those_of_one_process(packed, here, tmp_path, per_shard):
  corpus, _, buckets = packed
  settings = {"length": 12, "vocab_size": V, "pad_id": 0, "bos_id": BOS, "eos_id": EOS,
              "description": "rows", "instances_per_shard": per_shard}
  want = packing.pack(_encoded(corpus.documents()), **SETTINGS)
  num = instance_writing.write_instances(tmp_path / "want", want, **settings)
  entries, _ = buckets.follow_chains()
  (tmp_path / "got").mkdir()
  (tmp_path / "got" / "half-written").touch()
  num_tokens = export.write_instances(
    here, tmp_path / "scratch", tmp_path / "got", num,
    functools.partial(buckets.instances, SETTINGS, entries), **settings,
  )
  files = {p.name: p.read_bytes() for p in (tmp_path / "want").iterdir()}
  assert {p.name: p.read_bytes() for p in (tmp_path / "got").iterdir()} == files
  assert len(files) == 4 + -(-num // per_shard)
  assert num_tokens == instances.open_instances(tmp_path / "got").total_tokens


def test_nothing_is_done_twice_and_nothing_lost(here, tmp_path, monkeypatch):
  corpus = Rows(0, 30)
  buckets = buckets_lib.Buckets(tmp_path, 3)
  buckets.sort(corpus, here, Counter())
  before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  counts = Counter()
  monkeypatch.setattr(here, "group", lambda *args: pytest.fail("sorted again"))
  buckets.sort(corpus, here, counts)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before and counts["empty"] == 6


def test_a_bucket_that_was_not_written_is_noticed(here, tmp_path):
  class Forgetful(type(here)):
    def group(self, read, items, write):
      super().group(read, items, lambda key, values: key == 1 or write(key, values))

  buckets = buckets_lib.Buckets(tmp_path, 3)
  with pytest.raises(ValueError, match="documents of Rows.* were read, but .* sorted"):
    buckets.sort(Rows(0, 30), Forgetful(), Counter())
  assert len(buckets.missing("documents")) == 3  # so that the next attempt sorts anew
  buckets.sort(Rows(0, 30), here, Counter())


@pytest.mark.parametrize("what, count, calls", [
  ("piece", 3, "sort"), ("documents", 3, "sort"), ("documents", 90, "sort"),
  ("tokens", 3, "tokens"), ("labels", 3, "tokens"), ("chain", 3, "chain")])
def test_a_file_with_a_flipped_bit_is_made_again(here, tmp_path, what, count, calls):
  """As a resumed stage does; the others are left as they are. Of 90 buckets many are empty."""
  buckets = buckets_lib.Buckets(tmp_path, count)
  done = []

  def attempt():
    sort = here.group

    def counting(*args):
      done.append("sort")
      sort(*args)

    buckets.sort(Rows(0, 30), type("Engine", (), {"group": staticmethod(counting)}), Counter())
    for bucket in buckets.missing("tokens", "labels"):
      done.append("tokens")
      buckets.write_tokens(
        bucket, _encoded(buckets.documents(bucket)), length=SETTINGS["length"], eos_id=EOS)
      with seals.replacing_shared(buckets.path("labels", bucket)) as partial:
        partial.write_text(f"labels of {bucket}")
    for bucket in buckets.missing("chain"):
      done.append("chain")
      buckets.write_chain(SETTINGS, bucket)
    return {p.name: p.read_bytes() for p in tmp_path.iterdir()}

  want = attempt()
  assert done == ["sort", *["tokens"] * count, *["chain"] * count]
  victim = buckets.path(what, 1)
  if count == 90:
    victim = min((buckets.path(what, n) for n in range(count)), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  done.clear()
  assert attempt() == want
  assert done == [calls]
