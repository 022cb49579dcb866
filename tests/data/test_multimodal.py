"""Rows, files and shards to records of texts and pictures."""

import base64
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lmops_jax.data import ImageJsonl, ImageParquet, ImageSettings, TarShards, Tfds, TfdsImages
from lmops_jax.data.documents import document_id
from lmops_jax.data.multimodal import (
  LeftOut,
  Picture,
  drawn,
  parse_row,
  parts_of,
  picture_beside,
  sound,
)


def png(seed, size=6):
  rng = np.random.default_rng(seed)
  file = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
  return file.getvalue()


def _named(entry, where):
  return Picture(where, path=entry)


def _shown(record_or_parts):
  """Texts as they are, pictures by their path."""
  return [part if isinstance(part, str) else [part.path] for part in record_or_parts]


@pytest.mark.parametrize("row, want, num_given", [
  ({"text": " a dog "}, ["a dog"], 0),
  ({"images": "x", "text": "a dog"}, [["x"], "a dog"], 0),
  ({"images": ["x"], "text": "look: <image>"}, ["look:", ["x"]], 0),
  ({"images": ["x", "y"], "text": "<image>a<image> b "}, [["x"], "a", ["y"], "b"], 0),
  ({"images": ["x", "y"], "text": "<image><image>b"}, [["x"], ["y"], "b"], 0),
  ({"images": None, "text": "b"}, ["b"], 0),
  ({"prompt": "q", "completion": "a"}, ["q", "a"], 1),
  ({"prompt": " q:", "completion": " a "}, ["q:", " a"], 1),
  ({"images": ["x"], "prompt": "q:  <image> ", "completion": " a"}, ["q:", ["x"], " a"], 2),
  ({"images": ["x"], "prompt": "q", "completion": "a"}, [["x"], "q", "a"], 2),
  ({"images": ["x"], "prompt": "", "completion": "a"}, [["x"], "a"], 1),
  ({"images": ["x", "y"], "prompt": "<image>q<image>", "completion": "a"},
   [["x"], "q", ["y"], "a"], 3),
  ({"parts": ["<image> is a tag", {"image": "x"}, {"text": "b"}, " "]},
   ["<image> is a tag", ["x"], "b"], 0),
  ({"parts": [{"text": "a", "image": None}, {"text": None, "image": "x"}]}, ["a", ["x"]], 0),
])
def test_forms_of_a_row(row, want, num_given):
  parts, given = parse_row(row, "f:1", _named)
  assert _shown(parts) == want and given == num_given


def test_a_drawn_picture_with_its_text():
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  parts, num_given = parts_of("<image> It is", [drawn(pixels, "scene 3")], "scene 3", " red")
  assert parts[1:] == ("It is", " red") and num_given == 2
  got = ImageSettings(5, 7).pixels(parts[0].read(), parts[0].where)
  np.testing.assert_array_equal(got, pixels)
  with pytest.raises(ValueError, match="scene 3 has 0 pictures and its text 1 places"):
    parts_of("<image>", [], "scene 3")


