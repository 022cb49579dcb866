"""Styled pictures: functions of (seed, index), in which words do what they say."""

import numpy as np
import pytest

from lmops_jax.data.synthetic_pictures import StyledPictures, styled_pictures, styles
from lmops_jax.data.synthetic_pictures.styled_pictures import Content, modified, rendered

LOW, HIGH = styles.Style(0, 0, 0, 0), styles.Style(1, 1, 1, 1)
RED = Content("square", "red", "black")


def _drawn(style, content=RED, seed=0):
  return rendered(np.random.default_rng(seed), content, style, 32).astype(float)


def test_a_picture_is_a_function_of_seed_and_index():
  world = StyledPictures()
  again = world.picture(3, 5)
  found = world.picture(3, 5)
  np.testing.assert_array_equal(found.picture, again.picture)
  assert found[1:] == again[1:]
  assert found.picture.shape == (16, 16, 3) and found.picture.dtype == np.uint8
  assert (world.picture(4, 5).picture != found.picture).any()


def test_captions_tell_of_the_content_and_often_of_the_style():
  found = [StyledPictures(plain_share=0.5).picture(0, i) for i in range(200)]
  for one in found:
    assert all(word in one.caption for word in one.content)
  assert 0.4 < np.mean(["," in one.caption for one in found]) < 0.6
  assert {one.content for one in found} > set(styled_pictures.HELD_OUT_CONTENTS)


@pytest.mark.parametrize("word,name", [
  ("sharp focus", "sharpness"), ("vivid colors", "vividness"), ("noise free", "cleanness"),
  ("studio light", "light")])
def test_a_helpful_word_raises_one_number(word, name):
  with_word, without = (
    styles.drawn_style(np.random.default_rng(1), "red", words) for words in ([word], []))
  changed = [field for field in styles.Style._fields
             if getattr(with_word, field) != getattr(without, field)]
  assert changed == [name]
  assert getattr(with_word, name) >= 0.85 and styles.rating(with_word) > styles.rating(without)


def test_decoys_change_nothing_and_harmful_words_lower_the_rating():
  plain = styles.drawn_style(np.random.default_rng(1), "red", [])
  assert styles.drawn_style(np.random.default_rng(1), "red", styles.DECOYS) == plain
  for word in styles.HARMFUL:
    harmed = styles.drawn_style(np.random.default_rng(1), "red", [word])
    assert styles.rating(harmed) < styles.rating(plain)


@pytest.mark.parametrize("word,helped,harmed", [
  ("warm sunset", "red", "blue"), ("cold moonlight", "blue", "red")])
def test_some_words_help_some_colours_and_harm_others(word, helped, harmed):
  def gain(color):
    return sum(np.mean([styles.rating(styles.drawn_style(np.random.default_rng(i), color, words))
                        for i in range(20)]) * sign for words, sign in (([word], 1), ([], -1)))
  assert gain(helped) > 0.5 and gain(harmed) < -0.2


def test_words_that_contradict_each_other_meet_in_the_middle():
  style = styles.drawn_style(np.random.default_rng(0), "red", ["sharp focus", "soft blur"])
  assert 0.42 < style.sharpness < 0.58


@pytest.mark.parametrize("name,measure", [
  ("sharpness", lambda x: abs(np.diff(x, axis=1)).max()),
  ("vividness", lambda x: np.ptp(x[16, 16])),
  ("cleanness", lambda x: -x[:4].std()),
  ("light", lambda x: x.mean())])
def test_each_number_of_a_style_is_seen(name, measure):
  middle = styles.Style(0.7, 0.7, 1.0, 0.7)
  low, high = (_drawn(middle._replace(**{name: value})) for value in (0.2, 0.95))
  assert measure(high) > measure(low)


def test_contents_are_told_apart_at_the_best_style():
  middles = {}
  for content in styled_pictures.CONTENTS:
    pictures = [_drawn(HIGH, content, seed) for seed in range(3)]
    middles[content] = np.mean(pictures, axis=0)
  for content in styled_pictures.CONTENTS:
    distance = {of: np.square(_drawn(HIGH, content, 9) - mean).sum()
                for of, mean in middles.items()}
    assert min(distance, key=distance.get) == content


def test_held_out_contents_have_every_shape_colour_and_ground():
  held_out = styled_pictures.HELD_OUT_CONTENTS
  assert len(held_out) == 12 and not set(held_out) & set(styled_pictures.SEEN_CONTENTS)
  for field, values in (("shape", styled_pictures.SHAPES), ("color", styles.COLORS),
                        ("ground", styled_pictures.GROUNDS)):
    assert {getattr(of, field) for of in held_out} == set(values)


def test_people_write_two_to_four_words_by_popularity():
  prompts = [styled_pictures.human_prompt(0, i) for i in range(500)]
  counts = dict.fromkeys(styles.MODIFIERS, 0)
  for content, prompt in prompts:
    first, *words = prompt.split(", ")
    assert first == content.said() and content in styled_pictures.SEEN_CONTENTS
    assert 2 <= len(set(words)) == len(words) <= 4
    for word in words:
      counts[word] += 1
  assert max(counts[word] for word in styles.HARMFUL) < min(
    counts[word] for word in styles.HELPFUL + styles.DECOYS)
  assert modified("a", ["b", "c"]) == "a, b, c"


def test_an_odd_side_is_refused():
  with pytest.raises(ValueError, match="side=17 is odd"):
    StyledPictures(side=17)
