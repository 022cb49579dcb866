"""What stands behind Kosmos-1's further claims: what no text tells, thoughts, matrices, figures."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from lmops_jax.config import resolve
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES
from lmops_jax.data.synthetic_pictures.rendered_text import SENTIMENTS
from lmops_jax.data.tasks.picture_prompts import SENTIMENT
from lmops_jax.systems.kosmos import evaluate, figures
from lmops_jax.systems.kosmos.gallery import montage
from lmops_jax.systems.kosmos.items import Item, items
from lmops_jax.systems.kosmos.world import records, sources


@pytest.fixture(scope="module")
def world():
  return resolve.load(["kosmos/smoke.gin"], ["SCENES = 400", "ITEMS = 8"]).build().world


def _texts(world, part, source, num=400):
  for record in itertools.islice(records(world, part, source), num):
    yield " ".join(part for part in record.parts if isinstance(part, str))


def test_captions_of_typical_pictures_name_no_color_and_no_size(world):
  words = {word for text in _texts(world, "pairs", "typical", 100) for word in text.split()}
  assert words & set(SHAPES)
  assert not words & {*COLORS, "large", "small", "larger", "smaller"}


def test_typical_pictures_show_what_is_typical(world):
  typical = world.typical_scenes
  shown = [one for i in range(100) for one in typical.scene(world.train_seed, i).pictographs]
  share = np.mean([one.color == typical.typical_colors[one.shape] for one in shown])
  assert 0.8 < share < 1
  seen = [one for i in range(100) for one in world.scenes.scene(world.train_seed, i).pictographs]
  assert np.mean([one.color == typical.typical_colors[one.shape] for one in seen]) < 0.3


def test_texts_tell_nothing_of_what_is_typical(world):
  """In the wording of the questions each answer is the one that its own text tells, and a shape's
  typical colour is about as frequent as any other."""
  typical = dict(world.typical_scenes.typical_colors)
  told = [text for text in _texts(world, "text", "comparisons") if "The color of" in text]
  answers = []
  for text in told:
    shape, color = text.split()[-3], text.split()[-1]
    assert f"{color} {shape} is at" in text
    answers.append(typical[shape] == color)
  assert len(told) > 200 and np.mean(answers) < 0.25


def test_sizes_in_texts_are_those_that_the_text_tells(world):
  asked = [text for text in _texts(world, "text", "comparisons") if " larger than " in text]
  for text in asked:
    question, answer = text[text.index("Is a") :].rsplit("? ", 1)
    one = question.split()[2]
    told = next(s for s in text.split(".") if f" {one} is at" in s)
    assert ("large" in told.split()) == (answer == "yes")
  assert {text.split()[-1] for text in asked} == {"yes", "no"}


def test_each_half_of_the_words_has_its_labels_in_one_place(world):
  of_pictures = {word for word, _ in world.rendered.words[True]}
  in_texts = {text.split()[0] for text in _texts(world, "text", "sentiments")}
  assert not in_texts & of_pictures
  read = {text.split()[-1] for text in _texts(world, "pairs", "readings")}
  assert read & of_pictures and read & in_texts and not read & set(SENTIMENTS)
  shown = [world.rendered.item(world.train_seed, i).text for i in range(200)]
  assert set(shown) <= of_pictures
  assert {text.split()[-1] for text in _texts(world, "pairs", "opinions")} == set(SENTIMENTS)
  for item in items(world):
    if item.thought:
      assert (item.references[0] in of_pictures) == (item.group == "of_pictures")
    if item.kind == "sentiment, text":
      assert (item.prompt.split()[0] in of_pictures) == (item.group == "of_pictures")
      assert not item.pictures and item.prompt.endswith("the opinion? Answer:")


def test_matrices_to_train_on_have_no_held_out_rule_and_balanced_answers(world):
  assert ("interleaved", "matrices") in set(sources(world))
  without = dataclasses.replace(world, num_matrices=0)
  assert ("interleaved", "matrices") not in set(sources(without))
  held = set(world.matrices.held_out_rules)
  asked = [item for item in items(world) if item.candidates]
  assert {bool(held & set(item.rules)) for item in asked if item.group == "held_out"} == {True}
  assert {bool(held & set(item.rules)) for item in asked if item.group == "seen"} == {False}
  many = dataclasses.replace(world, num_matrices=60)
  found = list(records(many, "interleaved", "matrices"))
  answers = [record.parts[-1].strip() for record in found]
  assert set(answers) == {"Yes", "No"} and 15 < answers.count("Yes") < 45
  for number, (record, answer) in enumerate(zip(found, answers)):
    matrix = many.matrices.matrix(many.train_seed, number)
    right = many.matrices.pictures([matrix.candidates[matrix.label]])[0]
    assert np.array_equal(_pixels(record.pictures[-1]), right) == (answer == "Yes")


def _pixels(picture):
  return np.asarray(Image.open(io.BytesIO(picture.read())))


def test_an_empty_rationale_asks_the_plain_question():
  item = Item("sentiment, thought", "of_texts", SENTIMENT, (0,), (" a", " b"), 0, ("bad",),
              thought="<image> Introduce this picture in detail:")
  assert evaluate.behind(item, "") == item
  assert evaluate.behind(item, "bad").prompt == SENTIMENT.replace("<image> ", "<image> bad ")
  plain = item._replace(prompt="<image> Question: What color is the star? Answer:", thought="")
  assert evaluate.behind(plain, "") == plain


def test_figures_of_matrices_and_rationales():
  asked = [
    Item("matrix 3", "seen", "", (0,), label=1, candidates=(1, 2), rules=("shape:change",)),
    Item("matrix 3", "seen", "", (0,), label=0, candidates=(1, 2),
         rules=("shape:change", "size:change")),
    Item("matrix 4", "seen", "", (0,), label=0, candidates=(1, 2), rules=("size:change",)),
    Item("sentiment, thought", "of_texts", "", (0,), (" a", " b"), 1, ("bad",), thought="x"),
    Item("sentiment, thought", "of_texts", "", (0,), (" a", " b"), 1, ("good",), thought="x"),
  ]
  said = [[0.1, 0.2], [0.1, 0.2], [0.3, 0.2], 1, 0]
  found = evaluate.figures(asked, said, {3: "bad", 4: "god"})
  assert found["matrix 3/seen"] == {
    "right": 1, "num": 2, "by_rule": {"shape:change": [1, 2], "size:change": [0, 1]}}
  assert found["sentiment, thought/of_texts"] == {"right": 1, "num": 2, "read": 1}
  both = figures.over_seeds([found, evaluate.figures(asked, [None] * 3 + said[3:], {3: "", 4: ""})
                             | {k: found[k] for k in ("matrix 3/seen", "matrix 4/seen")}])
  assert both["matrices/seen"]["values"] == [pytest.approx(2 / 3)] * 2
  assert both["rule size:change/seen"]["values"] == [0.5, 0.5]
  assert both["rule size:change/seen"]["num"] == 2
  assert both["read/of_texts"]["values"] == [0.5, 0.0]
  low, high = both["read/of_texts"]["interval"]  # 1 of 4, Wilson
  assert low == pytest.approx(0.0456, abs=1e-3) and high == pytest.approx(0.6994, abs=1e-3)
  assert evaluate.figures(asked[:1], [None], {}) == {}
  assert figures.label("rule shape:change/held_out") == "shape: change, with a held-out rule"


def test_a_montage_leaves_the_last_place_empty():
  pictures = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 3)]
  whole = montage(pictures, (2, 2))
  assert whole.shape == (17, 17, 3)
  assert (whole[3:7, 3:7] == 1).all() and (whole[3:7, 10:14] == 2).all()
  assert (whole[10:14, 3:7] == 3).all() and (whole[10:14, 10:14] == 190).all()
