"""The text heap that every installation carries: its own site-packages.

It is Python code, docstrings, headers, licences, tables, markup and plain text, hundreds of
megabytes, as a corpus that needs no download. It stands in for a web crawl: mostly useless for any
one purpose, repetitive, with good prose in between. The result is a function of the installed
files' names and contents (and of the Python version, whose parser finds the docstrings), not of
when or in which order they were installed.

Files of each kind are taken in the order of a hash of their path, always from the kind that has
given least so far for its weight, until the budget is used up: a kind that runs out leaves its
share to the others, and no large package can crowd out the rest. Compiled and volatile files (byte
code, install records, this package itself) are left aside; files above `max_file_bytes` are left
out and counted.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lmops_jax.config.setting_types import (
  ByteCount,
  Count,
  ExistingPath,
  NonNegative,
  Share,
  component,
)
from lmops_jax.data.documents import Corpus, Document, document_id
from lmops_jax.data.near_duplicates import Deduplicator
from lmops_jax.host.hashing import order_key

# Kind by the file name's ending. A Python file gives two documents: its docstrings and the rest.
_KINDS = {
  "code": ".py .pyi .pyx .pxd .pxi .c .cc .cpp .cxx .cu .f .f90 .js .mjs .ts .sh .r .m .jl .go .rs",
  "header": ".h .hh .hpp .hxx .cuh .inl .inc .tcc .td .proto .fbs",
  "table": ".csv .tsv .tab .dat .json .afm",
  "markup": ".rst .md .html .htm .css .xml .xsl .yaml .yml .toml .ini .cfg .cmake",
  "prose": ".txt",
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_LICENCE = re.compile(r"(licen[cs]e|copying|copyright|notice|patents|third.?party)", re.IGNORECASE)
_LICENCE_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".mit", ".bsd", ".apache")
_VOLATILE_NAMES = frozenset(
  "RECORD INSTALLER REQUESTED WHEEL direct_url.json top_level.txt entry_points.txt".split()
)
_VOLATILE_FOLDERS = ("__pycache__", "lmops_jax")
_VOLATILE_PREFIXES = ("__editable__", "lmops_jax-", "~")
_WEIGHTS = {"code": 2.0, "header": 2.0, "table": 0.5}  # the other kinds have 1
KINDS = ("code", "docstring", "header", "licence", "markup", "prose", "table")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class InstalledText(Corpus):
  """Text of the installed packages; kinds are those of `KINDS`.

  Attributes:
    max_bytes: the most text (UTF-8) to take; None takes all there is.
    roots: folders to read; None reads this interpreter's site-packages.
    weights: relative shares of the kinds if all have enough text; a kind that is not named has 1,
      and 0 leaves a kind out. None: code and header 2, table 0.5, the rest 1.
    min_bytes, max_file_bytes: shorter documents and larger files are left out and counted.
    near_duplicates: the share of known text above which a document is left out (`Deduplicator`).
  """

  max_bytes: ByteCount | None = 18_000_000
  roots: Sequence[ExistingPath] | None = None
  weights: Mapping[Literal[KINDS], NonNegative] | None = None
  min_bytes: Count = 200
  max_file_bytes: ByteCount = 1 << 17
  near_duplicates: Share = 0.8

  def __post_init__(self):
    if not any(self._weight(kind) for kind in KINDS):
      raise ValueError("data.InstalledText.weights leaves no kind of text; set one above 0.")

  def _weight(self, kind: str) -> float:
    return (_WEIGHTS if self.weights is None else self.weights).get(kind, 1.0)

  def fingerprint(self) -> str:
    """A hash of the settings and of the names and sizes of all files that could be read."""
    state = hashlib.blake2b(digest_size=16)
    state.update(repr((dataclasses.astuple(self), sys.version_info[:2])).encode())
    for path, file in sorted(self._files(Counter()).items()):
      state.update(f"{path}\0{file.size}\n".encode("utf-8", "surrogatepass"))
    return state.hexdigest()

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    files = self._files(counts)
    streams = {
      kind: self._candidates(kind, files, counts) for kind in KINDS if self._weight(kind) > 0
    }
    used = dict.fromkeys(streams, 0)
    deduplicator = Deduplicator(self.near_duplicates)
    total = 0
    while streams:
      kind = min(streams, key=lambda kind: (used[kind] / self._weight(kind), kind))
      document = next(streams[kind], None)
      if document is None:
        del streams[kind]
        continue
      num_bytes = len(document.text.encode())
      if num_bytes < self.min_bytes:
        counts["too_short" if document.text.strip() else "empty"] += 1
        continue
      if self.max_bytes is not None and total + num_bytes > self.max_bytes:
        counts["over_budget"] += 1 + sum(len(list(rest.paths)) for rest in streams.values())
        return
      reason = deduplicator.reason(document.text)
      if reason is not None:
        counts[reason] += 1
        continue
      used[document.kind if document.kind in used else kind] += num_bytes
      total += num_bytes
      yield document

  def _files(self, counts: Counter[str]) -> dict[str, "_File"]:
    """Text files by their path relative to their root, `/` between the parts.

    Args:
      counts: gets the number of folders that cannot be listed under "unreadable".
    """
    roots = _site_packages() if self.roots is None else tuple(map(Path, self.roots))
    files: dict[str, _File] = {}
    for root in roots:
      if not root.is_dir():
        raise ValueError(f"data.InstalledText.roots: {root} is not a folder.")
      for path, file in _walk(root, "", counts):
        files.setdefault(path, file)
    return files

  def _candidates(self, kind: str, files: Mapping[str, "_File"], counts: Counter[str]) -> "_Stream":
    """The documents of one kind, in the order of a hash of their id."""
    source = "code" if kind == "docstring" else kind
    ending = {"docstring": "#docstrings"}.get(kind, "")
    chosen = []
    for path, file in files.items():
      if file.kind == source and (kind != "docstring" or path.endswith(".py")):
        if file.size > self.max_file_bytes:
          counts["too_large"] += 1
        else:
          chosen.append((order_key(document_id(path + ending)), path))
    chosen.sort()
    return _Stream(kind, ending, iter([path for _, path in chosen]), files, counts)


@dataclasses.dataclass(frozen=True)
class _File:
  path: str
  size: int
  kind: str


class _Stream:
  """Reads the files of one kind one after another; a file that gives no text is skipped."""

  def __init__(self, kind, ending, paths, files, counts):
    self.kind, self.paths = kind, paths
    self._ending, self._files, self._counts = ending, files, counts

  def __next__(self) -> Document:
    for path in self.paths:
      text = self._text(self._files[path].path)
      if text is None:
        continue
      if path.endswith(".py"):
        docstrings, code = _split_python(text)
        text = docstrings if self.kind == "docstring" else code
      kind = "table" if self.kind == "prose" and not _reads_like_prose(text) else self.kind
      source = path + self._ending
      return Document(document_id(source), text, kind, source)
    raise StopIteration

  def _text(self, path: str) -> str | None:
    try:
      with open(path, "rb") as file:
        data = file.read()
    except OSError:
      self._counts["unreadable"] += 1
      return None
    try:
      text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
      text = "\0"
    if "\0" in text:
      self._counts["undecodable"] += 1
      return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@functools.lru_cache(maxsize=1)
def _site_packages() -> tuple[Path, ...]:
  paths = sysconfig.get_paths()
  return tuple(dict.fromkeys(Path(paths[name]).resolve() for name in ("purelib", "platlib")))


def _walk(
  folder: os.PathLike | str, prefix: str, counts: Counter[str]
) -> Iterator[tuple[str, _File]]:
  try:
    with os.scandir(folder) as entries:
      entries = sorted(entries, key=lambda entry: entry.name)
  except OSError:
    counts["unreadable"] += 1
    return
  for entry in entries:
    name = entry.name
    if name.startswith(_VOLATILE_PREFIXES):
      continue
    if entry.is_dir(follow_symlinks=False):
      if name not in _VOLATILE_FOLDERS:
        yield from _walk(entry.path, f"{prefix}{name}/", counts)
    elif entry.is_file(follow_symlinks=False) and name not in _VOLATILE_NAMES:
      kind = _kind(name, prefix)
      if kind is not None:
        yield prefix + name, _File(entry.path, entry.stat(follow_symlinks=False).st_size, kind)


def _kind(name: str, folder: str) -> str | None:
  """The kind of a file, or None if it is not text that we read."""
  stem, dot, suffix = name.rpartition(".")
  suffix = (dot + suffix).lower() if stem else ""
  in_metadata = ".dist-info/" in folder
  if suffix in _LICENCE_SUFFIXES or (in_metadata and suffix not in _KIND_OF_SUFFIX):
    if _LICENCE.match(name) or (in_metadata and "/licenses/" in folder):
      return "licence"
  if name == "METADATA" and in_metadata:
    return "markup"
  if name.lower() == "cmakelists.txt":
    return "code"
  if suffix == "" and name.lower().startswith("readme"):
    return "prose"
  return _KIND_OF_SUFFIX.get(suffix)


def _reads_like_prose(text: str) -> bool:
  """Tells prose from the numbers, names and check sums that plain text files mostly hold."""
  words = text.split()
  num_lines = sum(bool(line.strip()) for line in text.split("\n"))
  num_alphabetic = sum(word.strip("\"'()[].,;:!?").isalpha() for word in words)
  return len(words) >= 4 * num_lines and num_alphabetic >= 0.7 * len(words)


def _split_python(text: str) -> tuple[str, str]:
  """A module's docstrings (indentation removed, blank lines between them), and the code without.

  A text without triple quotes is not parsed, and its docstrings stay in the code.
  """
  if '"""' not in text and "'''" not in text:
    return "", text
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      return "", text
  docstrings, spans = [], []
  for node in _scopes(tree):
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
      if isinstance(first.value.value, str):
        docstrings.append(inspect.cleandoc(first.value.value))
        spans.append((first.lineno, first.end_lineno, first.col_offset, first.end_col_offset))
  lines = text.split("\n")
  for start, end, column, end_column in sorted(spans, reverse=True):
    head = lines[start - 1].encode()[:column].decode().strip()
    tail = lines[end - 1].encode()[end_column:].decode().strip()
    if not head and (not tail or tail.startswith("#")):
      del lines[start - 1 : end]
  joined = "\n\n".join(part for part in docstrings if part)
  return joined.encode("utf-8", "replace").decode(), "\n".join(lines)


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
  """The module, its classes and functions, in the order of the text."""
  waiting = [tree]
  while waiting:
    node = waiting.pop()
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
      yield node
    if isinstance(node, (ast.expr, ast.arguments)):
      continue
    waiting.extend(reversed(list(ast.iter_child_nodes(node))))
