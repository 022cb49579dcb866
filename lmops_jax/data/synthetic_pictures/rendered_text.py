"""Pictures of words and short sentences with a sentiment, to be read without OCR.

The sentiment of half of the words is told about pictures, that of the others in texts alone. A
model that tells it for pictures of the latter has read the word and used what texts taught it.
(Kosmos-1, arXiv:2302.14045, asks for the sentiment of Rendered SST-2 at once and by a chain of
thought.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  NonEmpty,
  PositiveInt,
  Probability,
  Seed,
  Text,
  at_least,
  component,
)
from lmops_jax.data.synthetic_pictures.pictographs import font_file
from lmops_jax.data.synthetic_pictures.scene_texts import with_article

SENTIMENTS = ("negative", "positive")
_WORDS = (
  ("awful", "bad", "bleak", "boring", "clumsy", "cruel", "dirty", "dull", "evil", "feeble", "grim",
   "lame", "messy", "nasty", "poor", "rotten", "sad", "shabby", "stale", "stupid", "ugly", "vile",
   "weak", "wicked"),
  ("brave", "bright", "calm", "clever", "fine", "fresh", "fun", "gentle", "good", "great",
   "happy", "joyful", "kind", "lively", "lovely", "neat", "nice", "noble", "superb", "sweet",
   "tender", "warm", "witty", "wise"),
)
WORDS = tuple(word for words in _WORDS for word in words)  # that have a sentiment
_THINGS = ("film", "book", "song", "play", "meal", "day")
_MARGIN = 1  # pixel
_PAPER, _INK = (225, 256), (0, 70)  # grey levels


class RenderedText(NamedTuple):
  """A picture of a text.

  Attributes:
    picture: `[side,side,3] uint8`.
    text: what it shows, on one line.
    label: the text's sentiment, an index into `SENTIMENTS`.
  """

  picture: np.ndarray
  text: str
  label: int


@component(module="data")
@dataclasses.dataclass(frozen=True)
class RenderedTexts:
  """A world of rendered texts.

  Attributes:
    side: side of a picture, in pixels.
    fonts: fonts of Matplotlib, each used equally often.
    least_pixels, most_pixels: bounds of the letters' size; larger ones only if the text fits.
    sentence_share: share of texts such as "a good film"; the others are a word.
    most_shift: pixels that a text lies away from the middle at most, in each direction; None puts
      it anywhere.
    words_seed: decides which words' sentiment is told about pictures; the same for all seeds of a
      study.

  Raises:
    ValueError: for a font that is not there, or sizes at which the longest text does not fit.
  """

  side: at_least(24) = 48
  fonts: Annotated[Sequence[Text], NonEmpty, Distinct] = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold")
  least_pixels: PositiveInt = 10
  most_pixels: PositiveInt = 15
  sentence_share: Probability = 0.5
  most_shift: Count | None = None
  words_seed: Seed = 0

  def __post_init__(self):
    if self.least_pixels > self.most_pixels:
      raise ValueError(
        f"data.RenderedTexts.least_pixels={self.least_pixels} is more than most_pixels="
        f"{self.most_pixels}."
      )
    sentences = [f"{with_article(w)} {thing}" for ws in _WORDS for w in ws for thing in _THINGS]
    for font in self.fonts:
      for text in sentences:
        self._fitting(text, font)

  @functools.cached_property
  def words(self) -> dict[bool, tuple[tuple[str, int], ...]]:
    """(word, label) pairs: under True those told about pictures, under False the others.

    Each part has as many positive as negative words.
    """
    draws = np.random.default_rng((self.words_seed, 6))
    found: dict[bool, tuple[tuple[str, int], ...]] = {True: (), False: ()}
    for label, words in enumerate(_WORDS):
      order = [(words[i], label) for i in draws.permutation(len(words))]
      found[True] += tuple(order[: len(order) // 2])
      found[False] += tuple(order[len(order) // 2 :])
    return found

  def item(self, seed: int, index: int, told_of_pictures: bool = True) -> RenderedText:
    """The picture of a seed and an index.

    Args:
      told_of_pictures: which half of the words it is drawn from.
    """
    draws = np.random.default_rng((seed, index, told_of_pictures, 7))
    text, label = self._text(draws, told_of_pictures)
    font = self.fonts[draws.integers(len(self.fonts))]
    return RenderedText(self.render(draws, text, font), text, label)

  def labelled_text(self, seed: int, index: int, told_of_pictures: bool = False) -> tuple[str, int]:
    """A text without a picture, and the label of its sentiment."""
    return self._text(np.random.default_rng((seed, index, told_of_pictures, 8)), told_of_pictures)

  def _text(self, draws: np.random.Generator, told_of_pictures: bool) -> tuple[str, int]:
    words = self.words[told_of_pictures]
    word, label = words[draws.integers(len(words))]
    if draws.random() >= self.sentence_share:
      return word, label
    return f"{with_article(word)} {_THINGS[draws.integers(len(_THINGS))]}", label

  def render(self, draws: np.random.Generator, text: str, font: str) -> np.ndarray:
    """A text in a random size, place and greys, broken into lines if necessary.

    Returns:
      `[side,side,3] uint8`.

    Raises:
      ValueError: if it does not fit, even with the smallest letters.
    """
    fitting = self._fitting(text, font)
    lines, size = fitting[draws.integers(len(fitting))]
    paper, ink = int(draws.integers(*_PAPER)), int(draws.integers(*_INK))
    image = Image.new("L", (self.side, self.side), paper)
    room, extents = self.side - 2 * _MARGIN, _extent(lines, font, size)
    left, top = (_MARGIN + self._start(draws, room - extent) for extent in extents)
    canvas = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
      place = (left, top + i * _line_height(font, size))
      canvas.text(place, line, font=_font(font, size), fill=ink, anchor="la")
    return np.repeat(np.asarray(image)[..., None], 3, axis=-1)

  def _start(self, draws: np.random.Generator, free: int) -> int:
    """Where a text starts that leaves some pixels free in a direction."""
    if self.most_shift is None:
      return int(draws.integers(free + 1))
    low, high = (free // 2 + shift for shift in (-self.most_shift, self.most_shift))
    return int(draws.integers(max(low, 0), min(high, free) + 1))

  def _fitting(self, text: str, font: str) -> list[tuple[tuple[str, ...], int]]:
    """(lines, size of letters) for each size at which a text fits."""
    room = self.side - 2 * _MARGIN
    fitting = [
      (lines, size) for size in range(self.least_pixels, self.most_pixels + 1)
      if (lines := _lines(text, font, size, room)) is not None
    ]
    if not fitting:
      raise ValueError(
        f"{text!r} does not fit into {self.side} pixels with letters of {self.least_pixels} in "
        f"{font}; lower data.RenderedTexts.least_pixels or raise side."
      )
    return fitting


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(font_file(name), size, layout_engine=ImageFont.Layout.BASIC)


def _line_height(font: str, size: int) -> int:
  return sum(_font(font, size).getmetrics())


def _extent(lines: Sequence[str], font: str, size: int) -> tuple[int, int]:
  width = max(_font(font, size).getbbox(line, anchor="la")[2] for line in lines)
  return int(np.ceil(width)), len(lines) * _line_height(font, size)


@functools.cache
def _lines(text: str, font: str, size: int, room: int) -> tuple[str, ...] | None:
  """The words on as few lines as they fit; None if they do not."""
  lines: list[str] = []
  for word in text.split():
    longer = f"{lines[-1]} {word}" if lines else word
    if lines and _extent([longer], font, size)[0] <= room:
      lines[-1] = longer
    else:
      lines.append(word)
  fits = bool(lines) and max(_extent(lines, font, size)) <= room
  return tuple(lines) if fits else None
