"""Boxes follow the crop of their picture: against pixels that are drawn, and rules by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data.grounded_crops import cropped_boxes, fitted
from lmops_jax.data.grounded_text import GroundedText, Located
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.multimodal import LeftOut, Picture, Record, drawn

CROP = ImageSettings(64, 64, fit="crop")


def test_boxes_in_a_wide_picture_by_hand():
  # 200 x 100 becomes 128 x 64; the square is the middle from 32 to 96.
  found = cropped_boxes([
    [0.25, 0, 0.75, 1],  # all of the square
    [0.5, 0.25, 0.75, 0.5],
    [0, 0, 0.5, 1],  # half of it is cut off
    [0, 0, 0.3, 1],  # a sixth is left
    [0, 0, 0.3125, 1],  # a fifth is left
    [0.8, 0, 1, 1],  # outside
  ], 200, 100, 64)
  np.testing.assert_allclose(found[:3], [[0, 0, 1, 1], [0.5, 0.25, 1, 0.5], [0, 0, 0.5, 1]])
  np.testing.assert_allclose(found[4], [0, 0, 0.125, 1])
  assert np.isnan(found[[3, 5]]).all()


def test_the_excess_is_halved_without_rounding():
  # 5 x 3 becomes int(64 * 5 / 3) = 106 x 64: 21 are cut off on each side.
  found = cropped_boxes([[0.5, 0, 0.75, 1]], 5, 3, 64)
  np.testing.assert_allclose(found, [[32 / 64, 0, (0.75 * 106 - 21) / 64, 1]])
  # 65 x 64 stays: half a pixel on each side.
  found = cropped_boxes([[0.5, 0, 0.75, 1]], 65, 64, 64)
  np.testing.assert_allclose(found, [[32 / 64, 0, (0.75 * 65 - 0.5) / 64, 1]])


@pytest.mark.parametrize("width, height", [(150, 90), (80, 230), (64, 64), (640, 480)])
def test_boxes_stay_on_what_they_mark(width, height):
  """A white box on black: where it is in the cropped pixels is where its box says."""
  box = np.array([0.42, 0.4, 0.58, 0.55])
  pixels = np.zeros((height, width, 3), np.uint8)
  x1, y1, x2, y2 = (box * [width, height, width, height]).round().astype(int)
  pixels[y1:y2, x1:x2] = 255
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  lit = CROP.pixels(file.getvalue(), "p")[..., 0] > 127
  rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
  marked = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
  exact = np.array([x1, y1, x2, y2]) / [width, height, width, height]
  np.testing.assert_allclose(
    cropped_boxes([exact], width, height, 64)[0] * 64, marked, atol=1.01)


def _record(*spans, text="a dog", num_given=0, width=200):
  picture = drawn(np.zeros((100, width, 3), np.uint8), "p")
  return Record(1, (picture, GroundedText(text, spans)), num_given, "f:1")


def _fitted(record, settings=CROP):
  left_out = LeftOut()
  return list(fitted([record], settings, left_out)), left_out


def test_a_caption_keeps_the_stretches_with_a_box():
  inside, outside = (0.25, 0, 0.75, 1), (0.8, 0, 1, 1)
  record, = _fitted(_record(Located(0, 1, (outside,)), Located(2, 5, (outside, inside))))[0]
  assert record.parts[1].spans == (Located(2, 5, ((0, 0, 1, 1),)),)
  (record,), left_out = _fitted(_record(Located(0, 5, (outside,))))
  assert type(record.parts[1]) is str and record.parts[1] == "a dog"
  assert left_out.counts == {"lost_box": 1, "plain": 1}


def test_squashing_moves_no_box():
  record = _record(Located(0, 5, ((0.8, 0, 1, 1),)))
  (found,), left_out = _fitted(record, ImageSettings(64, 64))
  assert found is record and not left_out.counts


@pytest.mark.parametrize("text, spans, num_given", [
  ("it", (Located(0, 2, ((0.8, 0, 1, 1),)),), 2),  # the question is about it
  ("", (Located(0, 0, ((0.8, 0, 1, 1),)),), 0),  # it is the answer
])
def test_questions_and_answers_are_left_out_with_their_boxes(text, spans, num_given):
  found, left_out = _fitted(_record(*spans, text=text, num_given=num_given))
  assert not found and left_out.counts == {"lost_box": 1, "box_outside": 1}


def test_a_phrase_without_boxes_stays():
  (found,), left_out = _fitted(_record(Located(0, 5, ()), num_given=2))
  assert found.parts[1].spans == (Located(0, 5, ()),) and not left_out.counts


def test_pictures_that_cannot_be_read_are_named():
  record = Record(
    1, (Picture("bad.png", data=b"x"), GroundedText("a", [Located(0, 1, ((0, 0, 1, 1),))])), 0, "f")
  found, left_out = _fitted(record)
  assert not found and "bad.png is no picture" in left_out.named["unreadable"][0]


def test_a_turned_picture_has_the_size_in_which_it_is_seen():
  file = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(np.zeros((200, 100, 3), np.uint8)).save(file, "JPEG", exif=exif)
  picture = Picture("p", data=file.getvalue())
  text = GroundedText("a dog", [Located(0, 5, ((0.25, 0, 0.75, 1),))])
  (record,), _ = _fitted(Record(1, (picture, text), 0, "f"))  # seen, it is 200 x 100
  assert record.parts[1].spans[0].boxes == ((0, 0, 1, 1),)
