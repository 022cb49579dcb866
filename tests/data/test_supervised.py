"""Rows to sequences: which tokens are learned, packing, what is too long."""

import gzip
import json

import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.data import supervised
from tests import model_folders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return pretrained.load(str(model_folders.write(tmp_path_factory.mktemp("model")))).tokenizer()


def _learned_text(tokenizer, example):
  return tokenizer.decode(
    [t for t, learned in zip(example.tokens, example.learned) if learned], skip_special=False
  )


def test_a_text_is_learned_whole_with_its_end(tokenizer):
  example = supervised.encode_row(tokenizer, {"text": "abc"}, 7, "f:1")
  assert example.tokens == [0, *tokenizer.encode("abc", False), 1] and example.id == 7
  assert example.learned == [False, True, True, True, True]


def test_of_a_prompt_the_completion_is_learned(tokenizer):
  row = {"prompt": "ask: ", "completion": "yes"}
  example = supervised.encode_row(tokenizer, row, 0, "f:1")
  assert tokenizer.decode(example.tokens) == "ask: yes"
  assert _learned_text(tokenizer, example) == "yes</s>"


def test_a_row_that_writes_its_own_bos_has_it_once(tokenizer):
  for row in ({"text": "abc"}, {"prompt": "ab", "completion": "c"}):
    first = next(iter(row))
    want = supervised.encode_row(tokenizer, row, 0, "f:1")
    assert supervised.encode_row(tokenizer, {**row, first: "<s>" + row[first]}, 0, "f:1") == want


def test_of_a_conversation_the_assistants_turns_are_learned(tokenizer):
  messages = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"}, {"role": "assistant", "content": "ciao"},
  ]
  example = supervised.encode_row(tokenizer, {"messages": messages}, 0, "f:1")
  assert tokenizer.decode(example.tokens) == (
    "[user] hi\n[assistant] hello\n[user] bye\n[assistant] ciao\n"
  )
  assert _learned_text(tokenizer, example) == "hello\nciao\n"


@pytest.mark.parametrize(
  "row,message",
  [
    ({"body": "x"}, "f:1 has the fields body; a row has"),
    ({"prompt": "x"}, "f:1 has the fields prompt; a row has"),
    ({"text": 3}, "f:1: field 'text' holds a int, not a text"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "without a turn of the assistant"),
  ],
)
def test_other_rows_are_named(tokenizer, row, message):
  with pytest.raises(ValueError, match=message):
    supervised.encode_row(tokenizer, row, 0, "f:1")


def _examples(lengths):
  rng = np.random.default_rng(0)
  return [
    supervised.Example(
      i, rng.integers(2, 50, n).tolist(), [False, *[j % 2 == 0 for j in range(n - 1)]]
    )
    for i, n in enumerate(lengths)
  ]


@pytest.mark.parametrize("pack", [True, False])
def test_every_row_stands_in_a_sequence_once(pack):
  examples = _examples([5, 9, 3, 4, 2, 7, 9])
  data = supervised.build(examples, 8, pad_id=0, pack=pack)
  assert data.counts["rows"] == 7
  assert data.counts["tokens"] == sum(len(e.tokens) - 1 for e in examples)
  assert (data.counts["sequences"] == 7) is not pack
  found = []
  for row in range(len(data)):
    segments = data.arrays["segment_ids"][row]
    for segment in range(1, segments.max() + 1):
      place = segments == segment
      a = {name: array[row][place] for name, array in data.arrays.items()}
      np.testing.assert_array_equal(a["positions"], np.arange(place.sum()))
      found.append((a["tokens"].tolist(), a["targets"].tolist(), a["loss_mask"].tolist()))
    assert not data.arrays["loss_mask"][row][segments == 0].any()
  want = [(e.tokens[:-1], e.tokens[1:], [float(x) for x in e.learned[1:]]) for e in examples]
  assert sorted(found) == sorted(want)


def test_too_long_rows_are_dropped_cut_or_refused_and_counted():
  examples = _examples([12, 5])
  dropped = supervised.build(examples, 8, pad_id=0)
  assert (dropped.counts["dropped"], dropped.counts["cut"], dropped.counts["rows"]) == (1, 0, 1)
  cut = supervised.build(examples, 8, pad_id=0, too_long="cut")
  assert (cut.counts["dropped"], cut.counts["cut"], cut.counts["rows"]) == (0, 1, 2)
  assert cut.arrays["tokens"][0].tolist() == examples[0].tokens[:8]
  with pytest.raises(ValueError, match="a row of 12 tokens exceeds the length 8"):
    supervised.build(examples, 8, pad_id=0, too_long="error")
  with pytest.raises(ValueError, match="no row of the train part is left: 1 have more than 8 tok"):
    supervised.build(examples[:1], 8, pad_id=0)
  with pytest.raises(ValueError, match="too_long='skip' is not one of"):
    supervised.build(examples, 8, pad_id=0, too_long="skip")


def test_weights_make_the_mean_over_rows_one_over_learned_tokens(tmp_path):
  data = supervised.build(_examples([5, 9, 3, 4, 2, 7, 9]), 8, pad_id=0)
  supervised.save(tmp_path / "set", data)
  again = supervised.load(tmp_path / "set")
  assert again.ids.tolist() == [0, 1, 3, 5, 6]  # of the first row in each sequence
  batch = again.batch([2, 0, 1])
  losses = np.random.default_rng(1).random((3, 8))
  mask = batch["loss_mask"]
  per_row = (losses * mask).sum(1) / mask.sum(1)
  assert np.mean(per_row * batch["weight"]) == pytest.approx((losses * mask).sum() / mask.sum())
  np.testing.assert_array_equal(batch["tokens"], data.arrays["tokens"][[2, 0, 1]])
  assert again.counts == data.counts
  np.testing.assert_array_equal(again.num_learned([2, 0, 1]), mask.sum(axis=1))
  np.testing.assert_array_equal(batch["example_id"], data.ids[[2, 0, 1]])
  (tmp_path / "set" / "ids.npy").unlink()
  with pytest.raises(ValueError, match="ids.npy is missing; delete the folder of the stage"):
    supervised.load(tmp_path / "set")


def test_a_file_saved_on_windows_and_half_a_character(tokenizer, tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\r\n{"text": "\\ud800"}\r\n')
  with pytest.raises(ValueError, match="a.jsonl:2 holds half a character"):
    supervised.read_examples(tmp_path / "a.jsonl", tokenizer)


def test_files_may_be_compressed(tokenizer, tmp_path):
  lines = '{"text": "one"}\n\n{"prompt": "two", "completion": "three"}\n'
  with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
    file.write(lines)
  (tmp_path / "rows.jsonl").write_text(lines)
  packed = supervised.read_examples(tmp_path / "rows.jsonl.gz", tokenizer)
  plain = supervised.read_examples(tmp_path / "rows.jsonl", tokenizer)
  assert [e.tokens for e in packed] == [e.tokens for e in plain] and len(plain) == 2
  (tmp_path / "bad.jsonl").write_text(lines + json.dumps([1]))
  with pytest.raises(ValueError, match="bad.jsonl:4 holds a list"):
    supervised.read_examples(tmp_path / "bad.jsonl", tokenizer)
