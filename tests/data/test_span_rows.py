"""Rows with spans: what the encoder reads, what is learned, and that chance is counted."""

import jax
import numpy as np
import pytest

from lmops_jax.data import packing
from lmops_jax.data.instance_writing import write_instances
from lmops_jax.data.instances import open_instances
from lmops_jax.data.span_rows import SpanRows, encoded_spans, generator
from lmops_jax.data.spans import NoSpans, PrefixSpan, RandomSpans, check_spans, semi_causal_mask
from lmops_jax.training.sources import Epochs

PAD, END, START = 0, 1, 3
LENGTH = 60
SAMPLER = RandomSpans(8, 0.4, 3)


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
  """Rows whose tokens behind the start token are all different, but for ends of documents."""
  rng, words = np.random.default_rng(0), iter(range(4, 2000))
  documents = [
    (i + 1, [next(words) for _ in range(size)])
    for i, size in enumerate(rng.choice([5, 40, 110], 20).tolist())]
  folder = tmp_path_factory.mktemp("rows")
  special = {"length": LENGTH, "bos_id": START, "eos_id": END}
  write_instances(
    folder, packing.pack(documents, **special), vocab_size=2000, pad_id=PAD, **special)
  return open_instances(folder)


@pytest.fixture(scope="module")
def rows(instances):
  return SpanRows(instances, SAMPLER, seed=5)


def _spans_of(batch, row):
  """The places of a row that stand for each segment of its encoder row."""
  segments, index = batch["encoder_segments"][row], batch["vector_index"][row]
  of_place = np.where(index < 0, 0, segments[index])
  return [np.flatnonzero(of_place == s) for s in range(1, segments.max() + 1)]


def test_the_encoder_reads_every_span_behind_a_start_token(rows, instances):
  indices = np.arange(len(rows))
  batch, plain = rows.batch(indices), instances.batch(indices)
  for name in ("tokens", "targets", "example_id"):
    np.testing.assert_array_equal(batch[name], plain[name])
  assert {name: (batch[name].dtype.name, batch[name].shape[1:]) for name in (
    "encoder_tokens", "encoder_positions", "encoder_segments", "vector_index", "loss_mask",
    "weight")} == {
      **{name: ("int32", (rows.encoder_length,)) for name in (
        "encoder_tokens", "encoder_positions", "encoder_segments")},
      "vector_index": ("int32", (LENGTH,)), "loss_mask": ("float32", (LENGTH,)),
      "weight": ("float32", ())}
  num_spans = 0
  for row in indices:
    read, positions, segments = [], [], []
    for number, places in enumerate(_spans_of(batch, row), 1):
      assert (np.diff(places) == 1).all() and places[0] > 0
      read += [START, *batch["tokens"][row, places]]
      positions += range(len(places) + 1)
      segments += [number] * (len(places) + 1)
      num_spans += 1
    rest = rows.encoder_length - len(read)
    assert batch["encoder_tokens"][row].tolist() == read + [PAD] * rest
    assert batch["encoder_positions"][row].tolist() == positions + [0] * rest
    assert batch["encoder_segments"][row].tolist() == segments + [0] * rest
    index = batch["vector_index"][row]
    np.testing.assert_array_equal(
      batch["encoder_tokens"][row, index[index >= 0]], batch["tokens"][row, index >= 0])
  assert num_spans > 3 * len(rows) / 2


def test_nothing_is_learned_that_is_already_seen(rows, instances):
  """Section 9.2, told by the words: a target is in no span that begins before it."""
  indices = np.arange(len(rows))
  batch, plain = rows.batch(indices), instances.batch(indices)
  for row in indices:
    spans = [places.tolist() for places in _spans_of(batch, row)]
    inner = {place for places in spans for place in places[1:]}
    learned = batch["loss_mask"][row] > 0
    seen_at = {places[0]: set(batch["tokens"][row, places].tolist()) for places in spans}
    for p in range(LENGTH):
      visible = {word for start, words in seen_at.items() if start <= p for word in words}
      if learned[p]:
        assert batch["targets"][row, p] not in visible
      # And all else that the row has to learn is learned.
      assert learned[p] == (plain["loss_mask"][row, p] > 0 and p + 1 not in inner)
    np.testing.assert_array_equal(
      batch["loss_mask"][row],
      plain["loss_mask"][row] * semi_causal_mask([(s[0], s[-1] + 1) for s in spans], LENGTH))


def test_no_span_holds_an_end_or_padding(rows):
  batch = rows.batch(np.arange(len(rows)))
  inside = batch["vector_index"] >= 0
  assert not np.isin(batch["tokens"][inside], [END, PAD, START]).any()


def test_weights_make_the_mean_over_rows_one_over_tokens(rows):
  batch = rows.batch(np.arange(7))
  losses = np.random.default_rng(0).random((7, LENGTH)) * batch["loss_mask"]
  of_rows = losses.sum(axis=1) / batch["loss_mask"].sum(axis=1)
  np.testing.assert_allclose(
    (of_rows * batch["weight"]).mean(), losses.sum() / batch["loss_mask"].sum(), rtol=1e-6)


def test_without_spans_rows_are_causal(instances):
  rows = SpanRows(instances, NoSpans())
  batch, plain = rows.batch(np.arange(5)), instances.batch(np.arange(5))
  assert batch.keys() == {*plain, "weight"}
  for name, value in plain.items():
    np.testing.assert_array_equal(batch[name], value)


