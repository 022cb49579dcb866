"""Texts about scenes: each is true of its scene, by a reader of boxes and words alone."""

import numpy as np
import pytest

from lmops_jax.data.synthetic_pictures import Scenes, scene_texts
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES

WORLD = Scenes()
SCENES = [WORLD.scene(0, i) for i in range(200)]


def _size(p):
  return max(p.box[2] - p.box[0], p.box[3] - p.box[1])


def _referents(expression, scene):
  """The pictographs that an expression fits, read word by word."""
  found = list(scene.pictographs)
  for word in expression.split():
    if word in COLORS:
      found = [p for p in found if p.color == word]
    elif word in SHAPES:
      found = [p for p in found if p.shape == word]
    elif word in ("larger", "smaller"):
      found = [sorted(found, key=_size)[-1 if word == "larger" else 0]]
    elif word in ("left", "right"):
      found = [sorted(found, key=lambda p: p.box[0] + p.box[2])[-1 if word == "right" else 0]]
    elif word in ("upper", "lower"):
      found = [sorted(found, key=lambda p: p.box[1] + p.box[3])[-1 if word == "lower" else 0]]
    else:
      assert word in ("the", "shape")
  return found


def test_captions_name_all_pictographs_where_they_are():
  for scene in SCENES[:60]:
    captions = scene_texts.captions(scene)
    assert len(captions) == (4 if len(scene.pictographs) == 1 else 8)
    assert len({caption.text for caption in captions}) == len(captions)
    for caption in captions:
      named = {caption.text[start:end]: box for start, end, box in caption.phrases}
      assert {words.split(maxsplit=1)[1]: box for words, box in named.items()} == {
        f"{p.color} {p.shape}": p.box for p in scene.pictographs}
      assert all(words.startswith("an o") == (" o" in words) for words in named)


def test_captions_without_colors():
  for scene in SCENES[:30]:
    for caption in scene_texts.captions(scene, name_colors=False):
      assert not set(caption.text.split()) & set(COLORS)
      assert all(p.shape in caption.text for p in scene.pictographs)


def test_expressions_refer_to_one_pictograph():
  kinds = set()
  for scene in SCENES:
    for expression, box in scene_texts.referring_expressions(scene):
      assert [p.box for p in _referents(expression, scene)] == [box]
      kinds.add(expression.split()[1])
  assert {"larger", "smaller", "left", "right", "upper", "lower", *COLORS, *SHAPES} <= kinds


def test_questions_have_their_right_answer():
  draws = np.random.default_rng(0)
  answers = {}
  for scene in SCENES:
    for kind, text, options, answer in scene_texts.questions(draws, scene):
      words = text.replace("?", "").replace(",", "").split()
      named = [w for w in words if w in SHAPES]
      if kind == "color":
        right = [p.color for p in scene.pictographs if p.shape in named]
      elif kind == "shape":
        right = [p.shape for p in scene.pictographs if p.color in words]
      elif kind == "count":
        right = [{1: "one", 2: "two"}[len(scene.pictographs)]]
      else:
        first, second = ([p for p in scene.pictographs if p.shape == shape][0] for shape in named)
        larger = _size(first) > _size(second)
        right = [named[not larger]] if kind == "larger" else ["yes" if larger else "no"]
        assert abs(_size(first) - _size(second)) >= 4 / 48 - 1e-9
      assert [answer] == right and answer in options and text.endswith("?")
      answers.setdefault(kind, set()).add(answer)
  assert answers["color"] == set(COLORS) and answers["shape"] == set(SHAPES)
  assert answers["count"] == {"one", "two"} and answers["is_larger"] == {"yes", "no"}
  assert set(answers) == {"color", "shape", "count", "larger", "is_larger"}


def test_a_description_tells_places_and_sizes():
  for scene in SCENES[:60]:
    first, *sentences = scene_texts.description(scene).removesuffix(".").split(". ")
    assert first == ("There is one shape" if len(sentences) == 1 else "There are two shapes")
    for sentence, p in zip(sentences, scene.pictographs, strict=True):
      x, y = (p.box[0] + p.box[2]) / 2, (p.box[1] + p.box[3]) / 2
      place = f"at the {'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
      size = "large" if _size(p) > 0.41 else "small"
      assert sentence == f"The {size} {p.color} {p.shape} is {place}"


def test_questions_in_text_ask_for_what_is_typical():
  world = Scenes(typical_share=0.8, two_share=0.0)
  found = scene_texts.questions_in_text(world)
  assert len(found) == 8 + 2 * 4 * 4
  seen = [world.scene(0, i).pictographs[0] for i in range(600)]
  for question in found:
    named = [w for w in question.text.replace("?", "").split() if w in SHAPES]
    assert "a arrow" not in question.text
    if question.kind == "color":
      colors = [p.color for p in seen if p.shape == named[0]]
      assert max(set(colors), key=colors.count) == question.answer
    else:
      means = [np.mean([p.side for p in seen if p.shape == shape]) for shape in named]
      assert (means[0] > means[1]) == (question.answer == "yes")


@pytest.mark.parametrize("words,found", [("arrow", "an arrow"), ("blue arrow", "a blue arrow")])
def test_articles(words, found):
  assert scene_texts.with_article(words) == found
