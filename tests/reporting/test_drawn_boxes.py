"""Boxes and names on a picture: where their pixels are."""

import numpy as np
from PIL import Image, ImageColor

from lmops_jax.reporting import drawn_boxes
from lmops_jax.reporting.drawn_boxes import draw
from lmops_jax.reporting.plots.style import COLOURS


def _is(picture, colour):
  return (np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=-1)


def test_lines_are_at_the_edges_and_what_is_inside_stays():
  grey = Image.new("RGB", (321, 161), (90, 90, 90))
  found = draw(grey, [("dog", [(0.25, 0.5, 0.75, 1.0)])])
  blue = _is(found, COLOURS[0])
  for at in [(80, 120), (160, 80), (240, 120), (160, 160)]:  # x, y: the middle of each edge
    assert blue[at[1], at[0]]
  assert blue[61:79, 80:90].mean() > 0.5  # the name's ground, above the box
  inside = np.asarray(found)[100:150, 100:220]
  assert (inside == 90).all()
  assert (np.asarray(grey) == 90).all()  # the picture itself is not drawn on
  turned = draw(grey, [("dog", [(0.75, 1.0, 0.25, 0.5)])])
  np.testing.assert_array_equal(turned, found)


def test_names_do_not_cover_each_other_and_stay_in_the_picture(monkeypatch):
  places = []
  free = drawn_boxes._free_place
  monkeypatch.setattr(
    drawn_boxes, "_free_place", lambda *a: places.append(free(*a)) or places[-1])
  picture = Image.new("RGB", (300, 200))
  corners = [(0, 0, 0.2, 0.2), (0, 0, 0.3, 0.3), (0.9, 0.9, 1, 1), (0.95, 0.9, 1, 1)]
  draw(picture, [("a long name " * 5, [box]) for box in corners])
  assert len(places) == 4
  for i, (left, top, right, bottom) in enumerate(places):
    assert 0 <= left < right < 300 and 0 <= top < bottom < 200
    for other in places[:i]:
      assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_each_entity_has_its_colour_and_nothing_is_a_copy():
  picture = Image.new("RGB", (200, 200))
  found = draw(picture, [("a", [(0.1, 0.2, 0.4, 0.4), (0.6, 0.2, 0.9, 0.4)]),
                         ("b", [(0.1, 0.7, 0.4, 0.9)])])
  first, second = _is(found, COLOURS[0]), _is(found, COLOURS[1])
  assert first[:100, :100].any() and first[:100, 100:].any() and not first[100:].any()
  assert second[100:, :100].any() and not second[:100].any()
  np.testing.assert_array_equal(draw(picture, []), picture)
