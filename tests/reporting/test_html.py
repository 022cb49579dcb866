"""The report page: complete, escaped, self-contained, and the same every time."""

import base64
import html.parser
import re
import struct
import zlib

import pytest

from lmops_jax.reporting import html as page


def _png(width=1440, height=600):
  """A valid grey PNG of the given size, without a plotting library."""
  def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  rows = zlib.compress(b"".join(b"\x00" + b"\x80" * width for _ in range(height)))
  start = b"\x89PNG\r\n\x1a\n"
  return start + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class _Page(html.parser.HTMLParser):
  """Collects tags with attributes and text, and checks that tags nest."""

  VOID = {"meta", "link", "img", "br"}

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self._open = [], [], []
    self.feed(text.replace("<wbr>", ""))  # only says where a line may break
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and self._open[-1] not in ("style", "title"):
      self.text.append(data)

  def attributes(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]

  def words(self):
    return " ".join(" ".join(self.text).split())


def _report(**changes):
  sections = [
    page.Section(
      "Loss & gain",
      "First **paragraph** with `a < b`.\n\n- one\n- two",
      figures=[page.Figure(_png(), "What the curve shows.", alt="a curve")],
      tables=[
        page.Table(
          ["method", page.Column("loss", ".3f"), page.Column("steps", ",.0f"), "seeds"],
          [["pds", 5.4567, 1215.4, 2], ["random", 5.8, None, 2]],
          "Final losses.",
          highlight=[0],
          note="A dash: never.",
        )
      ],
    ),
    page.Section(
      "Documents",
      sections=[
        page.Section(
          "Best", excerpts=[page.Excerpt("def f():\n\treturn 1", "a/b.py", {"score": 2.5})]
        )
      ],
    ),
    page.Section("Configuration", listings=[page.Listing("STEPS = 5", "config.gin")]),
  ]
  report = dict(
    title="PDS", lead="What it showed.", sections=sections, facts={"seed": 0},
    key_figures=[page.KeyFigure("5.46", "test loss", "random: 5.80")],
  )
  return page.Report(**report | changes)


@pytest.fixture(scope="module")
def rendered():
  return page.render(_report())


def test_everything_given_is_on_the_page_in_order(rendered):
  words = _Page(rendered).words()
  want = [
    "PDS", "What it showed.", "test loss", "5.46", "random: 5.80", "seed", "0", "Loss & gain",
    "paragraph", "a < b", "one", "two", "Figure 1. What the curve shows.", "Table 1. Final losses.",
    "pds 5.457 1,215 2", "random 5.800 \N{EN DASH} 2", "A dash: never.", "Documents", "Best",
    "a/b.py", "score 2.5", "def f():", "Configuration", "config.gin", "STEPS = 5",
  ]
  place = words.index("What it showed.") - 4
  for text in want:
    assert " ".join(text.split()) in words[place:], text
    place = words.index(text, place)


def test_nothing_is_fetched(rendered):
  parsed = _Page(rendered)
  for tag, attrs in parsed.tags:
    for name in ("src", "href", "srcset", "data", "action"):
      if name in attrs:
        assert attrs[name].startswith(("data:", "#")), (tag, attrs[name][:60])
  assert not parsed.attributes("script") and not parsed.attributes("iframe")
  style = re.search(r"<style>(.*?)</style>", rendered, re.S)[1]
  assert "url(" not in style and "@import" not in style and "@font-face" not in style
  policy = next(a["content"] for a in parsed.attributes("meta") if "http-equiv" in a)
  assert "default-src 'none'" in policy


def test_pictures_are_embedded_at_half_their_size(rendered):
  (image,) = _Page(rendered).attributes("img")
  assert (image["width"], image["height"], image["alt"]) == ("720", "300", "a curve")
  assert base64.b64decode(image["src"].split(",", 1)[1]) == _png()


def test_contents_link_to_the_sections(rendered):
  parsed = _Page(rendered)
  targets = {attrs["id"] for _, attrs in parsed.tags if "id" in attrs}
  links = [attrs["href"][1:] for attrs in parsed.attributes("a")]
  assert len(links) == 3 and set(links) <= targets


def test_numbers_are_right_aligned_and_rows_highlighted(rendered):
  assert rendered.count('<th scope="col" class="n">') == 3
  assert '<tr class="main"><td class="short">pds</td><td class="n">5.457</td>' in rendered


def test_every_text_is_escaped():
  evil = "<script>alert(1)</script>\"'&"
  report = _report(
    title=evil, lead=evil, facts={evil: evil},
    key_figures=[page.KeyFigure(evil, evil, evil)],
    sections=[
      page.Section(
        evil, evil,
        tables=[page.Table([evil], [[evil]], evil, note=evil)],
        figures=[page.Figure(_png(4, 4), evil, evil)],
        excerpts=[page.Excerpt(evil, evil, {evil: evil})],
        listings=[page.Listing(evil, evil)],
      )
    ],
  )
  text = page.render(report)
  assert "<script" not in text
  parsed = _Page(text)
  assert parsed.attributes("img")[0]["alt"] == evil
  assert parsed.words().count("alert(1)") == 20


