"""Files that are there in full or not at all."""

import json

import numpy as np
import pytest

from lmops_jax.host import whole_files


@pytest.mark.parametrize("write", [whole_files.replacing, whole_files.replacing_shared])
def test_a_file_is_whole_or_not_there(tmp_path, write):
  path = tmp_path / "file"
  with pytest.raises(OSError), write(path) as partial:
    partial.write_text("ha")
    raise OSError
  assert not list(tmp_path.iterdir())
  path.write_text("before")
  with write(path) as partial:
    partial.write_text("after")
    assert path.read_text() == "before"
  assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "after"


def test_two_workers_on_one_file(tmp_path):
  path, scratch = tmp_path / "file", tmp_path / "scratch"
  scratch.mkdir()
  with (whole_files.replacing_shared(path) as first,
        whole_files.replacing_shared(path, scratch) as second):
    first.write_text("the same")
    second.write_text("the same")
    assert not path.exists() and second.parent == scratch
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "scratch"]


def test_a_killed_writer_leaves_nothing_that_the_next_one_does_not_take(tmp_path):
  path = tmp_path / "file"
  (tmp_path / f"file{whole_files.WRITING}").write_text("half")
  whole_files.write_text(path, "ä")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
  assert path.read_bytes() == "ä".encode()


def test_json_and_arrays(tmp_path):
  whole_files.write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
  text = (tmp_path / "a.json").read_text()
  assert json.loads(text) == {"a": [2], "b": 1} and text.index("a") < text.index("b")
  whole_files.write_arrays(tmp_path / "a.npz", {"x": np.arange(3), "text": "t"})
  with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
    assert arrays["x"].tolist() == [0, 1, 2] and str(arrays["text"]) == "t"
