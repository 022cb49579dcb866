import gzip
import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lmops_jax.data import Jsonl, Parquet, TextFolder, files
from lmops_jax.data.documents import document_id


def rows(start, stop):
  return [{"text": f"text {i}", "name": f"n{i}", "number": i, "label": "ab"[i % 2]}
          for i in range(start, stop)]


def lines(items):
  return "".join(json.dumps(item) + "\n" for item in items).encode()


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "data"
  (root / "deep").mkdir(parents=True)
  (root / "a.jsonl").write_bytes(lines(rows(0, 5)) + b"\n  \n")
  (root / "b.jsonl.gz").write_bytes(gzip.compress(lines(rows(5, 9))))
  # Two frames one after the other, as parallel compressors write them.
  frames = [zstandard.compress(lines(part)) for part in (rows(9, 11), rows(11, 14))]
  (root / "deep" / "c.jsonl.zst").write_bytes(b"".join(frames))
  (root / "ignored.txt").write_text("not JSON")
  return root


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl*"])
def test_jsonl_plain_and_compressed(folder, pattern):
  documents = {d.source: d for d in Jsonl(f"{folder}{pattern}").documents()}
  assert sorted(d.text for d in documents.values()) == sorted(f"text {i}" for i in range(14))
  assert documents["deep/c.jsonl.zst:3"].text == "text 11"
  assert documents["a.jsonl:1"].id == document_id("a.jsonl:1")


def test_ids_survive_a_move(folder, tmp_path):
  before = list(Jsonl(str(folder)).documents())
  folder.rename(tmp_path / "elsewhere")
  assert list(Jsonl(str(tmp_path / "elsewhere")).documents()) == before


def test_jsonl_fields(folder):
  corpus = Jsonl(f"{folder}/a.jsonl", text_field="name", id_field="number", kind_field="label")
  assert sorted(corpus.documents()) == [
    (i, f"n{i}", "ab"[i % 2], f"a.jsonl:{i + 1}") for i in range(5)
  ]
  named = Jsonl(f"{folder}/a.jsonl", id_field="name")
  assert {d.id for d in named.documents()} == {document_id(f"n{i}") for i in range(5)}


def test_fingerprint_follows_the_files(folder, monkeypatch):
  corpus = Jsonl(str(folder))
  before = corpus.fingerprint()
  assert Jsonl(str(folder)).fingerprint() == before
  assert Jsonl(str(folder), text_field="name").fingerprint() != before
  with (folder / "a.jsonl").open("ab") as file:
    file.write(lines(rows(20, 21)))
  changed = corpus.fingerprint()
  assert changed != before
  os.utime(folder / "a.jsonl", (5, 5))
  assert corpus.fingerprint() == changed
  monkeypatch.setattr(files, "_HASHED_BYTES", 1)  # too much to read: times stand for contents
  by_time = corpus.fingerprint()
  os.utime(folder / "a.jsonl", (6, 6))
  assert corpus.fingerprint() != by_time


@pytest.mark.parametrize("line,message", [
  (b'{"text": "cut off\n', r"a\.jsonl:6 is not valid JSON"),
  (b'["text"]\n', r"a\.jsonl:6 holds a list"),
  (b'{"txt": "x"}\n', r"a\.jsonl:6 has no field 'text' \(it has txt\); set data\.Jsonl\.text"),
  (b'{"text": 5}\n', r"a\.jsonl:6: field 'text' holds a int"),
  (b'{"text": ' + b"[" * 100_000, r"a\.jsonl:6 is JSON nested too deeply"),
  (b'{"text": ' + b"1" * 5000, r"a\.jsonl:6 holds a whole number of thousands of digits"),
  (b'{"text": NaN}\n', r"a\.jsonl:6: field 'text' holds a float"),
])
def test_bad_rows_are_named(folder, line, message):
  (folder / "a.jsonl").write_bytes(lines(rows(0, 5)) + line)
  with pytest.raises(ValueError, match=message):
    list(Jsonl(str(folder)).documents())