def test_documents_cannot_spoil_the_page(tmp_path):
  text = "nul\x00 esc\x1b[31m lone\ud800 bidi\u202eabc\u2066 bom\ufeff tab\there\r\nend\r"
  report = _report(sections=[page.Section("s", excerpts=[page.Excerpt(text)])])
  written = page.write_report(tmp_path / "report" / "index.html", report).read_bytes().decode()
  pre = re.search(r"<pre>(.*?)</pre>", written, re.S)[1]
  assert pre == (
    "nul\\x00 esc\\x1b[31m lone\\ud800 bidi\\u202eabc\\u2066 bom\\ufeff tab\there\nend\\x0d"
  )


def test_other_scripts_stay_as_they_are():
  text = "Grüße, 数据选择, данные, 🙂 and a no-break\N{NO-BREAK SPACE}space"
  assert page.visible(text) == text


def test_long_documents_are_shortened_and_say_so():
  text = " ".join(f"word{i:04d}" for i in range(1000))
  short = page.shorten(text, 300)
  head, note, tail = short.split("\n")
  assert text.startswith(head) and text.endswith(tail)
  assert all(re.fullmatch(r"word\d{4}", word) for word in (head + " " + tail).split())
  left_out = int(re.search(r"([\d,]+) characters left out", note)[1].replace(",", ""))
  assert left_out == len(text) - len(head) - len(tail)
  assert len(short) < 350
  assert page.shorten(text[:300], 300) == text[:300]
  unbroken = page.shorten("x" * 5000, 100)  # no place between words to cut at
  assert unbroken.count("x") >= 100


def test_numbers_in_tables():
  table = page.Table(
    ["text", page.Column("flops", ".2e"), page.Column("share", ".1%"), "count", "plain"],
    [["a", 1.5e13, 0.256, 12345, 0.000123456], ["b", 0.0, -0.5, 0, -2.0]],
  )
  words = _Page(page.render(_report(sections=[page.Section("t", tables=[table])]))).words()
  assert "a 1.50 × 10¹³ 25.6% 12,345 0.0001235" in words
  assert "b 0 \N{MINUS SIGN}50.0% 0 \N{MINUS SIGN}2" in words


def test_names_may_break_after_underscores_and_slashes_only():
  table = page.Table(["pds_no_hessian"], [["x_y"]])
  excerpt = page.Excerpt("text", "pkg/a<b>_c.py")
  text = page.render(_report(sections=[page.Section("s", tables=[table], excerpts=[excerpt])]))
  assert ">pds_<wbr>no_<wbr>hessian</th>" in text and ">x_y</td>" in text
  assert "<cite>pkg/<wbr>a&lt;b&gt;_<wbr>c.py</cite>" in text


def test_the_same_report_gives_the_same_bytes(rendered):
  assert page.render(_report()) == rendered


def test_small_report_needs_no_parts():
  parsed = _Page(page.render(page.Report("Only a title")))
  assert parsed.words() == "Only a title"
  assert not parsed.attributes("nav")


def test_bad_parts_are_named():
  short_row = page.Table(["a", "b"], [[1, 2], [1]], "Losses")
  with pytest.raises(ValueError, match="Row 1 of the table 'Losses' has 1 cells, but .* 2 columns"):
    page.render(_report(sections=[page.Section("s", tables=[short_row])]))
  with pytest.raises(ValueError, match="not a PNG"):
    page.render(_report(sections=[page.Section("s", figures=[page.Figure(b"GIF89a" + b"0" * 30)])]))


def test_marks_of_an_excerpt_are_set_apart():
  text = "a <b> & c"
  excerpt = page.Excerpt(text, marked=[(0, 1), (2, 5), (5, 9)])
  rendered = page.render(_report(sections=[page.Section("s", excerpts=[excerpt])]))
  assert ("<pre><mark>a</mark> <mark>&lt;b&gt;</mark><mark> &amp; c</mark></pre>") in rendered


@pytest.mark.parametrize("text, marked", [
  ("abc", [(1, 2), (0, 1)]), ("abc", [(1, 4)]), ("a" * 1201, [(0, 1)]),
])
def test_marks_that_do_not_fit_are_refused(text, marked):
  excerpt = page.Excerpt(text, marked=marked)
  with pytest.raises(ValueError, match="give marks in order"):
    page.render(_report(sections=[page.Section("s", excerpts=[excerpt])]))
