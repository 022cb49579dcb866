"""What is no regular file, JSON that Python's reader cannot take, values that fit no schema."""

import os
import tracemalloc
from typing import Annotated, Literal

import pydantic
import pytest

from lmops_jax.host import foreign_files


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


def test_what_is_no_file_is_not_taken_for_absent(tmp_path):
  (tmp_path / "file").write_text("\ufeffa", encoding="utf-8")
  (tmp_path / "good").symlink_to("file")
  assert foreign_files.is_there(tmp_path / "file") and foreign_files.is_there(tmp_path / "good")
  assert foreign_files.read_text(tmp_path / "good") == "a"
  assert not foreign_files.is_there(tmp_path / "nothing")
  assert not foreign_files.is_there(tmp_path / "file" / "nothing")
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "dangling").symlink_to("../blobs/5")
  (tmp_path / "turning").symlink_to("turning")
  (tmp_path / "folder").mkdir()
  for name, reason in {
    "fifo": "is a FIFO", "folder": "is a folder, where a file should be",
    "dangling": r"is a link to \.\./blobs/5, where there is nothing", "turning": "cannot be read",
  }.items():
    with pytest.raises(ValueError, match=f"{name} {reason}"):
      foreign_files.is_there(tmp_path / name)


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path):
  path = tmp_path / "sparse.json"
  path.touch()
  os.truncate(path, 10**12)
  with pytest.raises(ValueError, match="sparse.json has 1,000,000,000,000 bytes; .* at most 268"):
    foreign_files.read_json(path)
  with pytest.raises(ValueError, match=f"{tmp_path} cannot be read .Is a directory"):
    foreign_files.read_bytes(tmp_path)


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


class _Token(pydantic.BaseModel):
  content: str
  special: bool = False


class _File(pydantic.BaseModel):
  heads: Annotated[int, pydantic.Field(ge=1)]
  share: Annotated[float, pydantic.Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
  window: Annotated[int, pydantic.Field(ge=1)] | None = None
  ends: int | list[int] | None = None
  kind: Literal["wide", "deep"] = "wide"
  tokens: dict[str, _Token] = {}
  merges: list[str | list[str]] = []
  span: Annotated[list[int], pydantic.Field(min_length=2, max_length=2)] = [0, 0]

  @pydantic.model_validator(mode="after")
  def _fits(self):
    if self.window is not None and self.heads > self.window:
      raise ValueError(f"heads={self.heads} should not exceed window={self.window}.")
    return self


@pytest.mark.parametrize("fields, sentence", [
  ({"heads": 0}, "heads=0 should be a whole number of at least 1."),
  ({"heads": True}, "heads=true should be a whole number of at least 1."),
  ({"heads": 2.0}, "heads=2.0 should be a whole number of at least 1."),
  ({"share": 2}, "share=2 should be a finite number above 0 and of at most 1."),
  ({"share": float("nan")}, "share=NaN should be a finite number above 0 and of at most 1."),
  ({"window": "x"}, 'window="x" should be a whole number of at least 1 or null.'),
  ({"ends": "x" * 99}, f'ends="{"x" * 59}... should be a whole number or a list whose entries are '
   "each a whole number or null."),
  ({"kind": []}, 'kind=[] should be one of "wide", "deep".'),
  ({"tokens": []}, "tokens=[] should be an object with fields."),
  ({"tokens": {"int": {"content": 5}}}, "tokens.int.content=5 should be a text."),
  ({"ends": [1, "x"]}, 'ends[1]="x" should be a whole number.'),
  ({"merges": ["a b", 5]}, "merges[1]=5 should be a text or a list whose entries are each a text."),
  ({"span": [1]}, "span=[1] should be a list of 2 whose entries are each a whole number."),
  ({"heads": 9, "window": 4}, "heads=9 should not exceed window=4."),
])
def test_a_value_that_does_not_fit_its_schema_is_one_sentence(fields, sentence):
  with pytest.raises(ValueError) as error:
    foreign_files.checked(_File, {"heads": 1, **fields}, "a.json")
  assert str(error.value) == f"a.json: {sentence}"


def test_a_file_that_fits_its_schema_is_an_instance():
  value = {"heads": 2, "share": 1, "ends": [1], "tokens": {"a": {"content": "b"}}, "other": 5}
  file = foreign_files.checked(_File, value, "a.json")
  assert (file.heads, file.ends, file.tokens["a"].content) == (2, [1], "b")
  assert foreign_files.checked(dict[str, int], {"a": 1}, "a.json") == {"a": 1}


def test_a_mapping_with_many_wrong_values_ends_at_the_first():
  """pydantic would hold every error: a gigabyte for a file of ten megabytes."""
  good = {str(i): i for i in range(25_000)}
  assert foreign_files.checked(dict[str, int], good, "a.json") == good
  bad = {name: str(i) if i >= 10_000 else i for name, i in good.items()}
  tracemalloc.start()
  with pytest.raises(ValueError, match='a.json: 10000="10000" should be a whole number'):
    foreign_files.checked(dict[str, int], bad, "a.json")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 20e6


@pytest.mark.parametrize("schema, value, sentence", [
  (_File, {}, "a.json has no field 'heads', which should be a whole number of at least 1."),
  (_File, {"heads": 1, "tokens": {"a": {}}},
   "a.json has no field 'tokens.a.content', which should be a text."),
  (_File, [1], "a.json holds [1] and should hold an object with fields."),
  (dict[str, int], None, "a.json holds null and should hold an object with fields."),
  (dict[str, int], {"a": "b"}, 'a.json: a="b" should be a whole number.'),
])
def test_what_is_missing_or_no_such_file_is_one_sentence(schema, value, sentence):
  with pytest.raises(ValueError) as error:
    foreign_files.checked(schema, value, "a.json")
  assert str(error.value) == sentence