def test_missing_id_and_kind_fields_are_named(folder):
  with pytest.raises(ValueError, match=r"a\.jsonl:1 has no field 'key'.*data\.Jsonl\.id_field"):
    list(Jsonl(f"{folder}/a.jsonl", id_field="key").documents())
  with pytest.raises(ValueError, match=r"data\.Jsonl\.kind_field"):
    list(Jsonl(f"{folder}/a.jsonl", kind_field="key").documents())


def test_undecodable_and_empty_rows_are_counted(folder):
  bad = b'{"text": "caf\xe9"}\n' + b'{"text": "half a pair \\ud800"}\n' + b'{"text": "  "}\n'
  (folder / "a.jsonl").write_bytes(bad + b'{"text": null}\n' + lines(rows(0, 2)))
  counts = Counter()
  assert len(list(Jsonl(f"{folder}/a.jsonl").documents(counts))) == 2
  assert counts == {"undecodable": 2, "empty": 2}


@pytest.mark.parametrize("field", ["id_field", "kind_field"])
def test_half_a_character_in_an_id_or_kind_makes_a_row_undecodable(tmp_path, field):
  items = [{"text": "good", "label": "a"}, {"text": "bad", "label": "\udc80"}]
  (tmp_path / "a.jsonl").write_bytes(lines(items))
  counts = Counter()
  corpus = Jsonl(str(tmp_path), **{field: "label"})
  assert [d.text for d in corpus.documents(counts)] == ["good"] and counts == {"undecodable": 1}


