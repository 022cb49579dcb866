"""Rendered words: the halves, the ink, and what does not fit."""

from collections import Counter

import numpy as np
import pytest

from lmops_jax.data.synthetic_pictures import RenderedTexts

WORLD = RenderedTexts()
ITEMS = {told: [WORLD.item(0, i, told) for i in range(300)] for told in (True, False)}


def test_half_of_the_words_are_told_of_pictures():
  one, other = (dict(WORLD.words[told]) for told in (True, False))
  assert not set(one) & set(other) and len(one) == len(other)
  assert Counter(one.values()) == Counter(other.values()) == {0: 12, 1: 12}
  for told, items in ITEMS.items():
    labels = dict(WORLD.words[told])
    for item in items:
      (word,) = set(item.text.split()) & set(labels)
      assert labels[word] == item.label
    assert {w for item in items for w in item.text.split()} >= set(labels)
  assert RenderedTexts(words_seed=1).words != WORLD.words
  for told in (True, False):
    text, label = WORLD.labelled_text(0, 5, told)
    assert any(dict(WORLD.words[told]).get(word) == label for word in text.split())


def test_an_item_is_a_function_of_seed_and_index():
  again = RenderedTexts().item(0, 17)
  np.testing.assert_array_equal(again.picture, ITEMS[True][17].picture)
  assert again.text == ITEMS[True][17].text
  assert len({item.picture.tobytes() for item in ITEMS[True]}) == 300


def test_ink_is_dark_on_light_and_within_the_picture():
  for item in ITEMS[True][:100]:
    grey = item.picture[..., 0]
    assert item.picture.shape == (48, 48, 3) and item.picture.dtype == np.uint8
    paper = grey[0, 0]
    assert (grey[0] == paper).all() and (grey[:, 0] == paper).all()
    assert (grey[-1] == paper).all() and (grey[:, -1] == paper).all()
    assert paper >= 225 and grey.min() < 120


def test_longer_texts_have_more_ink_and_lines():
  def ink_rows(text):
    picture = WORLD.render(np.random.default_rng(0), text, "DejaVuSans")
    dark = (picture[..., 0] < picture[0, 0, 0] - 60).any(axis=1)
    return int(np.diff(dark.astype(int)).clip(0).sum())  # groups of rows with ink

  assert [ink_rows(text) for text in ("sun", "sun moon", "warm sun moon")] == [1, 2, 3]


def test_a_text_lies_within_its_shift_of_the_middle():
  def first_column(item):
    return int(np.flatnonzero((item.picture != item.picture[0, 0]).any(axis=(0, 2)))[0])

  world = RenderedTexts(
    fonts=("DejaVuSans",), least_pixels=12, most_pixels=12, sentence_share=0.0, most_shift=1)
  starts: dict[str, set[int]] = {}
  for i in range(300):
    item = world.item(0, i)
    starts.setdefault(item.text, set()).add(first_column(item))
  assert {max(of) - min(of) for of in starts.values() if len(of) == 3} == {2}
  assert all(max(of) - min(of) <= 2 for of in starts.values())
  anywhere = {first_column(item) for of in ITEMS.values() for item in of if item.text == "fun"}
  assert max(anywhere) - min(anywhere) > 2


def test_what_does_not_fit():
  with pytest.raises(ValueError, match="'unimaginable' does not fit into 48 pixels"):
    WORLD.render(np.random.default_rng(0), "unimaginable", "DejaVuSans")
  with pytest.raises(ValueError, match="does not fit into 24 pixels"):
    RenderedTexts(side=24)
  with pytest.raises(ValueError, match="least_pixels=20 is more than most_pixels=15"):
    RenderedTexts(least_pixels=20)
  with pytest.raises(ValueError, match="the font 'Times' is not among those of Matplotlib"):
    RenderedTexts(fonts=["Times"])
