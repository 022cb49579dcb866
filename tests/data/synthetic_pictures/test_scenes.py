"""Scenes: functions of (seed, index), and what they say they show is what their pixels show."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lmops_jax.data.synthetic_pictures import Scenes, backgrounds
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, RGB, SHAPES, mask
from tests.data.synthetic_pictures.recognition import ink_of, recognised

WORLD = Scenes()
SEEN = [WORLD.scene(0, i) for i in range(400)]
HELD_OUT = [WORLD.scene(0, i, held_out=True) for i in range(60)]


def test_a_scene_is_a_function_of_seed_and_index():
  again = Scenes()
  for i in (7, 3, 399):  # in another order, by another object
    scene = again.scene(0, i)
    np.testing.assert_array_equal(scene.picture, SEEN[i].picture)
    assert scene.pictographs == SEEN[i].pictographs
  assert not np.array_equal(WORLD.scene(1, 7).picture, SEEN[7].picture)
  assert len({scene.picture.tobytes() for scene in SEEN}) == len(SEEN)
  assert SEEN[0].picture.shape == (48, 48, 3) and SEEN[0].picture.dtype == np.uint8


@pytest.mark.parametrize("held_out", [False, True])
def test_pixels_show_what_is_said(held_out):
  """In pictures five times as large, whose edges are sharp; tips of a star stay faint."""
  large = Scenes(side=240, least_side=70, largest_side=130)
  for i in range(20):
    scene = large.scene(2, i, held_out)
    found = {color: (shape, box) for shape, color, box in recognised(scene.picture)}
    assert len(found) == len(scene.pictographs)
    for pictograph in scene.pictographs:
      shape, box = found[pictograph.color]
      assert shape == pictograph.shape
      np.testing.assert_allclose(np.array(pictograph.box) * 240, box, atol=5)


def test_small_pictures_show_the_colors():
  for scene in (*SEEN, *HELD_OUT):
    colors = {color for color in COLORS if ink_of(scene.picture, color).sum() >= 15}
    assert colors == {pictograph.color for pictograph in scene.pictographs}


@pytest.mark.parametrize("side", [14, 26])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_fill_their_box(shape, side):
  cover = mask(shape, side)
  assert max(cover.shape) == side
  assert all(edge.max() > 0 for edge in (cover[0], cover[-1], cover[:, 0], cover[:, -1]))


def test_pictographs_are_apart_and_of_the_sizes_asked_for():
  for scene in (*SEEN, *HELD_OUT):
    for pictograph in scene.pictographs:
      assert 14 <= round(pictograph.side * 48) <= 26
      assert 0 <= min(pictograph.box) and max(pictograph.box) <= 1
    if len(scene.pictographs) == 2:
      (l, t, r, b), (l2, t2, r2, b2) = (pictograph.box for pictograph in scene.pictographs)
      assert r < l2 or r2 < l or b < t2 or b2 < t
      shapes, colors = zip(*(pictograph.pair for pictograph in scene.pictographs))
      assert len(set(shapes)) == len(set(colors)) == 2


def test_a_tenth_of_the_pairs_is_held_out():
  held_out = set(WORLD.held_out_pairs)
  assert len(held_out) == 6
  assert all(len({pair[i] for pair in held_out}) == 6 for i in range(2))
  seen = Counter(p.pair for scene in SEEN for p in scene.pictographs)
  assert set(seen) == set(itertools.product(SHAPES, COLORS)) - held_out == set(WORLD.seen_pairs)
  assert {p.pair for scene in HELD_OUT for p in scene.pictographs} == held_out
  assert set(Scenes(pairs_seed=1).held_out_pairs) != held_out


def test_shares():
  two = np.mean([len(scene.pictographs) == 2 for scene in SEEN])
  assert abs(two - 0.5) < 4 * 0.025  # of 400 draws the deviation is 0.025
  assert all(len(Scenes(two_share=1.0).scene(0, i).pictographs) == 2 for i in range(20))
  typical = Scenes(typical_share=1.0, two_share=0.0)
  for i in range(40):
    (pictograph,) = typical.scene(0, i).pictographs
    assert pictograph.color == typical.typical_colors[pictograph.shape]
    assert (round(pictograph.side * 48) > 20) == (pictograph.shape in typical.typically_large)
  assert not set(typical.typical_colors.items()) & set(typical.held_out_pairs)


def test_backgrounds_stay_away_from_the_colours():
  """The least distance of any pixel of the photographs from any ink, as `recognised` takes it."""
  for photograph in backgrounds.photographs():
    colors = photograph[::2, ::2].astype(int)
    for ink in RGB.values():
      assert np.abs(colors - ink).max(axis=-1).min() >= 30


@pytest.mark.parametrize("settings,message", [
  ({"least_side": 30}, "largest_side=26 and side=48; they must not decrease"),
  ({"least_side": 24, "largest_side": 26}, "least_side=24 must be at least 8.*at most 23"),
  ({"held_out_share": 0.2}, "held_out_share=0.2 must be at most 0.125"),
  ({"two_share": 1.5}, "two_share=1.5 must be"),
  ({"typical_share": 0.5, "largest_side": 40}, "typically large 28 pixels or more, of which two"),
])
def test_bad_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    Scenes(**settings)


def test_no_pairs_to_hold_out():
  with pytest.raises(ValueError, match="holds out 1 pairs; a scene of held-out pairs needs two"):
    Scenes(held_out_share=0.02).scene(0, 0, held_out=True)
