"""What is read from outside of a run is what its stages wrote, or named."""

import json
import os
import shutil

import pytest

from lmops_jax.host.manifests import StageError, verify_read
from lmops_jax.stages.pipeline import Stage, run_stages


def _flip_silently(path):
  """Bit rot: same size, same times."""
  status, data = path.stat(), bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def stage(tmp_path):
  def work(context):
    (context.directory / "params" / "7").mkdir(parents=True)
    (context.directory / "params" / "7" / "data").write_bytes(bytes(100))
    (context.directory / "params.json").write_text("{}")
    # As a web page or a dataset has one.
    (context.directory / "params" / "manifest.json").write_text('{"name": "other"}')

  run_stages([Stage("train/seed0", work)], tmp_path / "run", system="toy")
  return tmp_path / "run" / "train" / "seed0"


PARTS = ("", "params", "params/7", "params/7/data", "params.json")


def test_what_a_stage_wrote_passes(stage, monkeypatch):
  for part in PARTS:
    verify_read(stage / part)
  verify_read(stage / "params" / ".." / "params.json")
  monkeypatch.chdir(stage / "params")
  verify_read("7")


def test_a_flipped_bit_is_named_where_it_is_read_and_nowhere_else(stage):
  _flip_silently(stage / "params" / "7" / "data")
  for part in PARTS[:-1]:
    with pytest.raises(StageError, match="7/data, an output of stage 'train/seed0', is corrupted"):
      verify_read(stage / part)
  verify_read(stage / "params.json")


def test_files_that_are_missing_or_more_are_named(stage):
  (stage / "params" / "7" / "more").touch()
  with pytest.raises(StageError, match="7/more was not written by stage 'train/seed0'"):
    verify_read(stage / "params")
  (stage / "params" / "7" / "data").unlink()
  with pytest.raises(StageError, match="7/data, an output of stage 'train/seed0', is missing"):
    verify_read(stage / "params")


def test_a_damaged_manifest_is_named(stage):
  _flip_silently(stage / "manifest.json")
  for part in PARTS:
    with pytest.raises(StageError, match="seed0/manifest.json, the manifest of stage .*is damaged"):
      verify_read(stage / part)


def test_a_stage_that_was_copied_elsewhere_is_checked_too(stage, tmp_path):
  shutil.copytree(stage, tmp_path / "copy")
  _flip_silently(tmp_path / "copy" / "params.json")
  with pytest.raises(StageError, match="copy/params.json, an output of stage 'train/seed0'"):
    verify_read(tmp_path / "copy")


def test_what_belongs_to_no_stage_passes(tmp_path):
  (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web page", "files": []}))
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text("{}")
  verify_read(tmp_path / "model" / "config.json")
  verify_read(tmp_path / "nowhere")
