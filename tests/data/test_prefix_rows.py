"""Pictures and beginnings of texts that an encoder reads, against the examples they are made of."""

from collections import Counter

import numpy as np
import pytest

from lmops_jax.data import ImageRows, ImageSettings, PrefixRows, PromptPrefix, RandomPrefix
from lmops_jax.data.image_rows import write_rows
from lmops_jax.data.image_tokens import ImageTokens, encode_records
from lmops_jax.data.mixture import Mixture
from lmops_jax.data.multimodal import Record, drawn
from lmops_jax.training.sources import Epochs, Groups, Part

IDS = ImageTokens(
  vocab_size=300, bos_id=0, pad_id=1, eos_id=2, image_id=290, image_end_id=291, line_end_id=292,
  num_slots=3)
SETTINGS = ImageSettings(4, 4)
BLOCK = len(IDS.block)


class Letters:
  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


def _picture(number):
  return drawn(np.full((4, 4, 3), number, np.uint8), f"picture {number}")


def _records(num=30, pictured=0.7, prompt=""):
  rng = np.random.default_rng(0)
  for i in range(num):
    text = "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 9)))
    texts = (prompt, text) if prompt else (text,)
    parts = (_picture(i + 1), *texts) if rng.random() < pictured else texts
    yield Record(1000 + i, parts, len(parts) - 1 if prompt else 0, f"row {i}")


def _rows(folder, records, pictures=3, length=40):
  write_rows(folder, encode_records(records, Letters(), IDS), IDS, length=length,
             pictures_per_row=pictures, pictures_per_example=min(pictures, 2))
  return ImageRows(folder, SETTINGS)


def _examples(batch, row):
  """Of each example of a row: what of its text is read, the whole text, what is learned of it, the
  value of its picture's pixels, and how its segments are numbered."""
  get = {name: value[row] for name, value in batch.items()}
  e, found = len(get["encoder_tokens"]), []
  for example in range(1, get["segment_ids"].max() + 1):
    at = np.flatnonzero(get["segment_ids"] == example)
    index = get["vector_index"][at]
    slots = index[index >= e] - e
    assert len(slots) in (0, IDS.num_slots)
    if len(slots):
      picture = slots[0] // IDS.num_slots
      assert slots.tolist() == [picture * IDS.num_slots + m for m in range(IDS.num_slots)]
      pixels = int(get["images"][picture].max())
      segment = int(get["image_segments"][picture])
      assert segment > 0
    else:
      pixels = segment = 0
    inside = (index >= 0) & (index < e)
    words = at[inside]
    if len(words):
      columns = index[inside]
      assert (np.diff(columns) == 1).all() and (np.diff(words) == 1).all()
      assert get["encoder_positions"][columns].tolist() == list(range(1, 1 + len(words)))
      assert get["encoder_tokens"][columns].tolist() == get["tokens"][words].tolist()
      assert get["encoder_tokens"][columns[0] - 1] == IDS.bos_id
      (of_words,) = set(get["encoder_segments"][[columns[0] - 1, *columns]].tolist())
      assert segment in (0, of_words)  # a picture is read with the words behind it
      segment = of_words
    first = 1 + (BLOCK if pixels else 0)
    assert not len(words) or words[0] == at[first]
    whole = [*get["tokens"][at[first:]], get["targets"][at[-1]]]
    learned = get["targets"][at][get["loss_mask"][at] > 0]
    found.append((len(words), whole, learned.tolist(), pixels, segment))
  used = [segment for *_, segment in found if segment]
  assert used == list(range(1, len(used) + 1)) and get["encoder_segments"].max() == len(used)
  sizes = np.bincount(get["encoder_segments"], minlength=len(used) + 1)[1:]
  assert sizes.tolist() == [n + 1 for n, *_, segment in found if segment]
  return found


def test_beginnings_are_read_and_the_rest_is_learned(tmp_path):
  records = list(_records())
  rows = PrefixRows(_rows(tmp_path, records), RandomPrefix(), seed=1)
  batch = rows.batch(np.arange(len(rows)))
  assert {name: value.dtype.name for name, value in batch.items()} == {
    **dict.fromkeys(batch, "int32"), "images": "uint8", "loss_mask": "float32",
    "example_id": "int64"}
  found = [one for row in range(len(rows)) for one in _examples(batch, row)]
  assert len(rows) < len(found) == len(records)
  texts = {"".join(map(chr, whole[:-1])): (n, whole, learned, pixels)
           for n, whole, learned, pixels, _ in found}
  num_read = 0
  for record in records:
    n, whole, learned, pixels = texts[record.parts[-1]]
    assert 0 <= n < len(record.parts[-1]) and whole[-1] == IDS.eos_id
    if pixels:
      assert len(record.parts) == 2 and pixels == record.id - 999
      assert learned == whole[n:]
    else:  # what follows `<s>` is not learned in these rows
      assert len(record.parts) == 1 and learned == whole[max(n, 1):]
    num_read += n
  assert num_read > len(records)
  np.testing.assert_array_equal(
    rows.num_learned(np.arange(len(rows))), batch["loss_mask"].sum(axis=1))


