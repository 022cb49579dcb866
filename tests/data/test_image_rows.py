"""Rows with pictures: packing, what is stored, and that threads and caches change nothing."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import ImageRows, ImageSettings, image_rows, write_rows
from lmops_jax.data.image_tokens import ImageTokens, encode_records
from lmops_jax.data.multimodal import Picture, Record

IDS = ImageTokens(
  vocab_size=300, bos_id=0, pad_id=1, eos_id=2, image_id=290, image_end_id=291, line_end_id=292,
  num_slots=3)
SETTINGS = ImageSettings(5, 4)


class _Letters:
  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


def _png(seed):
  file = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def _examples(records):
  return encode_records(
    (Record(i, tuple(parts), 0, "") for i, parts in enumerate(records)), _Letters(), IDS)


def _here(seed):
  return Picture(f"picture {seed}", data=_png(seed))


def _documents(num=40, seed=0):
  """Documents of up to 3 pictures among texts of letters."""
  rng = np.random.default_rng(seed)
  documents, picture = [], 0
  for _ in range(num):
    parts = []
    for _ in range(rng.integers(1, 4)):
      if rng.random() < 0.6:
        parts.append(_here(picture))
        picture += 1
      parts.append("".join(chr(97 + i) for i in rng.integers(0, 26, rng.integers(1, 8))))
    documents.append(parts)
  return documents


def test_rows_hold_whole_examples_and_their_pictures(tmp_path):
  documents = _documents()
  examples = list(_examples(documents))
  counts = write_rows(tmp_path, examples, IDS, length=40, pictures_per_row=4,
                      pictures_per_example=3)
  rows = ImageRows(tmp_path, SETTINGS)
  batch = rows.batch(np.arange(len(rows)))
  assert {name: (value.dtype.name, value.shape[1:]) for name, value in batch.items()} == {
    **{name: ("int32", (40,)) for name in (
      "tokens", "targets", "positions", "segment_ids", "vector_index")},
    "loss_mask": ("float32", (40,)), "images": ("uint8", (4, 5, 4, 3)), "example_id": ("int64", ()),
  }
  found = {}
  for row in range(len(rows)):
    segments = batch["segment_ids"][row]
    first = [int(np.flatnonzero(segments == s)[0]) for s in range(1, segments.max() + 1)]
    assert first == sorted(first) and first[0] == 0
    num_pictures = 0
    for segment in range(1, segments.max() + 1):
      at = segments == segment
      tokens = [*batch["tokens"][row][at], batch["targets"][row][at][-1]]
      index = batch["vector_index"][row][at]
      words = [t for t, v in zip(tokens, [*index, -1]) if v < 0 and t not in (290, 291)]
      text = "".join(map(chr, words[1:-1]))
      example = examples[next(
        i for i, parts in enumerate(documents) if i not in found
        and "".join(p for p in parts if isinstance(p, str)) == text)]
      assert tokens == example.tokens.tolist()
      np.testing.assert_array_equal(batch["positions"][row][at], np.arange(at.sum()))
      np.testing.assert_array_equal(batch["loss_mask"][row][at], example.learned[1:])
      held = index[index >= 0]
      np.testing.assert_array_equal(held, 3 * num_pictures + np.arange(len(held)))
      for i, picture in enumerate(example.pictures):
        want = SETTINGS.pixels(picture.data, "x")
        np.testing.assert_array_equal(batch["images"][row, num_pictures + i], want)
      num_pictures += len(example.pictures)
      found[example.id] = row
    pads = segments == 0
    assert (batch["tokens"][row][pads] == 1).all() and not batch["loss_mask"][row][pads].any()
    assert (batch["vector_index"][row][pads] == -1).all()
    assert not batch["images"][row, num_pictures:].any()
    assert batch["example_id"][row] == min(i for i, r in found.items() if r == row)
  assert len(found) == len(documents) == counts["examples"] and len(rows) < len(documents)
  assert counts == rows.counts and counts["rows"] == len(rows)
  assert counts["learned_tokens"] == batch["loss_mask"].sum() == sum(
    example.learned.sum() for example in examples)
  assert counts["pictures"] == sum(len(example.pictures) for example in examples)
  assert not (batch["tokens"][batch["vector_index"] >= 0] == IDS.pad_id).any()
  np.testing.assert_array_equal(rows.num_learned([2, 0]), batch["loss_mask"][[2, 0]].sum(axis=1))


def test_threads_and_caches_change_nothing(tmp_path):
  write_rows(tmp_path, _examples(_documents()), IDS, length=40, pictures_per_row=4,
             pictures_per_example=3)
  want = ImageRows(tmp_path, SETTINGS, num_threads=1, cache_bytes=0)
  index = [3, 0, 3, 5]
  for other in (ImageRows(tmp_path, SETTINGS, num_threads=4),
                ImageRows(tmp_path, SETTINGS, num_threads=2, cache_bytes=0)):
    for _ in range(2):
      for name, value in other.batch(index).items():
        np.testing.assert_array_equal(value, want.batch(index)[name], err_msg=name)


def test_pictures_stay_where_they_are(tmp_path):
  (tmp_path / "a.png").write_bytes(_png(0))
  (tmp_path / "many").write_bytes(b"...." + _png(1) + _png(2))
  whole = Picture("a.png", str(tmp_path / "a.png"))
  sizes = [len(_png(i)) for i in (1, 2)]
  parts = [Picture("many", str(tmp_path / "many"), 4, sizes[0]),
           Picture("many", str(tmp_path / "many"), 4 + sizes[0], sizes[1])]
  documents = [[whole, "a"], [parts[0], "b"], [parts[1], "c"], [_here(3), "d"], [whole, "e"]]
  write_rows(tmp_path / "rows", _examples(documents), IDS, length=9, pictures_per_row=1,
             pictures_per_example=1, share=False)
  rows = ImageRows(tmp_path / "rows", SETTINGS)
  want = [SETTINGS.pixels(_png(i), "x") for i in (0, 1, 2, 3, 0)]
  np.testing.assert_array_equal(rows.images(np.arange(5))[:, 0], want)
  assert (tmp_path / "rows" / "pictures.bin").read_bytes() == _png(3)
  (tmp_path / "many").write_bytes(b"no longer")
  other = ImageRows(tmp_path / "rows", SETTINGS)
  with pytest.raises(ValueError, match="many bytes 4 to .* ends after 5 of its"):
    other.images([1])
  (tmp_path / "a.png").write_bytes(_png(0)[:70])
  with pytest.raises(ValueError, match="a.png is cut off or damaged"):
    other.batch([0])


def test_without_pictures_there_are_no_images(tmp_path):
  write_rows(tmp_path, _examples([["abc"], ["de"]]), IDS, length=8, pictures_per_row=0,
             pictures_per_example=0)
  batch = ImageRows(tmp_path, SETTINGS).batch([0])
  assert not batch.keys() & {"images", "vector_index"}
  assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]


def test_too_long_is_dropped_cut_or_an_error(tmp_path):
  documents = [["a" * 30], [_here(0), "b", _here(1), "c"], [_here(2), "d"]]

  def write(too_long, length=12, pictures=1):
    return write_rows(
      tmp_path, _examples(documents), IDS, length=length, pictures_per_row=pictures,
      pictures_per_example=pictures, too_long=too_long)

  counts = write("drop")
  assert (counts["examples"], counts["dropped"], counts["cut"]) == (1, 2, 0)
  counts = write("cut")
  assert (counts["examples"], counts["dropped"], counts["cut"]) == (3, 0, 2)
  rows = ImageRows(tmp_path, SETTINGS)
  np.testing.assert_array_equal(
    rows.images([1])[0, 0], SETTINGS.pixels(_png(0), "x"))
  assert rows.batch([1])["tokens"][0, :7].tolist() == [0, 290, 290, 290, 290, 291, 1]
  with pytest.raises(ValueError, match="the example 0 has 32 tokens and 0 pictures, and a row tak"):
    write("error")
  with pytest.raises(ValueError, match="too_long='trim' is not one of drop, cut, error"):
    write("trim")
  with pytest.raises(ValueError, match="length=5 has no room for a picture of 3 vectors and a w"):
    write("drop", length=5)
  with pytest.raises(ValueError, match="pictures_per_example=2 from 0 to pictures_per_row=1"):
    write_rows(tmp_path, [], IDS, length=9, pictures_per_row=1, pictures_per_example=2)
  documents = [["a" * 30]]
  with pytest.raises(ValueError, match="no example is left for .*: 1 have more than 12 tokens"):
    write("drop")
  with pytest.raises(ValueError, match="holds no finished rows"):  # nor those of before
    ImageRows(tmp_path, SETTINGS)


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"holds no finished rows \(rows.json"):
    ImageRows(tmp_path, SETTINGS)
  write_rows(tmp_path, _examples([["ab"]]), IDS, length=8, pictures_per_row=1,
             pictures_per_example=1)
  assert json.loads((tmp_path / "rows.json").read_text())["ids"]["image_id"] == 290
  (tmp_path / "targets.npy").unlink()
  with pytest.raises(ValueError, match="targets.npy cannot be read .*; write the rows again"):
    ImageRows(tmp_path, SETTINGS)


def test_the_arrays_of_a_row_are_a_function():
  first, second = _examples([[_here(0), "a"], [_here(1), _here(2), "b"]])
  row = image_rows.arrays_of([first, second], 24, IDS)
  assert row["vector_index"].tolist() == [
    -1, -1, 0, 1, 2, -1, -1, -1, -1, 3, 4, 5, -1, -1, 6, 7, 8, -1, -1, *[-1] * 5]
  assert row["segment_ids"].tolist() == [1] * 7 + [2] * 12 + [0] * 5
  assert row["loss_mask"].tolist() == [0] * 5 + [1] * 2 + [0] * 5 + [1] + [0] * 4 + [1] * 2 + [
    0] * 5
