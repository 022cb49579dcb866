"""Texts about a scene: captions, descriptions, referring expressions, questions.

All are templates filled with the scene's facts, in several wordings. The caller's generator draws
the wording, so that a text is a function of the generator's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES
from lmops_jax.data.synthetic_pictures.scenes import Box, Pictograph, Scene, Scenes

COUNTS = ("one", "two")
YES_NO = ("yes", "no")
# Shares of the picture, between whole pixels of 48, so that rounding decides nothing.
_CLEARLY = 3.5 / 48  # the least difference at which a thing is called larger, or further left
_LARGE = 19.5 / 48

_ONE = ("{0}", "a picture of {0}", "there is {0} here", "this is {0}")
_TWO = ("{0} and {1}", "a picture of {0} and {1}", "there are {0} and {1} here",
        "{0} together with {1}")
_COLOR = ("What color is the {shape}?", "What is the color of the {shape}?",
          "Which color does the {shape} have?")
_SHAPE = ("What is the {color} shape?", "Which shape is {color}?",
          "What is the name of the {color} shape?")
_COUNT = ("How many shapes are there?", "How many shapes are in the picture?",
          "What is the number of shapes?")
_LARGER = ("Which is larger, the {0} or the {1}?", "Of the {0} and the {1}, which is larger?")
_IS_LARGER = ("Is the {0} larger than the {1}?",)
_COLOR_IN_TEXT, _LARGER_IN_TEXT = "The color of {0} is?", "Is {0} larger than {1}?"


class Phrase(NamedTuple):
  """A part of a caption that names something in the picture: its characters, and where it is."""

  start: int
  end: int
  box: Box


class Caption(NamedTuple):
  """A text about a scene, with the phrases that name its pictographs."""

  text: str
  phrases: tuple[Phrase, ...]


class Question(NamedTuple):
  """A question with one right answer.

  Attributes:
    kind: "color", "shape", "count", "larger" or "is_larger".
    text: ends with a question mark.
    options: all answers that a question of its kind can have, the right one among them.
    answer: one of `options`.
  """

  kind: str
  text: str
  options: tuple[str, ...]
  answer: str


def noun_phrase(pictograph: Pictograph, name_color: bool = True) -> str:
  """A phrase such as "a red star", or "a star"."""
  shape, color = pictograph.pair
  return with_article(f"{color} {shape}" if name_color else shape)


def with_article(words: str) -> str:
  """The words with "an" in front of a vowel, otherwise with "a"."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions(scene: Scene, name_colors: bool = True) -> tuple[Caption, ...]:
  """All captions of a scene: each wording, and each order of two pictographs.

  Args:
    name_colors: whether they name colours; if not, only the picture shows the colours.
  """
  orders = [scene.pictographs, scene.pictographs[::-1]][: len(scene.pictographs)]
  wordings = _ONE if len(scene.pictographs) == 1 else _TWO
  return tuple(_filled(w, order, name_colors) for w in wordings for order in orders)


def caption(draws: np.random.Generator, scene: Scene, name_colors: bool = True) -> Caption:
  """One of `captions`."""
  return _one_of(draws, captions(scene, name_colors))


def _filled(wording: str, pictographs: Sequence[Pictograph], name_colors: bool) -> Caption:
  text, phrases = "", []
  for i, pictograph in enumerate(pictographs):
    before, _, wording = wording.partition(f"{{{i}}}")
    phrase = noun_phrase(pictograph, name_colors)
    text += before + phrase
    phrases.append(Phrase(len(text) - len(phrase), len(text), pictograph.box))
  return Caption(text + wording, tuple(phrases))


def description(scene: Scene) -> str:
  """A scene in full sentences: how many shapes, and each one's colour, place and size."""
  num = len(scene.pictographs)
  first = "There is one shape." if num == 1 else f"There are {COUNTS[num - 1]} shapes."
  return " ".join([first, *(
    f"The {_size(p)} {p.color} {p.shape} is {_place(p)}." for p in scene.pictographs)])


def _size(pictograph: Pictograph) -> str:
  return "large" if pictograph.side >= _LARGE else "small"


def _place(pictograph: Pictograph) -> str:
  x, y = pictograph.center
  return f"at the {'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


