"""Readers and writers of GrIT in shards and JSON lines."""

import io
import json
import tarfile

import pytest

from lmops_jax.data import GritJsonl, GritShards
from lmops_jax.data.documents import document_id
from lmops_jax.data.grit.files import write_jsonl, write_shard
from lmops_jax.data.multimodal import LeftOut

REGION = [0, 5, 0.1, 0.2, 0.5, 0.9, 0.83]


def _examples(corpus):
  left_out = LeftOut()
  return list(corpus.examples(left_out)), left_out


def _shard(path, members):
  with tarfile.open(path, "w") as shard:
    for name, data in members:
      data = data if isinstance(data, bytes) else json.dumps(data).encode()
      member = tarfile.TarInfo(name)
      member.size = len(data)
      shard.addfile(member, io.BytesIO(data))
  return str(path)


def test_json_lines_find_their_pictures_by_name_or_id(folder, row, write):
  path = write([
    row(1, noun_chunks=[REGION]), row("x", image="2.png"), row(9), row("y", image="gone.png"),
    {"caption": "half \ud800", "id": 2}])
  found, left_out = _examples(GritJsonl(path, pictures=str(folder)))
  assert [e.picture.path.rsplit("/")[-1] for e in found] == ["1.png", "2.png"]
  assert [e.id for e in found] == [1, document_id("x")]
  assert [e.source for e in found] == ["rows.jsonl:1", "rows.jsonl:2"]
  assert list(found[0].row.noun_chunks[0].box) == REGION[2:6]
  assert left_out.counts == {"without_file": 2, "undecodable": 1}
  assert left_out.named["without_file"][0].endswith("rows.jsonl:3")


def test_the_folder_of_the_file_is_that_of_the_pictures(folder, row):
  path = folder / "rows.jsonl"
  path.write_text(json.dumps(row(3)) + "\n")
  assert len(_examples(GritJsonl(str(path)))[0]) == 1
  path.unlink()


@pytest.mark.parametrize("fields, message", [
  ({"caption": "a dog"}, 'rows.jsonl:1 has neither "image" nor "id"'),
  ({"caption": "a dog", "image": "http://x/1.png"}, "an address and no file"),
  ({"caption": "a dog", "id": 1, "noun_chunks": [[1]]}, r"rows.jsonl:1 noun_chunks\[0\]"),
])
def test_bad_json_lines_are_refused(folder, write, fields, message):
  with pytest.raises(ValueError, match=message):
    _examples(GritJsonl(write([fields]), pictures=str(folder)))


def test_shards_are_read_as_img2dataset_writes_them(folder, row, tmp_path):
  png = (folder / "1.png").read_bytes()
  path = _shard(tmp_path / "0.tar", [
    ("000.jpg", png), ("000.txt", b"a dog"), ("000.json", row(5, ref_exps=[REGION])),
    ("001.json", row(6)), ("002.png", png), ("002.txt", b"no json"),
    ("003.png", png), ("003.json", {"caption": "a dog", "noun_chunks": [[1, 2]]}),
    ("004.png", png), ("004.json", {"caption": "no id"})])
  found, left_out = _examples(GritShards(path))
  assert [e.id for e in found] == [5, document_id("0.tar:004")]
  assert found[0].picture.read() == png and found[0].row.caption == row(5)["caption"]
  assert left_out.counts == {"without_file": 1, "incomplete": 1, "unreadable": 1}
  assert "0.tar sample 003 noun_chunks[0]" in left_out.named["unreadable"][0]


def test_what_is_written_is_read_again(folder, row, write, tmp_path):
  corpus = GritJsonl(write([row(i, ref_exps=[REGION]) for i in (1, 2)]), pictures=str(folder))
  examples, _ = _examples(corpus)
  assert write_jsonl(tmp_path / "again.jsonl", [e.row for e in examples]) == 2
  again, _ = _examples(GritJsonl(str(tmp_path / "again.jsonl"), pictures=str(folder)))
  assert [(e.id, e.row, e.picture) for e in again] == [(e.id, e.row, e.picture) for e in examples]
  assert write_shard(tmp_path / "a.tar", examples) == 2
  write_shard(tmp_path / "b.tar", examples)
  assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
  shard, left_out = _examples(GritShards(str(tmp_path / "a.tar")))
  assert [(e.id, e.row) for e in shard] == [(e.id, e.row) for e in examples]
  assert [e.picture.read() for e in shard] == [e.picture.read() for e in examples]
  assert not left_out.counts


def test_a_shard_takes_pictures_only(folder, row, write, tmp_path):
  examples, _ = _examples(GritJsonl(write([row(1, image="broken.png")]), pictures=str(folder)))
  with pytest.raises(ValueError, match="broken.png is no JPEG, PNG"):
    write_shard(tmp_path / "a.tar", examples)
  assert not (tmp_path / "a.tar").exists()


def test_fingerprints_follow_the_files(folder, row, write, tmp_path):
  corpus = GritJsonl(write([row(1)]), pictures=str(folder))
  before = corpus.fingerprint()
  write([row(2)])
  assert corpus.fingerprint() != before