def test_lengths_are_uniform():
  chance = (np.arange(6000) + 0.5) / 6000
  for room, want in ((100, 6), (3, 4)):
    lengths = RandomPrefix().lengths(np.full(6000, 6), None, chance, room)
    assert Counter(lengths.tolist()) == {n: 6000 // want for n in range(want)}


def test_a_prefix_is_a_function_of_seed_id_and_epoch(tmp_path):
  source = _rows(tmp_path, _records(120, 1.0), length=20, pictures=1)
  rows = PrefixRows(source, RandomPrefix(), seed=1)
  indices = np.arange(len(rows))
  one, other = rows.batch(indices), PrefixRows(source, RandomPrefix(), 1).batch(indices[::-1])
  for name in one:
    np.testing.assert_array_equal(one[name], other[name][::-1])
  epochs = np.where(indices % 2, 3, 0)
  mixed, third = rows.batch(indices, epochs), rows.batch(indices, 3)
  for name in one:
    np.testing.assert_array_equal(mixed[name][::2], one[name][::2])
    np.testing.assert_array_equal(mixed[name][1::2], third[name][1::2])

  def lengths(batch):
    return (batch["encoder_positions"] > 0).sum(axis=1)

  for changed in (third, PrefixRows(source, RandomPrefix(), seed=2).batch(indices)):
    assert (lengths(changed) != lengths(one)).mean() > 0.5
  num_words = np.array([len(r.parts[-1]) for r in _records(120, 1.0)])
  share = lengths(one) / np.maximum(num_words - 1, 1)
  assert 0.35 < share[num_words > 1].mean() < 0.65  # uniform on 0 to n - 1


def test_sources_draw_anew_in_each_epoch(tmp_path):
  source = _rows(tmp_path, _records(24, 1.0), length=20, pictures=1)
  rows = PrefixRows(source, RandomPrefix(), seed=1)
  epochs = Epochs(rows.batch, len(rows), 6, 0, by_epoch=True)
  mixture = Mixture({"pairs": rows}, seed=4, by_epoch=True)
  groups = Groups({"pairs": Part(mixture, 3)}, 2)
  for made, prefix in ((epochs, ""), (groups, "pairs/")):
    seen = {}
    for step in range(8):  # two epochs of four steps
      batch = made.batch(step)
      tokens, masks = (batch[f"{prefix}{name}"].reshape(-1, 20) for name in ("tokens", "loss_mask"))
      for words, mask in zip(tokens.tolist(), masks.tolist()):
        seen.setdefault(tuple(words), []).append(mask)
    assert all(len(masks) == 2 for masks in seen.values())
    assert sum(a != b for a, b in seen.values()) > len(seen) / 3
    again = made.batch(5)
    for name, value in made.batch(5).items():
      np.testing.assert_array_equal(value, again[name])
  plain = Mixture({"pairs": source}, seed=4).batch(np.arange(30))
  np.testing.assert_array_equal(mixture.batch(np.arange(30))["tokens"], plain["tokens"])
  np.testing.assert_array_equal(
    mixture.num_learned(np.arange(60)), mixture.batch(np.arange(60))["loss_mask"].sum(axis=1))


def test_a_prompt_is_read_whole(tmp_path):
  rows = PrefixRows(_rows(tmp_path, _records(prompt="which?"), length=60), PromptPrefix())
  batch = rows.batch(np.arange(len(rows)))
  for row in range(len(rows)):
    for n, whole, learned, _, _ in _examples(batch, row):
      assert n == len("which?") and learned == whole[n:]
  narrow = PrefixRows(rows.rows, PromptPrefix(), encoder_positions=6)
  with pytest.raises(ValueError, match="example 1 of the row 1000 begins with 6 words for the enc"):
    narrow.batch([0])
  assert PrefixRows(rows.rows, RandomPrefix(), encoder_positions=6).batch(
    np.arange(len(rows)))["encoder_positions"].max() == 5
  with pytest.raises(ValueError, match="encoder_positions=1 must be 2 or more"):
    PrefixRows(rows.rows, PromptPrefix(), encoder_positions=1)


def test_texts_alone_and_rows_without_pictures(tmp_path):
  rows = PrefixRows(_rows(tmp_path, _records(pictured=0.0), pictures=0), RandomPrefix())
  batch = rows.batch(np.arange(len(rows)))
  assert not {"images", "image_segments"} & batch.keys()
  for row in range(len(rows)):
    for n, whole, learned, pixels, _ in _examples(batch, row):
      assert not pixels and learned == whole[max(n, 1):]


def test_other_documents_are_refused(tmp_path):
  for name, parts, num in (("two", (_picture(1), _picture(2), "a"), 2),
                           ("late", ("abc", _picture(1), "d"), 1)):
    rows = PrefixRows(_rows(tmp_path / name, [Record(5, parts, 0, "r")]), RandomPrefix())
    with pytest.raises(ValueError, match=f"example 1 of the row 5 has {num} pictures, not one in"):
      rows.batch([0])
  narrow = PrefixRows(
    _rows(tmp_path / "a", _records(9, 1.0)), RandomPrefix(), encoder_length=2)
  with pytest.raises(ValueError, match="places of the encoder with their start tokens"):
    narrow.batch(np.arange(len(narrow)))