@pytest.mark.parametrize("row, message", [
  ({"images": ["x"], "text": "a<image>b<image>"}, "f:1 has 1 pictures and its text 2 places"),
  ({"images": ["x", "y"], "text": "a"}, "f:1 has 2 pictures and its text 0 places"),
  ({"text": "a<image>"}, "f:1 has 0 pictures and its text 1 places"),
  ({"body": "a"}, 'f:1 has the fields body; a row has "text"'),
  ({"prompt": "a"}, "f:1 has the fields prompt"),
  ({"text": 3}, "f:1: field 'text' holds a int"),
  ({"parts": "a"}, "f:1: field 'parts' holds a str"),
  ({"parts": ["a", {"picture": "x"}]}, "f:1 part 2 is {'picture': 'x'}; a part is"),
  ({"parts": [{"text": "a", "image": "x"}]}, "f:1 part 1 is"),
])
def test_other_rows_are_named(row, message):
  with pytest.raises(ValueError) as caught:
    parse_row(row, "f:1", _named)
  assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "pictures").mkdir()
  for i in range(3):
    (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
  return tmp_path


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_json_lines_name_files_beside_them_or_hold_them(folder):
  rows = [
    {"images": ["pictures/0.png"], "text": "zero"},
    {"images": [str(folder / "pictures/1.png")], "text": "one", "name": "b"},
    {"images": [{"bytes": base64.b64encode(png(2)).decode()}], "text": "two"},
    {"images": [{"path": "pictures/2.png"}], "text": ""},
    {"text": "half \ud800 a character"},
  ]
  left_out = LeftOut()
  records = list(ImageJsonl(_write(folder / "a.jsonl", rows)).records(left_out))
  assert [record.source for record in records] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
  assert records[0].id == document_id("a.jsonl:1")
  assert [record.pictures[0].read() for record in records] == [png(0), png(1), png(2)]
  assert [record.parts[1] for record in records] == ["zero", "one", "two"]
  assert left_out.counts == {"empty": 1, "undecodable": 1}
  assert left_out.named["empty"] == ["a.jsonl:4"]


def test_a_moved_corpus_is_the_same(folder, tmp_path_factory):
  _write(folder / "a.jsonl", [{"images": ["pictures/0.png"], "text": "zero"}])
  there = tmp_path_factory.mktemp("there") / "copy"
  folder.rename(there)
  left_out = LeftOut()
  first, = ImageJsonl(str(there)).records(left_out)
  assert left_out.counts == {"other_ending": 3}  # the pictures
  assert left_out.named["other_ending"][0] == "pictures/0.png"
  assert first.id == document_id("a.jsonl:1") and first.pictures[0].read() == png(0)
  fingerprint = ImageJsonl(str(there)).fingerprint()
  assert fingerprint == ImageJsonl(str(there)).fingerprint()
  assert fingerprint != ImageJsonl(str(there), text_field="caption").fingerprint()


@pytest.mark.parametrize("row, message", [
  ({"images": ["pictures/9.png"]}, "a.jsonl:1 names the picture pictures/9.png, and there is no"),
  ({"images": ["pictures"]}, "a.jsonl:1 names the picture pictures, and there is no file"),
  ({"images": ["https://a.b/c.png"]}, "a.jsonl:1 names https://a.b/c.png, an address and no file"),
  ({"images": [7]}, "a.jsonl:1 is 7; a picture is a path"),
  ({"images": [{"url": "x"}]}, "a.jsonl:1 is {'url': 'x'}; a picture is a path"),
  ({"images": [{"bytes": "%"}]}, 'a.jsonl:1: "bytes" holds no base64'),
  ({"images": ["pictures/0.png", "nowhere"]}, "a.jsonl:1 picture 2 names the picture nowhere"),
])
def test_what_is_no_picture_is_named(folder, row, message):
  path = _write(folder / "a.jsonl", [{"text": "t", **row}])
  with pytest.raises(ValueError) as caught:
    list(ImageJsonl(path).records())
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_corpus_says_what_it_left_out(folder):
  path = _write(folder / "a.jsonl", [{"images": ["pictures/0.png"], "text": " "}])
  with pytest.raises(ValueError, match=r"is empty: it has no usable record \(1 empty left out\)"):
    list(ImageJsonl(path).records())
  with pytest.raises(ValueError, match="data.ImageJsonl.path=.* matches no file"):
    list(ImageJsonl(str(folder / "none")).records())


def test_pictures_that_cannot_be_read_are_counted_and_named(folder):
  (folder / "pictures" / "1.png").write_bytes(png(1)[:60])
  names = ["0.png", "1.png", "2.png"] * 100  # more than are tried at a time
  rows = [{"images": [f"pictures/{name}"], "text": f"t{i}"} for i, name in enumerate(names)]
  corpus = ImageJsonl(_write(folder / "a.jsonl", [*rows, {"text": "no picture"}]))
  for num_threads in (1, 5):
    left_out = LeftOut()
    kept = list(sound(corpus.records(), ImageSettings(4, 4), left_out, num_threads=num_threads))
    want = [f"t{i}" for i, name in enumerate(names) if name != "1.png"]
    assert [record.parts[-1] for record in kept] == [*want, "no picture"]
    assert left_out.counts == {"unreadable": 100} and len(left_out.named["unreadable"]) == 20
    assert "1.png is cut off or damaged" in left_out.named["unreadable"][0]


def test_parquet_holds_pictures_or_names_them(folder):
  table = pyarrow.table({
    "images": [[{"bytes": png(0), "path": None}], [{"bytes": None, "path": "pictures/1.png"}], []],
    "text": ["zero", "one", "none"], "other": [1, 2, 3],
  })
  pyarrow.parquet.write_table(table, folder / "a.parquet")
  left_out = LeftOut()
  records = list(ImageParquet(str(folder / "a.parquet")).records(left_out))
  assert left_out.counts == {"without_picture": 1}  # such as every row of another images_field
  assert [r.parts[-1] for r in records] == ["zero", "one", "none"]
  assert [p.read() for r in records for p in r.pictures] == [png(0), png(1)]
  table = pyarrow.table({"image": [png(2)], "caption": ["two"], "key": [5]})
  pyarrow.parquet.write_table(table, folder / "b.parquet")
  record, = ImageParquet(str(folder / "b.parquet"), "caption", "image", "key").records()
  assert record.id == 5 and record.pictures[0].read() == png(2) and record.parts[1] == "two"
  with pytest.raises(ValueError, match="has no field 'body' .* set data.ImageParquet.text_field"):
    list(ImageParquet(str(folder / "a.parquet"), "body").records())
  with pytest.raises(ValueError, match="has no field 'text' .it has caption, image, key.; set"):
    list(ImageParquet(str(folder / "b.parquet")).records())
  with pytest.raises(ValueError, match="has no field 'photo' .* set data.ImageParquet.images"):
    list(ImageParquet(str(folder / "b.parquet"), "caption", "photo").records())
  (folder / "c.parquet").write_bytes(b"PAR1 but no more")
  with pytest.raises(ValueError, match="c.parquet cannot be read as Parquet"):
    list(ImageParquet(str(folder / "c.parquet")).records())


def _shard(path, members):
  with tarfile.open(path, "w") as shard:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      shard.addfile(info, io.BytesIO(data))
  return str(path)


def test_the_files_of_a_sample_share_a_name(tmp_path):
  path = _shard(tmp_path / "a.tar", [
    ("000/0.png", png(0)), ("000/0.txt", b"zero"), ("000/0.json", b"{}"),
    ("000/1.txt", b"one"), ("000/1.png", png(1)),
    ("README", b"no sample"), ("000/2.png", png(2)), ("000/3.txt", b"no picture"),
    ("000/4.png", png(4)), ("000/4.png", png(5)), ("000/4.txt", b"\xff"),
  ])
  left_out = LeftOut()
  records = list(TarShards(path).records(left_out))
  assert [(r.source, r.parts[1]) for r in records] == [
    ("a.tar:000/0", "zero"), ("a.tar:000/1", "one")]
  assert [r.pictures[0].read() for r in records] == [png(0), png(1)]
  assert left_out.counts == {
    "other_member": 1, "incomplete": 2, "duplicate_member": 1, "undecodable": 1}
  assert left_out.named["incomplete"][1].endswith("a.tar sample 000/3 has no picture")


def test_a_table_may_hold_several_forms(folder):
  columns = {
    "text": [None, "<image>b", None], "prompt": ["q", None, None], "completion": ["a", None, None],
    "parts": [None, None, [{"text": "c", "image": None}, {"text": None, "image": png(1)}]],
    "images": [[png(0)], [png(2)], None],
  }
  pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
  records = list(ImageParquet(str(folder / "a.parquet")).records())
  texts = [[part for part in record.parts if isinstance(part, str)] for record in records]
  assert texts == [["q", "a"], ["b"], ["c"]]
  assert [p.read() for record in records for p in record.pictures] == [png(0), png(2), png(1)]
  assert [record.num_given for record in records] == [2, 0, 0]


def test_which_members_are_pictures_may_be_said(tmp_path):
  path = _shard(tmp_path / "a.tar", [
    ("a.png", png(0)), ("a.mask.png", png(1)), ("a.txt", b"one of two")])
  with pytest.raises(ValueError, match="sample a has 2 pictures and its text 0 places"):
    list(TarShards(path).records())
  record, = TarShards(path, picture_members=["png"]).records()
  assert record.pictures[0].read() == png(0) and record.parts[1:] == ("one of two",)


def test_the_json_of_a_sample_is_a_row(tmp_path):
  row = {"text": "<image>left<image>right", "images": ["1.png", "0.png"]}
  plain = {"caption": "alone", "text": "other"}
  path = _shard(tmp_path / "a.tar", [
    ("a.json", json.dumps(row).encode()), ("a.0.png", png(0)), ("a.1.png", png(1)),
    ("b.png", png(2)), ("b.json", json.dumps(plain).encode()),
    ("c.json", b"{"), ("c.png", png(3)),
  ])
  left_out = LeftOut()
  records = list(TarShards(path, text_member="json").records(left_out))
  assert [p.read() for r in records for p in r.pictures] == [png(1), png(0), png(2)]
  assert left_out.counts == {"unreadable": 1} and "sample c" in left_out.named["unreadable"][0]
  _shard(tmp_path / "a.tar", [("b.png", png(2)), ("b.json", json.dumps(plain).encode())])
  record, = TarShards(path, "json", "caption").records()
  assert record.parts[1] == "alone"


def test_a_picture_that_a_sample_does_not_hold_is_counted_and_named(tmp_path):
  path = _shard(tmp_path / "a.tar", [
    ("a.png", png(2)), ("a.json", b'{"text": "t", "images": ["x.png"]}'),
    ("b.json", b'{"text": "u", "images": ["b.png"]}'), ("b.png", png(3)),
    ("c.json", b'{"text": "v", "images": [7]}')])
  left_out = LeftOut()
  record, = TarShards(path, "json").records(left_out)
  assert record.parts[1] == "u" and record.pictures[0].read() == png(3)
  assert left_out.counts == {"unreadable": 2}
  assert left_out.named["unreadable"][0].endswith(
    "sample a names the picture 'x.png', and the sample has png")
  _shard(tmp_path / "a.tar", [("a.png", png(2)), ("a.json", b'{"text": "<image>t<image>"}')])
  with pytest.raises(ValueError, match="sample a has 1 pictures and its text 2 places"):
    list(TarShards(path, "json").records())


def test_of_a_damaged_shard_the_rest_is_named(tmp_path):
  members = [(f"{i}.{kind}", data) for i in range(4)
             for kind, data in (("png", png(i, 40)), ("txt", b"caption"))]
  whole = _shard(tmp_path / "whole.tar", members)
  data = open(whole, "rb").read()
  want = list(TarShards(whole).records())
  assert len(want) == 4
  third = want[2].pictures[0]
  for name, damaged, num_left in [
    ("cut in a picture", data[: third.offset + 100], 2),
    ("cut at a header", data[: third.offset - 512], 2),
    ("cut behind a header", data[: third.offset], 2),
    ("no header", data[: third.offset - 512] + b"x" * 2048 + data[third.offset + 1536 :], 2),
  ]:
    path = tmp_path / "damaged.tar"
    path.write_bytes(damaged)
    left_out = LeftOut()
    got = list(TarShards(str(path)).records(left_out))
    assert [r.parts[1] for r in got] == ["caption"] * num_left, name
    assert left_out.counts["unreadable"] == 1, name
    assert "damaged.tar" in left_out.named["unreadable"][0]
  for content in (b"", b"no tar" * 200):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is empty: .*\(1 unreadable left out\)"):
      list(TarShards(str(path)).records())


def test_a_member_that_is_no_picture_is_counted_and_named(tmp_path):
  bad = {"1": png(1, 40)[:90], "2": b"", "4": b"<html>not found</html>"}
  path = _shard(tmp_path / "a.tar", [
    member for i in "01234" for member in (
      (f"{i}.png", bad.get(i, png(int(i), 40))), (f"{i}.txt", b"caption " + i.encode()))])
  left_out = LeftOut()
  kept = list(sound(TarShards(path).records(), ImageSettings(4, 4), left_out))
  assert [record.parts[1] for record in kept] == ["caption 0", "caption 3"]
  assert left_out.counts == {"unreadable": 3}
  for named, i, why in zip(left_out.named["unreadable"], "124", (
    "is cut off or damaged", "is empty, not a picture", "is not a picture in a format")):
    assert f"a.tar member {i}.png {why}" in named


def test_a_shard_that_shrank_is_named(tmp_path):
  path = _shard(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"zero")])
  record, = TarShards(path).records()
  (tmp_path / "a.tar").write_bytes(b"short" * 103)
  with pytest.raises(ValueError, match="a.tar member 0.png ends after 3 of its"):
    record.pictures[0].read()