def test_prefixes_are_learned_from_their_end_on(instances):
  rows = SpanRows(instances, PrefixSpan(longest=20))
  batch = rows.batch(np.arange(len(rows)))
  for row in range(len(rows)):
    spans = _spans_of(batch, row)
    if not spans:
      assert batch["tokens"][row, 1] == END
      continue
    (places,) = spans
    assert places[0] == 1
    end = places[-1] + 1
    assert batch["loss_mask"][row, 0] == 1 and not batch["loss_mask"][row, 1 : end - 1].any()


def test_a_draw_is_a_function_of_seed_id_and_epoch(rows, instances):
  """Neither the other rows of a batch nor their order change a row; each of the three does."""
  indices = np.arange(len(rows))
  one, other = rows.batch(indices), SpanRows(instances, SAMPLER, seed=5).batch(indices[::-1])
  for name in one.keys() - {"weight"}:
    np.testing.assert_array_equal(one[name], other[name][::-1])
  for changed in (rows.batch(indices, 1), SpanRows(instances, SAMPLER, seed=6).batch(indices)):
    differ = (changed["vector_index"] != one["vector_index"]).any(axis=1)
    assert differ.mean() > 0.8
  epochs = np.where(indices % 2, 1, 0)
  first, second = (rows.batch(indices, epoch)["vector_index"] for epoch in (0, 1))
  np.testing.assert_array_equal(
    rows.batch(indices, epochs)["vector_index"], np.where(epochs[:, None], second, first))
  np.testing.assert_array_equal(
    rows.num_learned(indices, 1), rows.batch(indices, 1)["loss_mask"].sum(axis=1))


def test_chance_is_the_same_everywhere():
  """Bits that were drawn once: a run that goes on elsewhere must draw them again."""
  spans = RandomSpans(8, 0.4).spans(
    np.zeros(64, np.int32), np.zeros(64, bool), generator(5, 123456789012345, 2))
  assert spans.tolist() == [[1, 9], [20, 25], [28, 33], [35, 41], [52, 57]]
  assert generator(5, 2**62, 0).integers(0, 1000, 4).tolist() == [505, 730, 31, 884]


def test_a_source_begins_anywhere_and_draws_anew_in_each_epoch(rows):
  source = Epochs(rows.batch, len(rows), 4, seed=2, whole=True, by_epoch=True)
  steps = len(rows) // 4
  batches = [source.batch(step) for step in range(2 * steps)]
  resumed = Epochs(rows.batch, len(rows), 4, seed=2, whole=True, by_epoch=True)
  for step in (2 * steps - 1, steps, 1):
    jax.tree.map(np.testing.assert_array_equal, resumed.batch(step), batches[step])

  def by_id(some):
    return {i: v.tolist() for b in some for i, v in zip(b["example_id"], b["vector_index"])}

  first, second = by_id(batches[:steps]), by_id(batches[steps:])
  both = first.keys() & second.keys()
  assert len(both) > steps and sum(first[i] != second[i] for i in both) > len(both) / 2


def test_counts(rows):
  batch, counts = rows.batch(np.arange(9)), rows.counts(np.arange(9))
  spans = [_spans_of(batch, row) for row in range(9)]
  assert counts == {
    "rows": 9, "rows_without_span": sum(not of_row for of_row in spans),
    "spans": sum(map(len, spans)), "encoded_tokens": sum(len(s) for row in spans for s in row),
    "learned_tokens": int(batch["loss_mask"].sum())}


def test_refusals(instances):
  with pytest.raises(ValueError, match="up to 8 tokens, which take 9 positions .* encoder has 8"):
    SpanRows(instances, SAMPLER, encoder_positions=8)
  SpanRows(instances, SAMPLER, encoder_positions=9)
  with pytest.raises(ValueError, match="needs rows of more than 321 tokens"):
    SpanRows(instances, RandomSpans())

  class Given:
    def __init__(self, *spans):
      self.given = np.array(spans)

    def spans(self, tokens, document_ends, rng):
      return self.given

    def encoder_length(self, length):
      return 8

    def longest_span(self, length):
      return length

  identifier = int(instances.ids[0])
  with pytest.raises(ValueError, match=f"^the example {identifier} has the span .* overlaps"):
    SpanRows(instances, Given((2, 4), (3, 5))).batch([0])
  with pytest.raises(ValueError, match="row 0 of a batch has 2 spans, which take 9 places"):
    SpanRows(instances, Given((1, 4), (6, 10))).batch([0])

  class Unlearned:
    length, bos_id, eos_id, pad_id = 4, START, END, PAD

    def batch(self, indices):
      row = {"tokens": [[3, 5, 6, 7]], "targets": [[5, 6, 7, 0]]}
      return {**{name: np.array(value, np.int32) for name, value in row.items()},
              "loss_mask": np.zeros((1, 4), np.float32), "example_id": np.array([17])}

  with pytest.raises(ValueError, match="the example 17 has no token to learn"):
    SpanRows(Unlearned(), NoSpans()).batch([0])


def test_the_row_of_an_error_is_the_right_one():
  tokens = np.arange(30, dtype=np.int32).reshape(3, 10)
  spans = [np.zeros((0, 2), np.int32), np.array([(1, 3)]), np.array([(1, 2), (2, 5)])]
  check_spans(spans[2], 10, "row")
  got = encoded_spans(tokens, spans, 6, bos_id=90, pad_id=99)
  assert got["encoder_tokens"].tolist() == [
    [99] * 6, [90, 11, 12, 99, 99, 99], [90, 21, 90, 22, 23, 24]]
  assert got["vector_index"].tolist() == [
    [-1] * 10, [-1, 1, 2, *[-1] * 7], [-1, 1, 3, 4, 5, *[-1] * 5]]
  with pytest.raises(ValueError, match="row 2 of a batch has 2 spans, which take 6 places"):
    encoded_spans(tokens, spans, 5, bos_id=90, pad_id=99)