def test_a_missing_field_is_told_of_a_row_with_half_a_character_in_its_names(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(lines([{"\udc80": 1}]))
  with pytest.raises(ValueError, match=r"it has \\udc80") as found:
    list(Jsonl(str(tmp_path)).documents())
  str(found.value).encode()


def test_the_limit_of_a_line_changes_no_fingerprint(folder):
  corpus = Jsonl(str(folder))
  assert Jsonl(str(folder), max_line_bytes=10).fingerprint() == corpus.fingerprint()
  with pytest.raises(ValueError, match=r"a\.jsonl:1 is longer than max_line_bytes=10.*data\.Jsonl"):
    list(Jsonl(str(folder), max_line_bytes=10).documents())


def test_what_is_beside_the_files_is_counted_once_by_the_whole_and_by_pieces(folder):
  (folder / ".ipynb_checkpoints").mkdir()
  (folder / ".ipynb_checkpoints" / "a.jsonl").write_bytes(lines(rows(0, 5)))
  (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
  (folder / "late.JSONL").write_bytes(lines(rows(0, 5)))
  counts, of_pieces = Counter(), Counter()
  corpus = Jsonl(str(folder))
  assert len(list(corpus.documents(counts))) == 14
  assert counts == {"hidden": 2, "other_ending": 2}
  for piece in corpus.pieces():
    list(piece.usable(of_pieces))
  assert of_pieces == counts
  assert corpus.left_out() == {
    "hidden": ["._a.jsonl", ".ipynb_checkpoints"], "other_ending": ["ignored.txt", "late.JSONL"],
  }


def test_special_files_are_refused(tmp_path):
  with pytest.raises(ValueError, match="^/dev/zero is a device"):
    Jsonl("/dev/zero").fingerprint()
  os.mkfifo(tmp_path / "a.parquet")
  for corpus in (Parquet(str(tmp_path)), Parquet(f"{tmp_path}/a.parquet")):
    with pytest.raises(ValueError, match="a.parquet is a FIFO"):
      corpus.fingerprint()
  os.mkfifo(tmp_path / "a.txt")
  with pytest.raises(ValueError, match="a.txt is a FIFO"):
    TextFolder(str(tmp_path)).fingerprint()


def test_names_that_are_not_utf_8(tmp_path):
  """Ids differ by the bytes of the name, and what is written of it is text."""
  for name, text in ((b"caf\xe9", "first"), (b"caf\xe8", "second")):
    place = os.path.join(os.fsencode(tmp_path), name)
    with open(place + b".jsonl", "wb") as file:
      file.write(lines([{"text": text}]))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "x")
    os.rename(tmp_path / "x", os.fsdecode(place + b".parquet"))
    os.mkdir(place)
    with open(os.path.join(place, b"a.txt"), "w") as file:
      file.write(text)
  for corpus in (Jsonl(str(tmp_path)), Parquet(str(tmp_path)), TextFolder(str(tmp_path))):
    documents = list(corpus.documents())
    assert len({d.id for d in documents}) == 2 and corpus.fingerprint()
    for document in documents:
      assert (document.source + document.kind).isascii() and "caf\\udce" in document.source
  with open(os.path.join(os.fsencode(tmp_path), b"bad\xe9.jsonl"), "wb") as file:
    file.write(b"{")
  with pytest.raises(ValueError, match=r"bad\\udce9\.jsonl:1 is not valid JSON") as found:
    list(Jsonl(str(tmp_path)).documents())
  str(found.value).encode()


@pytest.mark.parametrize("name,keep", [
  ("b.jsonl.gz", 0.6), ("deep/c.jsonl.zst", 0.4), ("deep/c.jsonl.zst", 0.9),
])
def test_cut_off_archives_are_named(folder, name, keep):
  data = (folder / name).read_bytes()
  (folder / name).write_bytes(data[: int(keep * len(data))])
  with pytest.raises(ValueError, match=rf"{name.replace('.', '[.]')} cannot be read"):
    list(Jsonl(str(folder)).documents())


@pytest.mark.parametrize("name", ["b.jsonl.gz", "deep/c.jsonl.zst"])
def test_files_that_are_no_archives_are_named(folder, name):
  (folder / name).write_bytes(lines(rows(0, 3)))
  with pytest.raises(ValueError, match=rf"{name.replace('.', '[.]')} cannot be read"):
    list(Jsonl(str(folder)).documents())


@pytest.mark.parametrize("corpus", [Jsonl, Parquet, TextFolder])
def test_no_such_path(corpus, tmp_path):
  with pytest.raises(ValueError, match=rf"data\.{corpus.__name__}\.path='{tmp_path}/nowhere'"):
    corpus(f"{tmp_path}/nowhere").fingerprint()
  with pytest.raises(ValueError, match=rf"data\.{corpus.__name__}\."):
    list(corpus(str(tmp_path)).documents())  # a folder with nothing that fits


@pytest.fixture
def parquet(tmp_path):
  items = rows(0, 3000)
  table = pyarrow.table({k: [item[k] for item in items] for k in items[0]})
  pyarrow.parquet.write_table(table, tmp_path / "part.parquet", row_group_size=700)
  return tmp_path / "part.parquet"


def test_parquet(parquet):
  documents = list(Parquet(str(parquet)).documents())
  assert sorted(d.text for d in documents) == sorted(f"text {i}" for i in range(3000))
  third = next(d for d in documents if d.source == "part.parquet:3")
  assert third.text == "text 2" and third.id == document_id("part.parquet:3")
  corpus = Parquet(str(parquet.parent), text_field="name", id_field="number", kind_field="label")
  assert sorted(corpus.documents())[2500] == (2500, "n2500", "a", "part.parquet:2501")


def test_parquet_errors(parquet):
  with pytest.raises(ValueError, match=r"has no field 'body' \(it has label, name, number, text\)"):
    list(Parquet(str(parquet), text_field="body").documents())
  with pytest.raises(ValueError, match="column 'number' holds int64, not text"):
    list(Parquet(str(parquet), text_field="number").documents())
  with pytest.raises(ValueError, match=r"data\.Parquet\.id_field"):
    list(Parquet(str(parquet), id_field="key").documents())
  parquet.write_bytes(parquet.read_bytes()[:-50])
  with pytest.raises(ValueError, match=r"part\.parquet cannot be read as Parquet"):
    list(Parquet(str(parquet)).documents())


def test_parquet_without_values_and_with_bad_bytes(tmp_path):
  text = pyarrow.array([b"good", None, b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
  pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
  counts = Counter()
  (document,) = Parquet(str(tmp_path)).documents(counts)
  assert document.text == "good" and counts == {"empty": 1, "undecodable": 1}


@pytest.mark.parametrize("kind", [
  pyarrow.large_string(), pyarrow.string_view(),
  pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
])
def test_parquet_with_other_kinds_of_text(tmp_path, kind):
  texts = ["one", "two", "one more"]
  column = pyarrow.array(texts, kind)
  pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
  assert sorted(d.text for d in Parquet(str(tmp_path)).documents()) == sorted(texts)


def _parquet_of(path, column, values=None):
  texts = [f"text {i}" for i in range(len(column))] if values is None else values
  pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": column}), path)


IDS = [i.to_bytes(16, "big") for i in range(200, 300)]  # hardly one is UTF-8


@pytest.mark.parametrize("kind", [
  pyarrow.binary(), pyarrow.binary(16), pyarrow.large_binary(), pyarrow.binary_view(),
  pyarrow.uuid(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
])
def test_ids_of_bytes_stay_different(tmp_path, kind):
  column = pyarrow.array(IDS, pyarrow.binary(16))
  column = column.cast(pyarrow.binary()).dictionary_encode() if pyarrow.types.is_dictionary(kind) \
    else pyarrow.array(IDS, kind)
  _parquet_of(tmp_path / "x.parquet", column)
  found = sorted(Parquet(str(tmp_path), id_field="id").documents(), key=lambda d: d.source)
  assert {d.id for d in found} == {document_id(i) for i in IDS}


def test_ids_of_bytes_and_of_text_are_the_same_where_both_can_be(tmp_path):
  for name, kind in (("a", pyarrow.binary()), ("b", pyarrow.string())):
    (tmp_path / name).mkdir()
    _parquet_of(tmp_path / name / "x.parquet", pyarrow.array(["caf\xe9", "b"], kind))
  first, second = (
    {d.text: d.id for d in Parquet(f"{tmp_path}/{name}", id_field="id").documents()}
    for name in "ab"
  )
  assert first == second == {"text 0": document_id("caf\xe9"), "text 1": document_id("b")}


@pytest.mark.parametrize("values", [
  pyarrow.array([1.0, float("nan")]), pyarrow.array([True, False]), pyarrow.array([[1], [2]]),
  pyarrow.array([1, 2], pyarrow.timestamp("ns")), pyarrow.array([1, 2], pyarrow.decimal128(9, 2)),
  pyarrow.array([{"a": 1}, {"a": 2}]), pyarrow.array([1.0, 2.0]).dictionary_encode(),
])
def test_columns_that_are_no_ids_are_refused(tmp_path, values):
  _parquet_of(tmp_path / "x.parquet", values)
  with pytest.raises(ValueError, match=r"x.parquet: column 'id' holds .*, which is no id"):
    list(Parquet(str(tmp_path), id_field="id").documents())


@pytest.mark.parametrize("values", [
  pyarrow.array(["a", None]), pyarrow.array([1, -1]), pyarrow.array([None, None]),
  pyarrow.array([1, 2**64 - 1], pyarrow.uint64()),
])
def test_values_that_are_no_ids_are_refused_by_row(tmp_path, values):
  _parquet_of(tmp_path / "x.parquet", values)
  with pytest.raises(ValueError, match=r"x.parquet:[12]: field 'id' holds .*, which is no id"):
    list(Parquet(str(tmp_path), id_field="id").documents())


def test_a_shard_without_any_text_is_empty_rows(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
  pyarrow.parquet.write_table(
    pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "b.parquet")
  counts = Counter()
  assert [d.text for d in Parquet(str(tmp_path)).documents(counts)] == ["one"]
  assert counts == {"empty": 4}


def test_kinds_of_bytes_are_texts(tmp_path):
  _parquet_of(tmp_path / "x.parquet", pyarrow.array([b"law", b"\xff"]))
  counts = Counter()
  (document,) = Parquet(str(tmp_path), kind_field="id").documents(counts)
  assert document.kind == "law" and counts == {"undecodable": 1}


def test_values_that_python_cannot_hold_are_named(tmp_path):
  dates = pyarrow.array([2**62], pyarrow.timestamp("us"))
  _parquet_of(tmp_path / "x.parquet", dates)
  with pytest.raises(ValueError, match="x.parquet:1: column 'id' cannot be read"):
    list(Parquet(str(tmp_path), kind_field="id").documents())


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.string_view(), None])
def test_long_texts_are_refused_by_row(tmp_path, kind):
  column = pyarrow.array(["short", None, "a long text", "short"], kind)
  if kind is None:
    column = column.dictionary_encode()
  pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
  with pytest.raises(ValueError, match=r"x.parquet:3: .*11 bytes.*data.Parquet.max_cell_bytes"):
    list(Parquet(str(tmp_path), max_cell_bytes=10).documents())
  assert len(list(Parquet(str(tmp_path), max_cell_bytes=11).documents())) == 3
  (tmp_path / "x.txt").write_text("a long text")
  with pytest.raises(ValueError, match=r"x.txt has 11 bytes.*data.TextFolder.max_file_bytes"):
    list(TextFolder(str(tmp_path), max_file_bytes=10).documents())


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
@pytest.mark.parametrize("corpus", [Jsonl, Parquet])
def test_unreadable_files_are_named(corpus):
  """One that opens and fails at the first read, whoever asks."""
  with pytest.raises(ValueError, match="^/proc/self/mem cannot be read"):
    corpus("/proc/self/mem").fingerprint()
  with pytest.raises(ValueError, match="^/proc/self/mem cannot be read"):
    list(corpus("/proc/self/mem").documents())


def test_text_folder(tmp_path):
  (tmp_path / "law").mkdir()
  (tmp_path / "law" / "act.txt").write_text("\ufeffAn act.", encoding="utf-8")
  (tmp_path / "top.txt").write_text("Top.")
  (tmp_path / "note.md").write_text("Skipped.")
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
  (tmp_path / "blank.txt").write_text("\n")
  (tmp_path / "windows.txt").write_bytes("Sixteen bits.".encode("utf-16-le"))
  (tmp_path / "._top.txt").write_bytes(b"\0\5\x16\7")
  counts = Counter()
  documents = {d.source: (d.text, d.kind) for d in TextFolder(str(tmp_path)).documents(counts)}
  assert documents == {"law/act.txt": ("An act.", "law"), "top.txt": ("Top.", "text")}
  assert counts == {"undecodable": 2, "unreadable": 1, "empty": 1, "hidden": 1}
  assert [d.text for d in TextFolder(str(tmp_path), "*.md").documents()] == ["Skipped."]


@pytest.mark.parametrize("most", [1, 2, 4096])
def test_pieces_hold_the_documents_of_the_whole(folder, monkeypatch, most):
  monkeypatch.setattr(files, "_MAX_PIECES", most)
  (folder / "a.jsonl").write_bytes(lines([{"text": " "}, {"text": "\ud800"}]) + b"\xff\n")
  for corpus in (Jsonl(str(folder)), TextFolder(str(folder), pattern="**/*.txt")):
    want, got = Counter(), Counter()
    pieces = corpus.pieces()
    assert len(pieces) <= most
    documents = [d for piece in pieces for d in piece.usable(got)]
    assert documents == list(corpus.usable(want)) and got == want


def test_parquet_in_pieces(tmp_path):
  for name in ("a", "b"):
    table = pyarrow.table({"text": [f"{name}{i}" for i in range(3)]})
    pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
  corpus = Parquet(str(tmp_path))
  first, second = corpus.pieces()
  assert [d.source for d in second.read(Counter())] == [f"b.parquet:{i}" for i in (1, 2, 3)]
  assert [*first.read(Counter()), *second.read(Counter())] == list(corpus.read(Counter()))