@pytest.mark.parity
def test_samples_are_those_of_webdataset(tmp_path):
  webdataset = pytest.importorskip("webdataset", reason="needs pip install -e '.[parity]'")
  path = _shard(tmp_path / "a.tar", [
    ("x/0.jpg", png(0)), ("x/0.txt", b"zero"), ("x/1.b.jpg", png(1)), ("x/1.txt", b"one"),
    ("y/1.TXT", b"two"), ("y/1.JPG", png(2)), ("z.jpg", png(3)), ("z.txt", b"three"),
  ])
  theirs = {sample["__key__"]: sample for sample in webdataset.WebDataset(
    path, shardshuffle=False, empty_check=False)}
  ours = {r.source.split(":")[1]: r for r in TarShards(path).records()}
  assert ours.keys() == theirs.keys() == {"x/0", "x/1", "y/1", "z"}
  for key, record in ours.items():
    sample = theirs[key]
    assert record.parts[1] == sample["txt"].decode()
    assert record.pictures[0].read() == next(v for k, v in sample.items() if k.endswith("jpg"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A tfds dataset of pictures with a class and captions."""
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict({
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    "caption": tfds.features.Text(),
    "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
  })
  examples = [
    {"image": np.asarray(Image.open(io.BytesIO(png(i)))), "label": i % 2, "caption": f"c{i}",
     "captions": {"text": [f"c{i}a", f"c{i}b"]}}
    for i in range(3)
  ]
  folder = tmp_path_factory.mktemp("tfds")
  tfds.dataset_builders.store_as_tfds_dataset(
    name="few", version="1.0.0", features=features, data_dir=folder,
    split_datasets={"train": list(enumerate(examples))},
    file_format="array_record", disable_shuffling=True)
  return Tfds(str(folder / "few" / "1.0.0"))


@pytest.mark.parametrize("field, want", [
  ("caption", ["c0", "c1", "c2"]),
  ("captions/text", ["c0a", "c0b", "c1a", "c1b", "c2a", "c2b"]),
  ("label", ["cat", "dog", "cat"]),
])
def test_pairs_of_a_tfds_dataset(prepared, field, want):
  records = list(TfdsImages(prepared, text_field=field).records())
  assert [record.parts[1] for record in records] == want
  assert len({record.id for record in records}) == len(want)
  settings = ImageSettings(6, 6)
  for record in records:
    number = int(record.source.split(":")[1].split("#")[0])
    got = settings.pixels(record.pictures[0].read(), "x")
    np.testing.assert_array_equal(got, settings.pixels(png(number), "y"))


def test_fields_of_a_tfds_dataset_are_named(prepared):
  with pytest.raises(ValueError, match="has no feature 'picture' .* set data.TfdsImages.image_f"):
    list(TfdsImages(prepared, image_field="picture").records())
  with pytest.raises(ValueError, match="has no field 'text' .* set data.TfdsImages.text_field"):
    list(TfdsImages(prepared, text_field="text").records())


def test_paths_of_other_kinds_are_refused(folder):
  import os

  os.mkfifo(folder / "pipe")
  with pytest.raises(ValueError, match="pipe is a FIFO"):
    picture_beside(folder)("pipe", "f:1")
