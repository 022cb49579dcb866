"""WebSRC: questions about web pages, as screenshots and text (arXiv:2101.09465)."""

from __future__ import annotations

import csv
import functools
import html.parser
import io
from collections.abc import Iterator
from pathlib import Path

from lmops_jax.data.multimodal import IMAGE
from lmops_jax.data.tasks.pictures.source import NotThere, Source, fields_of
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import checked, printable, read_json, read_text

_FIELDS = ("question", "id", "answer")
_ROW_DIGITS = 5  # of an id, behind domain and page: "bo010000100007"
_UNSEEN = frozenset(["script", "style", "noscript", "head", "template"])


def websrc(source: Source) -> Iterator[Example | None]:
  """Rows of `DOMAIN/SITE/dataset.csv`, with pages in `processed_data`, by `dataset_split.json`."""
  path = source.file("dataset_split.json", "dataset_split_release.json")
  splits = checked(dict[str, list[str]], read_json(path), path)
  held_out = {site for name, sites in splits.items() if name != "train" for site in sites}
  if source.split != "train" and source.split not in splits:
    raise NotThere(
      f"{printable(path)} has no split {source.split!r} (it has {', '.join(splits)}).")
  for table in sorted(source.folder.glob("*/*/dataset.csv")):
    site = table.parents[1].name[:2] + table.parent.name
    # the first release of the file lists no sites to train on: all others are
    wanted = site not in held_out if source.split == "train" else site in splits[source.split]
    if wanted:
      yield from _rows(source, table)


def _rows(source: Source, table: Path) -> Iterator[Example | None]:
  pages, sees = table.parent / "processed_data", IMAGE in source.prompt
  for number, row in enumerate(csv.DictReader(io.StringIO(read_text(table))), 2):
    missing = [name for name in _FIELDS if not row.get(name)]
    if missing:
      raise ValueError(
        f"{printable(table)}:{number} has no {' and no '.join(missing)}; test splits without "
        "answers cannot be used."
      )
    page = row["id"][2:-_ROW_DIGITS]
    text = page_text(pages / f"{page}.html") if "{text}" in source.prompt else ""
    prompt = fields_of(source.prompt, question=row["question"], text=text)
    picture = (pages / f"{page}.png").relative_to(source.folder)
    yield source.example(row["id"], prompt, [picture] if sees else [], answers=[row["answer"]])


@functools.lru_cache(maxsize=16)
def page_text(path: Path) -> str:
  """The words of a page in the order of its source, without scripts and styles.

  Raises:
    ValueError: no such page.
  """
  reader = _Words()
  reader.feed(read_text(path))
  reader.close()
  return " ".join(" ".join(reader.found).split())


class _Words(html.parser.HTMLParser):
  """Collects text outside of what a browser does not show."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.found: list[str] = []
    self._inside: list[str] = []

  def handle_starttag(self, tag, attrs):
    if tag == "body":  # HTML may leave out the end of the head
      self._inside.clear()
    elif tag in _UNSEEN:
      self._inside.append(tag)

  def handle_endtag(self, tag):
    if self._inside and tag == self._inside[-1]:
      self._inside.pop()

  def handle_data(self, data):
    if not self._inside:
      self.found.append(data)
