import os
import sys
from collections import Counter

import pytest

from lmops_jax.data import InstalledText
from lmops_jax.data.documents import document_id


def words(seed, count=60):
  """English-looking text that differs from seed to seed."""
  letters = [chr(97 + (seed * 7 + i * i) % 26) for i in range(count)]
  return " ".join(f"word{letter}{'ab'[i % 2] * (i % 5)}" for i, letter in enumerate(letters))


PYTHON = '''"""Module text that explains {name} at some length, for people who read it."""

import os


class Thing:
  \'\'\'What a thing is.

    With an indented line.
  \'\'\'

  def method(self):
    """How the method works; 'quotes' inside."""
    x = """not a docstring"""
    return x


def bare(): "no triple quotes"


@property
def trailing():
  """Ends here."""  # with a comment
  return {name!r}
'''


@pytest.fixture
def heap(tmp_path):
  root = tmp_path / "site-packages"
  files = {
    "pkg/a.py": PYTHON.format(name="a") + "\n# " + words(1) + "\n",
    "pkg/broken.py": "def f(:\n" + words(2),
    "pkg/include/x.h": "// " + words(3),
    "pkg/data.csv": "\n".join(f"{i},{i * 3}" for i in range(100)),
    "pkg/notes.txt": "\n".join(
      f"This is a sentence about subject number {w} in plain words."
      for w in ("one", "two", "six", "ten")
    ),
    "pkg/numbers.txt": "\n".join(f"{i * 17} {i * 31}" for i in range(80)),
    "pkg/guide.md": "# Guide\n\n" + words(5),
    "pkg-1.0.dist-info/METADATA": "Name: pkg\n\n" + words(6),
    "pkg-1.0.dist-info/licenses/COPYING": words(7),
    "pkg-1.0.dist-info/RECORD": words(8),
    "pkg-1.0.dist-info/INSTALLER": words(9),
    "other/LICENSE.txt": words(7),
    "other/__pycache__/a.py": words(10),
    "lmops_jax/own.py": words(11),
    "lmops_jax-0.1.dist-info/METADATA": words(12),
    "__editable__lmops.py": words(13),
    "lib.so": words(14),
  }
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return root


def read(root, **settings):
  counts = Counter()
  corpus = InstalledText(roots=(str(root),), min_bytes=50, **settings)
  return {d.source: d for d in corpus.documents(counts)}, counts


def test_kinds_and_what_is_left_out(heap):
  documents, counts = read(heap)
  kinds = {source: d.kind for source, d in documents.items()}
  licences = {"pkg-1.0.dist-info/licenses/COPYING", "other/LICENSE.txt"} & set(kinds)
  assert len(licences) == 1  # the same licence twice is kept once
  assert counts["duplicate"] == 1
  assert {s: k for s, k in kinds.items() if s not in licences} == {
    "pkg/a.py": "code",
    "pkg/a.py#docstrings": "docstring",
    "pkg/broken.py": "code",
    "pkg/include/x.h": "header",
    "pkg/data.csv": "table",
    "pkg/notes.txt": "prose",
    "pkg/numbers.txt": "table",
    "pkg/guide.md": "markup",
    "pkg-1.0.dist-info/METADATA": "markup",
  }
  assert counts["empty"] == 1  # broken.py has no docstrings
  assert all(d.id == document_id(source) for source, d in documents.items())


def test_docstrings_and_code_part_ways(heap):
  documents, _ = read(heap)
  assert documents["pkg/a.py#docstrings"].text == (
    "Module text that explains a at some length, for people who read it.\n\n"
    "What a thing is.\n\nWith an indented line.\n\n"
    "How the method works; 'quotes' inside.\n\nno triple quotes\n\nEnds here."
  )
  code = documents["pkg/a.py"].text
  assert "explains a" not in code and "With an indented" not in code and "Ends here" not in code
  assert 'x = """not a docstring"""' in code
  assert 'def bare(): "no triple quotes"' in code  # shares its line with code and stays there


