"""Every entry of a folder is taken, named as left out, or refused."""

import os

import pytest

from lmops_jax.data.matching import matching, search

ENDINGS = (".jsonl",)


@pytest.fixture
def tree(tmp_path):
  root = tmp_path / "data"
  for name in ("a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl", ".d.jsonl", ".cache/e.jsonl",
               "sub/.git/f.jsonl", "g.JSONL", "notes.txt"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("{}")
  return root


def find(path):
  found = matching(str(path), "CORPUS_PATH", ENDINGS)
  return [name for name, _ in found.files], found.left_out


def test_a_folder_gives_its_files_with_the_endings(tree):
  assert find(tree) == (
    ["a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl"],
    {"hidden": [".cache", ".d.jsonl", "sub/.git"], "other_ending": ["g.JSONL", "notes.txt"]},
  )


@pytest.mark.parametrize("pattern, files, left_out", [
  ("*.jsonl", ["a.jsonl"], {"hidden": [".d.jsonl"]}),
  ("**/*.jsonl", ["a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl"],
   {"hidden": [".cache", ".d.jsonl", "sub/.git"]}),
  ("*/*.jsonl", ["sub/b.jsonl"], {"hidden": [".cache"]}),
  ("**/deep/*", ["sub/deep/c.jsonl"], {"hidden": [".cache", "sub/.git"]}),
  ("s?b/**", ["sub/b.jsonl", "sub/deep/c.jsonl"], {"hidden": ["sub/.git"]}),
  ("[ag].*", ["a.jsonl", "g.JSONL"], {}),
  (".*.jsonl", [".d.jsonl"], {}),
  (".c*/*", [".cache/e.jsonl"], {}),
  ("**/.*/*.jsonl", [".cache/e.jsonl", "sub/.git/f.jsonl"], {}),
  ("*", ["a.jsonl", "g.JSONL", "notes.txt"],
   {"hidden": [".cache", ".d.jsonl"], "folder": ["sub"]}),
])
def test_patterns(tree, pattern, files, left_out):
  assert find(tree / pattern) == (files, left_out)


def test_names_are_relative_to_what_has_no_wildcard(tree):
  assert find(tree / "sub" / "**" / "*.jsonl")[0] == ["b.jsonl", "deep/c.jsonl"]
  assert find(tree / ".d.jsonl") == ([".d.jsonl"], {})  # named, so wanted
  assert find(tree / ".cache") == (["e.jsonl"], {})
  (tree / "odd[1].jsonl").write_text("{}")
  assert find(tree / "odd[1].jsonl") == (["odd[1].jsonl"], {})


@pytest.mark.parametrize("pattern", ["", "*.jsonl", "**/*.jsonl", "gone.jsonl"])
def test_a_link_that_leads_nowhere_is_refused(tree, pattern):
  (tree / "gone.jsonl").symlink_to("/nowhere/x")
  with pytest.raises(ValueError, match=r"gone.jsonl is a link to /nowhere/x, which is not there"):
    find(tree / pattern)


def test_a_link_that_may_have_been_a_folder_is_refused(tree):
  (tree / "LICENSE.md").symlink_to("/nowhere/x")  # was none, and has another ending
  assert find(tree)[1]["other_ending"] == ["LICENSE.md", "g.JSONL", "notes.txt"]
  (tree / "part").symlink_to("/nowhere/x")
  for pattern in ("", "**/*.jsonl", "p*/*.jsonl"):
    with pytest.raises(ValueError, match="part is a link to /nowhere/x"):
      find(tree / pattern)
  assert find(tree / "*.jsonl")[0] == ["a.jsonl"]  # does not lead there


def test_links_are_followed_as_what_they_are(tree, tmp_path):
  (tmp_path / "store").mkdir()
  (tmp_path / "store" / "h.jsonl").write_text("{}")
  (tree / "sub" / "more").symlink_to(tmp_path / "store")
  (tree / "again.jsonl").symlink_to(tree / "a.jsonl")
  want = ["a.jsonl", "again.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl", "sub/more/h.jsonl"]
  assert find(tree)[0] == find(tree / "**" / "*.jsonl")[0] == want


@pytest.mark.parametrize("target", [".", "..", "loop"])
def test_folders_that_hold_themselves_are_refused(tree, target):
  (tree / "sub" / "loop").symlink_to(target)
  for pattern in ("", "**/*.jsonl"):
    with pytest.raises(ValueError, match=r"sub/loop.* (holds itself|cannot be read \(Too many)"):
      find(tree / pattern)


def test_what_is_no_regular_file_is_refused_where_it_fits(tree):
  os.mkfifo(tree / "pipe")
  assert "pipe" in find(tree)[1]["other_ending"]
  os.mkfifo(tree / "sub" / "pipe.jsonl")
  for pattern in ("", "**/*.jsonl", "sub/pipe.jsonl"):
    with pytest.raises(ValueError, match="pipe.jsonl is a FIFO, not a regular file"):
      find(tree / pattern)


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "sub/*/*.jsonl"])
def test_an_unreadable_folder_is_named(tree, monkeypatch, pattern):
  scandir = os.scandir

  def refusing(path):
    if path == tree / "sub" / "deep":
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  with pytest.raises(ValueError, match=r"the folder .*sub/deep cannot be read \(Permission denied"):
    find(tree / pattern)


def test_nothing_that_fits_names_the_parameter_and_what_is_there(tree):
  with pytest.raises(ValueError, match=r"CORPUS_PATH='.*/sub/x\*' matches no file"):
    find(tree / "sub" / "x*")
  os.remove(tree / "a.jsonl")
  with pytest.raises(ValueError, match=r"matches no file .*1 left out \(hidden\): .d.jsonl; check"):
    find(tree / "*.jsonl")


def test_broken_links_can_be_kept_for_counting(tree):
  (tree / "gone.jsonl").symlink_to("/nowhere/x")
  (tree / "part").symlink_to("/nowhere/x")
  found = search(tree, ("**", "*.jsonl"), keep_broken=True)
  assert "gone.jsonl" in dict(found.files) and found.left_out["unreadable"] == ["part"]
