"""Which pages and pictures of the web are kept."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import ImageJsonl, ImageSettings, WebPages
from lmops_jax.data.multimodal import LeftOut


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for name, pixels in {
    "good": rng.integers(0, 256, (70, 80, 3), np.uint8),
    "small": rng.integers(0, 256, (63, 200, 3), np.uint8),
    "grey": np.full((70, 70, 3), (9, 9, 9), np.uint8),
  }.items():
    Image.fromarray(pixels).save(tmp_path / f"{name}.png")
  moving = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2)]
  file = io.BytesIO()
  moving[0].save(file, "GIF", save_all=True, append_images=moving[1:])
  (tmp_path / "moving.gif").write_bytes(file.getvalue())
  (tmp_path / "broken.png").write_bytes(b"no picture")
  return tmp_path


def _pages(folder, rows, **settings):
  path = folder / "pages.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return WebPages(ImageJsonl(str(path)), **settings)


def _row(text, *names):
  return {"text": text, "images": [f"{name}.png" for name in names]}


def _shown(record):
  return [part if isinstance(part, str) else part.path.rsplit("/")[-1] for part in record.parts]


def test_pictures_that_show_nothing_are_left_out(folder):
  moving = {"text": "<image>f<image>", "images": ["moving.gif", "good.png"]}
  pages = _pages(folder, [
    _row("a<image>b<image>c<image>d", "small", "good", "good"),
    _row("<image>e<image>", "grey", "broken"), moving, {"text": "no picture"},
  ])
  left_out = LeftOut()
  records = list(pages.records(left_out))
  assert [_shown(record) for record in records] == [
    ["a", "b", "good.png", "c", "good.png", "d"], ["moving.gif", "f", "good.png"]]
  assert left_out.counts == {"unreadable": 2, "one_colour": 1, "no_picture": 2, "animated": 1}
  assert "small.png is 200 x 63 pixels and a side must have" in left_out.named["unreadable"][0]
  assert left_out.named["one_colour"][0].endswith("grey.png")
  assert left_out.named["no_picture"] == ["pages.jsonl:2", "pages.jsonl:4"]


def test_of_a_prompt_what_is_given_stays_given(folder):
  row = {"prompt": "q<image>r<image>", "completion": "a<image>", "images": [
    "good.png", "grey.png", "good.png"]}
  record, = _pages(folder, [row]).records()
  assert _shown(record) == ["q", "good.png", "r", "a", "good.png"] and record.num_given == 3


def test_of_pages_with_one_picture_a_share_is_kept(folder):
  rows = [_row(f"t{i}<image>", "good") for i in range(400)]
  rows += [_row("two<image><image>", "good", "good")]
  small = ImageSettings(4, 4)

  def kept(**settings):
    left_out = LeftOut()
    records = list(_pages(folder, rows, images=small, **settings).records(left_out))
    assert len(records) + left_out.counts["single_picture"] == 401
    return [record.parts[0] for record in records]

  half = kept()
  assert abs(len(half) - 201) < 40 and half[-1] == "two"  # four deviations
  assert kept(num_threads=3) == half != kept(seed=1)
  assert len(kept(single_share=1.0)) == 401 and kept(single_share=0.0) == ["two"]
  assert set(kept(single_share=0.25)) < set(half)


def test_a_fingerprint_tells_settings_apart(folder):
  pages = _pages(folder, [_row("<image>", "good")])
  assert pages.fingerprint() == WebPages(pages.corpus, num_threads=2).fingerprint()
  for other in (
    WebPages(pages.corpus, seed=1), WebPages(pages.corpus, single_share=0.25),
    WebPages(pages.corpus, ImageSettings(min_side=32)),
  ):
    assert other.fingerprint() != pages.fingerprint()
