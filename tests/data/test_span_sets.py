"""Rows to finetune on with encoded inputs: equal to those without an encoder, packed, counted."""


import numpy as np
import pytest

from lmops_jax.data import span_sets, supervised
from lmops_jax.data.multimodal import Picture, Record
from lmops_jax.data.span_examples import Read, behind, encode
from lmops_jax.data.supervised import Example


class Letters:
  bos_id, pad_id, eos_id = 0, 1, 2

  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


IDS = Letters()


def _records(num=40, longest=12):
  rng = np.random.default_rng(0)
  for i in range(num):
    prompt, answer = (
      "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, most)))
      for most in (longest, 4))
    yield Record(100 + i, (Read(prompt), answer), 1, f"file:{i + 1}")


def _examples(*records):
  return list(encode(records or _records(), IDS, IDS))


def test_rows_are_those_of_models_without_an_encoder():
  """The same tokens, targets, masks, positions and segments as `supervised.build` makes."""
  examples = _examples()
  made = span_sets.build(examples, IDS, 20)
  plain = supervised.build(
    [Example(e.id, e.tokens.tolist(), e.learned.tolist()) for e in examples], 20, pad_id=1)
  batch, want = (data.batch(np.arange(len(data))) for data in (made, plain))
  assert len(made) == len(plain) < len(examples)
  for name, value in want.items():
    np.testing.assert_array_equal(batch[name], value)
  assert batch.keys() - want.keys() == {
    "encoder_tokens", "encoder_positions", "encoder_segments", "vector_index"}
  np.testing.assert_array_equal(made.num_learned([3, 0]), plain.num_learned([3, 0]))
  assert made.counts == {
    **plain.counts, "encoded_tokens": sum(int(np.diff(e.spans).sum()) for e in examples)}


def test_each_input_is_read_by_itself_and_stands_at_its_words():
  examples = _examples()
  made = span_sets.build(examples, IDS, 20)
  batch = made.batch(np.arange(len(made)))
  found = []
  for row in range(len(made)):
    get = {name: value[row] for name, value in batch.items()}
    for segment in range(1, get["encoder_segments"].max() + 1):
      inside = np.flatnonzero(get["encoder_segments"] == segment)
      assert get["encoder_positions"][inside].tolist() == list(range(len(inside)))
      words = get["encoder_tokens"][inside]
      places = np.flatnonzero(np.isin(get["vector_index"], inside))
      assert words[0] == IDS.bos_id
      assert get["vector_index"][places].tolist() == inside[1:].tolist()
      assert get["tokens"][places].tolist() == words[1:].tolist()
      assert set(get["segment_ids"][places]) == {segment}
      assert get["loss_mask"][places].tolist() == [0] * (len(places) - 1) + [1]
      found.append("".join(map(chr, words[1:])))
    outside = (get["vector_index"] < 0) & (get["segment_ids"] > 0)
    assert (get["loss_mask"][outside] == (get["tokens"][outside] != IDS.bos_id)).all()
  assert sorted(found) == sorted(record.parts[0] for record in _records())


def test_several_spans_of_an_example():
  shots = _examples(*list(_records())[:2])
  both = [behind(shots, one, IDS) for one in _examples(*list(_records())[2:6])]
  made = span_sets.build(both, IDS, 60)
  batch = made.batch(np.arange(len(made)))
  assert batch["encoder_segments"].max(axis=1).sum() == 12
  assert batch["segment_ids"].max(axis=1).sum() == 4
  assert batch["loss_mask"].sum() == sum(e.learned.sum() for e in both)


def test_too_long():
  long = Record(5, (Read("a" * 30), "yes"), 1, "file:5")
  wordy = Record(6, (Read("a"), "b" * 30), 1, "file:6")
  fine = Record(7, (Read("abc"), "d"), 1, "file:7")
  dropped = span_sets.build(_examples(long, wordy, fine), IDS, 20)
  assert (dropped.counts["dropped"], dropped.counts["cut"], dropped.counts["rows"]) == (2, 0, 1)
  cut = span_sets.build(_examples(long, wordy, fine), IDS, 20, too_long="cut")
  assert (cut.counts["dropped"], cut.counts["cut"], cut.counts["rows"]) == (1, 1, 2)
  assert cut.batch([0])["vector_index"].max() == 16  # 20 less `<s>` and 3 letters
  by_encoder = span_sets.build(
    _examples(long, fine), IDS, 50, encoder_positions=9, too_long="cut")
  assert by_encoder.batch([0])["encoder_positions"].max() == 8
  with pytest.raises(ValueError, match="^file:5 has 5 tokens outside of spans and 30 in 1 of them, "
                     "the longest 30; a row takes 21 in all"):
    span_sets.build(_examples(fine, long), IDS, 20, too_long="error")
  with pytest.raises(ValueError, match="^file:6 has 32 tokens outside"):
    span_sets.build(_examples(fine, wordy), IDS, 20, too_long="error")
  with pytest.raises(ValueError, match="^file:5 .* one of which at most 8"):
    span_sets.build(_examples(long), IDS, 50, encoder_positions=9, too_long="error")
  with pytest.raises(ValueError, match="no example is left: 1 have more than 20"):
    span_sets.build(_examples(long), IDS, 20)


def test_the_room_of_the_encoder_counts_when_rows_are_packed():
  examples = _examples()
  roomy, narrow = (span_sets.build(examples, IDS, 40, encoder_length=e) for e in (40, 14))
  assert len(narrow) > len(roomy)
  assert narrow.batch(np.arange(len(narrow)))["encoder_tokens"].shape[1] == 14
  assert narrow.counts["learned_tokens"] == roomy.counts["learned_tokens"]
  short = [example for example in examples if example.num_places <= 6]
  tight = span_sets.build(examples, IDS, 40, encoder_length=6, too_long="cut")
  assert 0 < len(short) < len(examples)
  assert (tight.counts["rows"], tight.counts["dropped"]) == (
    len(short), len(examples) - len(short))
  alone = span_sets.build(examples, IDS, 40, pack=False)
  assert len(alone) == len(examples)


def test_refusals():
  picture = Record(1, (Picture("p", data=b"x"), Read("a"), "b"), 2, "file:1")
  with_ids = type("Ids", (Letters,), {"block": [9, 9, 9], "num_slots": 1})()
  with pytest.raises(ValueError, match="^file:1 has pictures, and these rows hold text alone"):
    span_sets.build(encode([picture], IDS, with_ids), with_ids, 20)
  prompt = encode([Record(1, (Read("a"),), 1, "file:1")], IDS, IDS, end=False)
  with pytest.raises(ValueError, match="^file:1 has no token to learn"):
    span_sets.build(prompt, IDS, 20)
  with pytest.raises(ValueError, match="encoder_positions=1 2 or more"):
    span_sets.build(_examples(), IDS, 20, encoder_positions=1)
  with pytest.raises(ValueError, match="too_long='no'"):
    span_sets.build(_examples(), IDS, 20, too_long="no")


def test_round_trip(tmp_path):
  made = span_sets.build(_examples(), IDS, 20, encoder_length=18)
  span_sets.save(tmp_path, made)
  loaded = span_sets.load(tmp_path)
  assert len(loaded) == len(made) and loaded.counts == made.counts
  for name, value in made.batch([2, 0]).items():
    np.testing.assert_array_equal(loaded.batch([2, 0])[name], value)
  (tmp_path / "spans.npy").unlink()
  with pytest.raises(ValueError, match=r"spans\.npy is missing; delete the folder"):
    span_sets.load(tmp_path)
