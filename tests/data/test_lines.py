"""JSON lines as other systems write them."""

import gzip
import json
from collections import Counter

import pytest
import zstandard

from lmops_jax.data.lines import jsonl_rows

ROWS = [{"text": "first row"}, {"text": "second row"}]
MARK = b"\xef\xbb\xbf"
PLAIN = "".join(json.dumps(row) + "\r\n" for row in ROWS).encode()
PACK = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def read(path, **options):
  return [row for _, row in jsonl_rows(path, **options)]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("content", [
  MARK + PLAIN, MARK + PLAIN.replace(b"\r", b"\n"), MARK + b"\n" + PLAIN,
])
def test_a_byte_order_mark_is_no_content(tmp_path, ending, content):
  (tmp_path / f"a{ending}").write_bytes(PACK[ending](content))
  assert read(tmp_path / f"a{ending}") == ROWS


def test_marks_of_files_joined_into_one(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(2 * (MARK + PLAIN))
  assert read(tmp_path / "a.jsonl") == 2 * ROWS


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, code):
  (tmp_path / "a.jsonl").write_bytes(PLAIN.decode().encode(code))
  for counts in (None, Counter()):
    with pytest.raises(ValueError, match=r"a.jsonl is UTF-16 text, or none at all; save it as UTF"):
      read(tmp_path / "a.jsonl", counts=counts)


@pytest.mark.parametrize("line", [
  '{"text": "\\ud800"}', '{"label": ["\\uDC00x"]}', '{"a": {"\\udfff": 1}}',
])
def test_half_a_character_anywhere_is_refused_by_line(tmp_path, line):
  (tmp_path / "a.jsonl").write_bytes(PLAIN + line.encode())
  with pytest.raises(ValueError, match=r"a.jsonl:3 holds half a character"):
    read(tmp_path / "a.jsonl")
  assert len(read(tmp_path / "a.jsonl", counts=Counter())) == 3  # a corpus looks at what it uses


def test_a_character_of_two_escapes_is_whole(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
  assert read(tmp_path / "a.jsonl") == [{"text": "\U0001f600"}]


@pytest.mark.parametrize("ending", PACK)
def test_a_line_over_the_limit_is_refused_and_the_limit_is_not(tmp_path, ending):
  path = tmp_path / f"a{ending}"
  row = {"text": "x" * 100_000}
  line = json.dumps(row).encode()
  path.write_bytes(PACK[ending](PLAIN + line))
  assert read(path, max_line_bytes=len(line)) == [*ROWS, row]
  with pytest.raises(ValueError, match=rf"a{ending}:3 is longer than max_line_bytes=99,999"):
    read(path, max_line_bytes=99_999)


def test_zstd_frames_of_any_size_one_after_the_other(tmp_path):
  """Longer and shorter than what is decompressed at a time, and one to skip between them."""
  rows = [{"text": "".join(map(chr, range(33, 33 + i % 90))) * 7} for i in range(3000)]
  packed = [zstandard.compress(json.dumps(row).encode() + b"\n") for row in rows]
  packed.insert(5, b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip")
  packed.append(zstandard.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
  (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed))
  assert read(tmp_path / "a.jsonl.zst") == 2 * rows
  (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed)[:-1])
  with pytest.raises(ValueError, match="a.jsonl.zst cannot be read: compressed file ended"):
    read(tmp_path / "a.jsonl.zst")


def test_zstd_with_a_long_window(tmp_path):
  """As `zstd --long=31` declares it; the window is no larger than the text that is there."""
  settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
  packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
  (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(PLAIN) + packer.flush())
  header = zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes())
  assert header.window_size == 2**31
  assert read(tmp_path / "a.jsonl.zst") == ROWS