def referring_expressions(scene: Scene) -> tuple[tuple[str, Box], ...]:
  """All expressions that fit exactly one pictograph of the scene, each with its box.

  They tell colour and shape or either, and for two pictographs size and place if these clearly
  differ.
  """
  found = []
  for i, one in enumerate(scene.pictographs):
    found += [(f"the {one.color} {one.shape}", one.box), (f"the {one.shape}", one.box),
              (f"the {one.color} shape", one.box)]
    for other in scene.pictographs[:i] + scene.pictographs[i + 1 :]:
      found += [(f"the {word} shape", one.box) for word in _comparisons(one, other)]
  return tuple(found)


def _comparisons(one: Pictograph, other: Pictograph) -> list[str]:
  (x, y), (other_x, other_y) = one.center, other.center
  return [word for word, holds in (
    ("larger", is_clearly_larger(one, other)), ("smaller", is_clearly_larger(other, one)),
    ("left", x + _CLEARLY <= other_x), ("right", other_x + _CLEARLY <= x),
    ("upper", y + _CLEARLY <= other_y), ("lower", other_y + _CLEARLY <= y),
  ) if holds]


def is_clearly_larger(one: Pictograph, other: Pictograph) -> bool:
  """Whether its side is longer by a fourteenth of the picture, and its box larger in area."""
  def area(pictograph):
    left, top, right, bottom = pictograph.box
    return (right - left) * (bottom - top)

  return one.side >= other.side + _CLEARLY and area(one) > area(other)


def questions(draws: np.random.Generator, scene: Scene) -> tuple[Question, ...]:
  """One question of each kind that the scene allows, in a drawn wording about a drawn pictograph.

  Questions of size need two pictographs of clearly different size.
  """
  about = _one_of(draws, scene.pictographs)
  found = [
    Question("color", _one_of(draws, _COLOR).format(shape=about.shape), COLORS, about.color),
    Question("shape", _one_of(draws, _SHAPE).format(color=about.color), SHAPES, about.shape),
    Question("count", _one_of(draws, _COUNT), COUNTS, COUNTS[len(scene.pictographs) - 1]),
  ]
  if len(scene.pictographs) == 2:
    order = tuple(scene.pictographs[i] for i in draws.permutation(2))
    shapes = tuple(pictograph.shape for pictograph in order)
    first = is_clearly_larger(*order)
    if first or is_clearly_larger(*order[::-1]):
      larger, wording = shapes[0 if first else 1], _one_of(draws, _LARGER)
      found.append(Question("larger", wording.format(*shapes), shapes, larger))
      wording = _one_of(draws, _IS_LARGER)
      found.append(Question("is_larger", wording.format(*shapes), YES_NO, YES_NO[not first]))
  return tuple(found)


def questions_in_text(scenes: Scenes) -> tuple[Question, ...]:
  """Questions about a world's typical colours and sizes, without pictures (cross-modal transfer).

  As Kosmos-1's, they ask for each shape's colour, and whether a large or a small shape is larger
  than one of the other kind. The answers mean nothing unless `typical_share` is above 0.
  """
  colors = [
    Question("color", _COLOR_IN_TEXT.format(with_article(shape)), COLORS,
             scenes.typical_colors[shape]) for shape in SHAPES
  ]
  large = scenes.typically_large
  sizes = [
    Question("is_larger", _LARGER_IN_TEXT.format(with_article(one), with_article(other)), YES_NO,
             YES_NO[one not in large])
    for one in SHAPES for other in SHAPES if (one in large) != (other in large)
  ]
  return (*colors, *sizes)


def question_of_text(draws: np.random.Generator, scene: Scene) -> Question:
  """A question in the words of `questions_in_text`, which the scene's `description` answers.

  It asks for a colour or, if one of two shapes is large and one small, for a colour or a size.
  """
  found = [
    Question("color", _COLOR_IN_TEXT.format(with_article(one.shape)), COLORS, one.color)
    for one in scene.pictographs]
  if len({_size(one) for one in scene.pictographs}) == 2:
    order = [scene.pictographs[i] for i in draws.permutation(2)]
    words = _LARGER_IN_TEXT.format(*(with_article(one.shape) for one in order))
    found.append(Question("is_larger", words, YES_NO, YES_NO[_size(order[0]) != "large"]))
  return _one_of(draws, found)


def _one_of(draws: np.random.Generator, choices: Sequence):
  return choices[draws.integers(len(choices))]
