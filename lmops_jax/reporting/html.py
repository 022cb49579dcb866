"""One self-contained HTML page a run: key figures, plots, tables, excerpts, for screen and paper.

A report is a tree of frozen dataclasses, rendered by one packaged jinja2 template. Everything given
is escaped; pictures are embedded; the page asks the network for nothing (its content policy forbids
it).
"""

import base64
import dataclasses
import functools
import html
import numbers
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from lmops_jax.host.whole_files import write_text


@dataclasses.dataclass(frozen=True)
class KeyFigure:
  """A number to see first: `value` large, `label` under it, `note` small."""

  value: str
  label: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
  """A table column. `format` is a format spec for numbers (".3f", ",d", ".1%").

  Columns whose cells are all numbers (or None) are set to the right in figures of equal width;
  `align` ("left", "right") overrides that.
  """

  title: str
  format: str = ""
  align: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells: strings, numbers, or None (shown as a dash).

  Attributes:
    columns: `Column` or plain titles.
    rows: each as long as `columns`.
    caption: above the table.
    highlight: indices of rows to set in bold.
    note: below the table, in small type.
  """

  columns: Sequence[Column | str]
  rows: Sequence[Sequence[Any]]
  caption: str = ""
  highlight: Sequence[int] = ()
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
  """A PNG picture, drawn at twice its size on the page.

  Attributes:
    png: the file's bytes.
    caption: below the picture: what it shows and how to read it.
    alt: the same for those who cannot see it; the caption if empty.
  """

  png: bytes
  caption: str = ""
  alt: str = ""


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """A piece of a document, quoted as it is.

  Attributes:
    text: any text; long ones are shortened in the middle, which is said.
    title: what the document is called.
    facts: label to value, shown beside the title.
    max_characters: the most characters of the text that are shown.
    marked: characters of the text that are set apart, half-open, in order and disjoint; a text with
      some is not shortened, so it must have at most `max_characters`.
  """

  text: str
  title: str = ""
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  max_characters: int = 1200
  marked: Sequence[tuple[int, int]] = ()


@dataclasses.dataclass(frozen=True)
class Listing:
  """Preformatted text such as a resolved configuration."""

  text: str
  title: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading with, in this order, text, figures, tables, excerpts, listings and subsections.

  `text` knows four signs: an empty line starts a paragraph, lines that start with "- " are a list,
  `backticks` are set as code, and **stars** in bold.
  """

  title: str
  text: str = ""
  tables: Sequence[Table] = ()
  figures: Sequence[Figure] = ()
  excerpts: Sequence[Excerpt] = ()
  listings: Sequence[Listing] = ()
  sections: Sequence["Section"] = ()


@dataclasses.dataclass(frozen=True)
class Report:
  """The page.

  Attributes:
    title: the page's.
    lead: what the run showed, in two or three sentences; written like the `text` of a section.
    key_figures: three to five numbers.
    sections: the body.
    facts: label to value, shown small under the lead (date, versions, seeds, folder).
  """

  title: str
  lead: str = ""
  key_figures: Sequence[KeyFigure] = ()
  sections: Sequence[Section] = ()
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_report(path, report: Report) -> Path:
  """Renders `report` into the file `path`, in one atomic step."""
  path = Path(path)
  text = render(report)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, text)
  return path


def render(report: Report) -> str:
  """The HTML text of `report`; the same report gives the same text.

  Raises:
    ValueError: a table row of another length than its columns, a figure that is not a PNG, or marks
      that do not fit their excerpt.
  """
  template = _environment().get_template("report.html.j2")
  return template.render(report=report, figure_numbers=_Counter(), table_numbers=_Counter())


def shorten(text: str, max_characters: int) -> str:
  """`text`, or its beginning and end with a note of how many characters were left out between."""
  if len(text) <= max_characters:
    return text
  head = text[: max_characters * 3 // 4]
  tail = text[len(text) - (max_characters - len(head)) :]
  # Cut between words if one ends near the cut.
  head = re.sub(r"(?<=\s)\S{1,30}$", "", head).rstrip()
  tail = re.sub(r"^\S{1,30}(?=\s)", "", tail).strip("\r\n")
  left_out = f"[… {len(text) - len(head) - len(tail):,} characters left out …]"
  return "\n".join(part for part in (head, left_out, tail) if part)


def visible(text: str) -> str:
  """`text` with invisible and direction-changing characters written out as escapes.

  Tabs, line ends and ordinary spaces stay. Quoted documents may hold NUL bytes, lone surrogates or
  bidirectional overrides, which would spoil the page around them.
  """
  return _INVISIBLE.sub(lambda match: _escaped(match[0]), text.replace("\r\n", "\n"))


# C0 and C1 controls but tab and newline, soft hyphen, zero-width and bidirectional marks,
# surrogates, private use, byte order mark and interlinear marks.
_INVISIBLE = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
  "\ud800-\udfff\ue000-\uf8ff\ufeff\ufff9-\ufffb]"
)