def test_result_depends_on_contents_alone(heap, tmp_path):
  first, _ = read(heap, max_bytes=1500)
  copy = tmp_path / "moved"
  names = sorted((p.relative_to(heap) for p in heap.rglob("*") if p.is_file()), reverse=True)
  for i, name in enumerate(names):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes((heap / name).read_bytes())
    os.utime(copy / name, (i, i))
  second, _ = read(copy, max_bytes=1500)
  assert list(first.values()) == list(second.values())


def test_budget_and_weights(heap):
  documents, counts = read(heap, max_bytes=1500)
  assert sum(len(d.text.encode()) for d in documents.values()) <= 1500
  assert counts["over_budget"] > 0
  assert len({d.kind for d in documents.values()}) >= 3
  only, _ = read(heap, weights={k: 0 for k in ("code", "header", "table", "prose", "docstring")})
  assert {d.kind for d in only.values()} == {"markup", "licence"}


def test_bad_files_are_counted(heap):
  (heap / "pkg/latin.py").write_bytes(b"# caf\xe9 " + words(20).encode())
  (heap / "pkg/binary.dat").write_bytes(b"\0\1" * 100)
  (heap / "pkg/tiny.md").write_text("short")
  (heap / "pkg/huge.csv").write_text("1,2\n" * 50_000)
  (heap / "pkg/link.md").symlink_to(heap / "pkg/guide.md")
  documents, counts = read(heap)
  assert counts["undecodable"] == 3  # latin.py counts as code and as docstrings
  assert counts["too_short"] == 1 and counts["too_large"] == 1
  assert "pkg/link.md" not in documents


def test_unreadable_file_is_counted(heap, monkeypatch):
  target = str(heap / "pkg/guide.md")
  original = open

  def refuse(path, *args, **kwargs):
    if path == target:
      raise PermissionError(path)
    return original(path, *args, **kwargs)

  monkeypatch.setattr("builtins.open", refuse)
  documents, counts = read(heap)
  assert counts["unreadable"] == 1 and "pkg/guide.md" not in documents


def test_unreadable_folder_is_counted(heap, monkeypatch):
  scandir = os.scandir

  def refusing(path):
    if str(path).endswith("include"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  counts = Counter()
  documents = list(InstalledText(roots=(str(heap),)).documents(counts))
  assert counts["unreadable"] == 1 and "header" not in {d.kind for d in documents}


def test_fingerprint_follows_files_and_settings(heap):
  corpus = InstalledText(roots=(str(heap),))
  before = corpus.fingerprint()
  os.utime(heap / "pkg/guide.md", (1, 1))
  (heap / "pkg/__pycache__").mkdir()
  (heap / "pkg/__pycache__/a.cpython-311.pyc").write_bytes(b"x")
  assert corpus.fingerprint() == before
  assert InstalledText(roots=(str(heap),), max_bytes=5).fingerprint() != before
  (heap / "pkg/guide.md").write_text("# Guide that has grown\n" + words(5))
  assert corpus.fingerprint() != before


def test_this_installation_has_varied_text():
  documents = list(InstalledText(max_bytes=150_000).documents())
  assert 50_000 < sum(len(d.text.encode()) for d in documents) <= 150_000
  assert {"code", "docstring", "markup"} <= {d.kind for d in documents}
  assert not any(d.source.startswith("lmops_jax") for d in documents)
  assert sys.prefix not in "".join(d.source for d in documents)


@pytest.mark.parametrize("settings,message", [
  ({"max_bytes": 0}, "max_bytes=0"),
  ({"weights": {"poetry": 1}}, "poetry"),
  ({"weights": {"code": -1}}, "-1"),
  ({"weights": dict.fromkeys("code docstring header licence markup prose table".split(), 0)},
   "no kind"),
  ({"near_duplicates": 0}, "near_duplicates=0 must be a number above 0"),
])
def test_bad_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    InstalledText(**settings)


def test_missing_root():
  with pytest.raises(ValueError, match="roots\\[0\\]='/no/such' must be an existing path"):
    list(InstalledText(roots=("/no/such",)).documents())
