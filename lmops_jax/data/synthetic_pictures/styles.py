"""Words that change pictures: what each does to sharpness, colours, grain and light.

A picture's style is four numbers from 0 to 1, and a higher one is better. Words of a prompt move
them: helpful ones up, harmful ones down, some up for warm colours and down for cold ones or the
other way round, and decoys not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

WARM = ("red", "yellow", "pink")
COLD = ("green", "cyan", "blue")
COLORS = WARM + COLD

_UNTOLD = (0.1, 0.6)  # where a style lies that no word tells of
_UP, _DOWN = (0.85, 1.0), (0.0, 0.15)
_LEAST_RATING = 3.0
_WEIGHTS = (1.6, 1.6, 1.2, 1.0)  # of each number of a style in its rating


class Style(NamedTuple):
  """How a picture looks, four numbers from 0 to 1: sharpness, vividness, cleanness and light."""

  sharpness: float
  vividness: float
  cleanness: float
  light: float


class Effect(NamedTuple):
  """What a word does.

  Attributes:
    raises, lowers: names of a style's numbers.
    colors: of the things for which it does so; for others it does the contrary. None is all.
  """

  raises: tuple[str, ...] = ()
  lowers: tuple[str, ...] = ()
  colors: tuple[str, ...] | None = None


HELPFUL = ("sharp focus", "vivid colors", "noise free", "studio light")
FOR_SOME = ("warm sunset", "cold moonlight")
DECOYS = ("trending", "award winning", "highly detailed", "masterpiece")
HARMFUL = ("soft blur", "faded print", "grainy film")
EFFECTS: Mapping[str, Effect] = {
  "sharp focus": Effect(("sharpness",)),
  "vivid colors": Effect(("vividness",)),
  "noise free": Effect(("cleanness",)),
  "studio light": Effect(("light",)),
  "warm sunset": Effect(("vividness", "light"), colors=WARM),
  "cold moonlight": Effect(("vividness", "light"), colors=COLD),
  **{word: Effect() for word in DECOYS},
  "soft blur": Effect(lowers=("sharpness",)),
  "faded print": Effect(lowers=("vividness", "light")),
  "grainy film": Effect(lowers=("cleanness",)),
}
MODIFIERS = tuple(EFFECTS)


def drawn_style(draws: np.random.Generator, color: str, modifiers: Sequence[str]) -> Style:
  """The style of a picture of a thing.

  Args:
    draws: the only source of chance.
    color: of the thing, one of `COLORS`.
    modifiers: words of the prompt, of `MODIFIERS`; where they contradict each other, a number lies
      in the middle of what they ask for.
  """
  shares = draws.random(len(Style._fields))
  found = []
  for name, share in zip(Style._fields, shares):
    ranges = [of for word in modifiers if (of := _range(EFFECTS[word], name, color))]
    low, high = np.mean(ranges or [_UNTOLD], axis=0)
    found.append(float(low + share * (high - low)))
  return Style(*found)


def _range(effect: Effect, name: str, color: str) -> tuple[float, float] | None:
  """Where a word puts a number of a style; None if it leaves it as it is."""
  up, down = (_UP, _DOWN) if effect.colors is None or color in effect.colors else (_DOWN, _UP)
  return up if name in effect.raises else down if name in effect.lowers else None


def rating(style: Style) -> float:
  """How much people like a picture with this style, 3 to 8.4."""
  return _LEAST_RATING + float(np.dot(_WEIGHTS, style))
