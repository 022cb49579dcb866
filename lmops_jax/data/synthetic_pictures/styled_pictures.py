"""Tiny pictures of one thing in a style, with captions that tell of both, and prompts for them.

They stand in for a text-to-image model's training data in a run without any download: words of a
caption truly change the picture (`styles`), so whoever writes prompts can find out which ones help.
All is a function of (seed, index).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Le
from scipy.ndimage import gaussian_filter

from lmops_jax.config.setting_types import PositiveInt, Probability, component
from lmops_jax.data.synthetic_pictures import styles
from lmops_jax.data.synthetic_pictures.styles import COLORS, MODIFIERS, Style

SHAPES = ("circle", "square", "triangle", "cross")
GROUNDS = ("black", "white")
# Those of users whom a policy learns from, and others that it never meets.
WORDINGS = (
  "{color} {shape} on {ground}",
  "a {color} {shape} on {ground}",
  "a picture of a {color} {shape} on {ground}",
)
OTHER_WORDINGS = (
  "please draw one {color} {shape} on {ground}",
  "there is a {shape} on {ground} and it is {color}",
  "on {ground} we see a {color} {shape}",
)
_RGB = {"red": (225, 40, 40), "yellow": (225, 215, 35), "pink": (225, 60, 205),
        "green": (45, 190, 55), "cyan": (40, 205, 215), "blue": (50, 70, 225)}
_GREY = {"black": 25, "white": 230}
_FINE = 3  # points on a side of a pixel, of which it is the mean
_LEAST_SATURATION, _LEAST_LIGHT = 0.3, 0.45
_MOST_BLUR, _MOST_GRAIN = 1.3, 30.0  # pixels of 16, and levels of 255
# Hardly any: small towers learn shapes that move late.
_SHIFT, _SIZES = 0.4, (5.2, 5.8)  # pixels of 16
_RATING_NOISE = 0.3
# How often people write a word beside others: what is read everywhere is not what helps.
_POPULARITY = {styles.HELPFUL: 1.5, styles.FOR_SOME: 1.0, styles.DECOYS: 1.5, styles.HARMFUL: 0.5}
_MOST_OF_CAPTION, _HUMAN = 5, (2, 4)  # modifiers


class Content(NamedTuple):
  """What a picture shows: one of `SHAPES`, of `COLORS` and of `GROUNDS`."""

  shape: str
  color: str
  ground: str

  def said(self, wording: str = WORDINGS[0]) -> str:
    """In words."""
    return wording.format(**self._asdict())


CONTENTS = tuple(
  Content(shape, color, ground) for shape in SHAPES for color in COLORS for ground in GROUNDS)
# A quarter, in which every shape, colour and ground stands.
HELD_OUT_CONTENTS = tuple(
  of for of in CONTENTS
  if (SHAPES.index(of.shape) + COLORS.index(of.color) + 2 * GROUNDS.index(of.ground)) % 4 == 0)
SEEN_CONTENTS = tuple(of for of in CONTENTS if of not in HELD_OUT_CONTENTS)


class StyledPicture(NamedTuple):
  """A picture and what is known of it.

  Attributes:
    picture: `[side,side,3] uint8`.
    content: what it shows.
    style: how it looks.
    caption: what is told of both; of the style often nothing.
    rating: what a person gives it, who sees the picture alone: `styles.rating` and some noise.
  """

  picture: np.ndarray
  content: Content
  style: Style
  caption: str
  rating: float


@component(module="data")
@dataclasses.dataclass(frozen=True)
class StyledPictures:
  """A world of styled pictures.

  Attributes:
    side: of a picture, in pixels, an even number.
    plain_share: share of captions without a word about the style.
  """

  side: Annotated[PositiveInt, Ge(16), Le(128)] = 16
  plain_share: Probability = 0.3

  def __post_init__(self):
    if self.side % 2:
      raise ValueError(
        f"data.StyledPictures.side={self.side} is odd, and grain is two pixels wide; take an even "
        "number."
      )

  def picture(self, seed: int, index: int) -> StyledPicture:
    """The picture of a seed and an index, with any content and any words."""
    draws = np.random.default_rng((seed, index, 40))
    content = CONTENTS[draws.integers(len(CONTENTS))]
    wordings = WORDINGS + OTHER_WORDINGS
    wording = wordings[draws.integers(len(wordings))]
    words: list[str] = []
    if draws.random() >= self.plain_share:
      num = int(draws.integers(1, _MOST_OF_CAPTION + 1))
      words = [MODIFIERS[i] for i in draws.permutation(len(MODIFIERS))[:num]]
    style = styles.drawn_style(draws, content.color, words)
    picture = rendered(draws, content, style, self.side)
    rating = styles.rating(style) + _RATING_NOISE * draws.standard_normal()
    return StyledPicture(
      picture, content, style, modified(content.said(wording), words), float(rating))


def modified(prompt: str, modifiers: Sequence[str]) -> str:
  """A prompt with words behind it."""
  return ", ".join((prompt, *modifiers))


def human_prompt(seed: int, index: int, contents: Sequence[Content] = SEEN_CONTENTS):
  """What an experienced person writes: words that are popular, whether they help or not.

  Returns:
    The content, and the prompt.
  """
  draws = np.random.default_rng((seed, index, 41))
  content = contents[draws.integers(len(contents))]
  return content, modified(content.said(), popular_modifiers(draws))


def popular_modifiers(draws: np.random.Generator) -> list[str]:
  """Two to four different words, each as often as people write it."""
  chances = np.array([
    next(chance for group, chance in _POPULARITY.items() if word in group) for word in MODIFIERS])
  num = int(draws.integers(_HUMAN[0], _HUMAN[1] + 1))
  return [str(word) for word in draws.choice(
    MODIFIERS, num, replace=False, p=chances / chances.sum())]


def rendered(draws: np.random.Generator, content: Content, style: Style, side: int) -> np.ndarray:
  """A picture `[side,side,3] uint8` of a content in a style, at a random place near the middle."""
  mask = _mask(draws, content.shape, side)[..., None]
  color = np.array(_RGB[content.color], np.float64)
  grey = color @ (0.299, 0.587, 0.114)
  color = grey + (_LEAST_SATURATION + (1 - _LEAST_SATURATION) * style.vividness) * (color - grey)
  pixels = _GREY[content.ground] * (1 - mask) + color * mask
  blur = _MOST_BLUR * (1 - style.sharpness) * side / 16
  pixels = gaussian_filter(pixels, (blur, blur, 0), mode="nearest")
  pixels *= _LEAST_LIGHT + (1 - _LEAST_LIGHT) * style.light
  grain = draws.standard_normal((side // 2, side // 2, 3)).repeat(2, axis=0).repeat(2, axis=1)
  pixels += _MOST_GRAIN * (1 - style.cleanness) * grain
  return np.clip(pixels, 0, 255).round().astype(np.uint8)


def _mask(draws: np.random.Generator, shape: str, side: int) -> np.ndarray:
  """The share of each pixel that a shape covers, `[side,side]`."""
  unit = side / 16
  right, down = side / 2 + draws.uniform(-_SHIFT, _SHIFT, 2) * unit
  size = draws.uniform(*_SIZES) * unit
  points = (np.arange(side * _FINE) + 0.5) / _FINE
  x, y = (points[None, :] - right) / size, (points[:, None] - down) / size
  if shape == "circle":
    inside = x**2 + y**2 <= 1
  elif shape == "square":
    inside = np.maximum(abs(x), abs(y)) <= 0.85
  elif shape == "triangle":
    inside = (y <= 0.85) & (abs(x) <= (y + 1) / 1.85)
  else:
    inside = (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)
  return inside.reshape(side, _FINE, side, _FINE).mean(axis=(1, 3))