def _escaped(character: str) -> str:
  code = ord(character)
  return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# --- rendering ------------------------------------------------------------------------------------

_TIMES = "\N{MULTIPLICATION SIGN}"
_DASH = "\N{EN DASH}"
_GAP = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


class _Counter:
  """Numbers figures and tables in the order of the page."""

  def __init__(self):
    self._count = 0

  def next(self) -> int:
    self._count += 1
    return self._count


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("lmops_jax.reporting", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(value) if type(value) is str else value,
  )
  environment.filters.update(
    prose=_prose,
    data_uri=_data_uri,
    css_size=_css_size,
    cells=_cells,
    pieces=_pieces,
    breakable=_breakable,
  )
  return environment


def _prose(text: str) -> markupsafe.Markup:
  """Paragraphs, "- " lists, `code` and **bold** of a text, as HTML."""
  blocks = []
  for block in re.split(r"\n\s*\n", visible(text).strip()):
    lines = block.strip().splitlines()
    if not lines:
      continue
    if all(line.startswith(("- ", "  ")) for line in lines) and lines[0].startswith("- "):
      items = re.split(r"^- ", "\n".join(lines), flags=re.M)[1:]
      blocks.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")
    else:
      blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
  return markupsafe.Markup("\n".join(blocks))


def _inline(text: str) -> str:
  parts = re.split(r"`([^`]*)`", " ".join(text.split()))
  return "".join(
    f"<code>{html.escape(part)}</code>"
    if i % 2
    else re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(part))
    for i, part in enumerate(parts)
  )


def _pieces(excerpt: Excerpt) -> list[tuple[str, bool]]:
  """The text of an excerpt, cut where marks begin and end, and whether each piece is marked."""
  text, marked = excerpt.text, excerpt.marked
  if not marked:
    return [(shorten(text, excerpt.max_characters), False)]
  edges = [edge for mark in marked for edge in mark]
  if len(text) > excerpt.max_characters or edges != sorted(edges) or not (
      0 <= edges[0] and edges[-1] <= len(text)):
    raise ValueError(
      f"The excerpt {excerpt.title!r} has {len(text)} characters, at most "
      f"{excerpt.max_characters} of which are shown, and marks {list(marked)}; give marks in order "
      "and within the text, and a text that is shown whole."
    )
  edges = [0, *edges, len(text)]
  return [(text[a:b], bool(i % 2)) for i, (a, b) in enumerate(zip(edges, edges[1:])) if a < b]


def _breakable(text: str) -> markupsafe.Markup:
  """Lets a name such as `a_long/name` be broken after its underscores and slashes."""
  return markupsafe.Markup(re.sub(r"(?<=[_/])(?=\w)", "<wbr>", html.escape(visible(text))))


def _data_uri(png: bytes) -> markupsafe.Markup:
  _png_size(png)
  return markupsafe.Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))


def _css_size(png: bytes) -> tuple[int, int]:
  width, height = _png_size(png)
  return round(width / 2), round(height / 2)


def _png_size(png: bytes) -> tuple[int, int]:
  if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
    raise ValueError("A figure of the report is not a PNG picture; give it the bytes of one.")
  return struct.unpack(">II", png[16:24])


def _cells(table: Table) -> dict[str, Any]:
  """Header and body cells of a table as `(text, right aligned)`."""
  columns = [c if isinstance(c, Column) else Column(c) for c in table.columns]
  for i, row in enumerate(table.rows):
    if len(row) != len(columns):
      raise ValueError(
        f"Row {i} of the table {table.caption or columns[0].title!r} has {len(row)} cells, "
        f"but the table has {len(columns)} columns."
      )
  right = []
  for j, column in enumerate(columns):
    cells = [row[j] for row in table.rows if row[j] is not None]
    numeric = bool(cells) and all(_is_number(cell) for cell in cells)
    right.append(column.align == "right" if column.align else numeric)
  return {
    "header": [(column.title, r) for column, r in zip(columns, right)],
    "rows": [
      [(_cell(cell, column.format), r) for cell, column, r in zip(row, columns, right)]
      for row in table.rows
    ],
  }


def _is_number(value) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _cell(value, spec: str) -> str:
  if value is None:
    return _DASH
  if not _is_number(value):
    return str(value)
  if spec and not (value == 0 and spec.endswith("e")):
    text = format(value, spec)
  elif value == 0:
    text = "0"
  else:
    text = f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:.4g}"
  return _power(text).replace("-", _MINUS)


def _power(text: str) -> str:
  """1.2e+09 as 1.2 x 10^9 with a superscript made of Unicode digits."""
  match = re.fullmatch(r"(-?[\d.]+)e([+-])0*(\d+)", text)
  if not match:
    return text
  sign = "\N{SUPERSCRIPT MINUS}" if match[2] == "-" else ""
  digits = match[3].translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
  return f"{match[1]}{_GAP}{_TIMES}{_GAP}10{sign}{digits}"
