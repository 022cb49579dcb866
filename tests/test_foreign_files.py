"""What is no regular file, and JSON that Python's reader cannot take."""

import os

import pytest

from lmops_jax import foreign_files


def test_special_files_are_refused_before_they_are_opened(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  with pytest.raises(ValueError, match="fifo is a FIFO, not a regular file"):
    foreign_files.read_json(tmp_path / "fifo")
  with pytest.raises(ValueError, match="/dev/zero is a device"):
    foreign_files.require_regular("/dev/zero")
  (tmp_path / "link").symlink_to(tmp_path / "fifo")
  assert foreign_files.special_kind(tmp_path / "link") == "a FIFO"
  foreign_files.require_regular(tmp_path)
  foreign_files.require_regular(tmp_path / "nothing")


@pytest.mark.parametrize("content, reason", [
  ("[" * 100_000, "nested too deeply"), ("1" * 5_000, "a whole number of thousands of digits"),
  ("{", "not valid JSON: Expecting"), (b"\xff", "not UTF-8"),
])
def test_json_that_cannot_be_read_names_its_file(tmp_path, content, reason):
  path = tmp_path / "a.json"
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  with pytest.raises(ValueError, match=f"a.json .*{reason}"):
    foreign_files.read_json(path)


def test_a_byte_order_mark_is_no_content(tmp_path):
  path = tmp_path / "a.json"
  path.write_bytes(b'\xef\xbb\xbf{"a": [1.5, null]}')
  assert foreign_files.read_json(path) == {"a": [1.5, None]}
