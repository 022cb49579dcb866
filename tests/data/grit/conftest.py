"""A few small pictures, and rows of GrIT about them."""

import json

import numpy as np
import pytest
from PIL import Image

CAPTION = "a dog in a field of flowers"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """`1.png` to `4.png`, 60 x 40 pixels, and `broken.png`."""
  folder = tmp_path_factory.mktemp("grit")
  rng = np.random.default_rng(0)
  for i in range(1, 5):
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{i}.png")
  (folder / "broken.png").write_bytes(b"no picture")
  return folder


@pytest.fixture
def row():
  """`(id, caption, **more) -> fields` of the released form."""
  return lambda identifier, caption=CAPTION, **more: {
    "id": identifier, "caption": caption, "url": f"http://x/{identifier}", "width": 60,
    "height": 40, "clip_similarity_vitb32": 0.25, **more}


@pytest.fixture
def write(tmp_path):
  """`(rows) -> path` of JSON lines."""
  def written(rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    return str(path)
  return written
