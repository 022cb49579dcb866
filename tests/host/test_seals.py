"""What an interrupted attempt left is read back as it was written, or made again."""

import errno
import shutil

import pytest

from lmops_jax.host import seals
from lmops_jax.stages.pipeline import Stage, read_manifest, run_stages


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "kept" / "deep").mkdir(parents=True)
  (tmp_path / "kept" / "a").write_text("one")
  (tmp_path / "kept" / "deep" / "b").write_bytes(bytes(1000))
  (tmp_path / "kept" / "empty").touch()
  return tmp_path / "kept"


def test_what_was_not_sealed_is_not_whole(folder):
  assert not seals.is_whole(folder) and not seals.is_whole(folder / "a")
  assert not seals.is_whole(folder / "nowhere")


@pytest.mark.parametrize("damage", [
  lambda folder: _flip_a_bit(folder / "a"),
  lambda folder: _flip_a_bit(folder / "deep" / "b"),
  lambda folder: (folder / "deep" / "b").write_bytes(bytes(999)),
  lambda folder: (folder / "a").unlink(),
  lambda folder: (folder / "empty").rename(folder / "other"),
  lambda folder: (folder / "more").touch(),
  shutil.rmtree,
])
def test_a_changed_folder_is_not_whole(folder, damage):
  seals.seal(folder)
  assert seals.is_whole(folder)
  damage(folder)
  assert not seals.is_whole(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "5", "[{}]", "[5]", '[{"a": 1}]', '[{"a": [3]}]',
                                  '[{"a": ["x", "y"]}]', "[" * 100_000])
def test_a_damaged_seal_seals_nothing(folder, text):
  seals.seal(folder / "a")
  assert seals.is_whole(folder / "a")
  (folder / ".a.lmops-seal").write_text(text)
  assert not seals.is_whole(folder / "a")


def test_a_kill_at_any_moment_of_a_replacement_leaves_one_of_both(tmp_path, monkeypatch):
  path = tmp_path / "state"
  for text in ("first", "second"):
    with seals.replacing(path) as partial:
      partial.write_text(text)
  seal = (tmp_path / ".state.lmops-seal").read_bytes()
  assert seals.is_whole(path)
  path.write_text("first")  # as if killed between the seal and the rename
  assert seals.is_whole(path)
  path.write_text("third")
  assert not seals.is_whole(path)
  path.unlink()  # likewise, of a file that is written for the first time
  (tmp_path / ".state.lmops-seal").write_bytes(seal)
  assert not seals.is_whole(path)


def test_files_of_several_workers_are_sealed_too(tmp_path):
  (tmp_path / "scratch").mkdir()
  for text in ("one", "two"):
    with seals.replacing_shared(tmp_path / "part", tmp_path / "scratch") as partial:
      partial.write_text(text)
  assert seals.is_whole(tmp_path / "part") and not list((tmp_path / "scratch").iterdir())
  _flip_a_bit(tmp_path / "part")
  found = seals.all_whole([[tmp_path / "part"], [], [tmp_path / "nowhere"]])
  assert found == [False, True, False]


def test_what_cannot_be_read_is_not_called_damaged(folder, monkeypatch):
  seals.seal(folder)

  def failing(paths):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(seals, "hash_all", failing)
  with pytest.raises(OSError, match="Input/output error"):
    seals.is_whole(folder)


def test_seals_are_no_output_of_a_stage(tmp_path):
  def work(context):
    (context.directory / "deep").mkdir()
    (context.directory / "deep" / "a").write_text("one")
    seals.seal(context.directory / "deep" / "a")
    seals.seal(context.directory / "deep")

  run_stages([Stage("work", work)], tmp_path, system="toy")
  files = [path.relative_to(tmp_path / "work").as_posix()
           for path in (tmp_path / "work").rglob("*") if path.is_file()]
  assert sorted(files) == ["deep/a", "manifest.json"]
  assert list(read_manifest(tmp_path, "work")["files"]) == ["deep/a"]
