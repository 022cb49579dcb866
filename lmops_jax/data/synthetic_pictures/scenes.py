"""Small scenes: one or two pictographs on a muted photograph, with everything known about them.

A scene is a function of (seed, index) alone. It stands in for a photograph with objects in a run
without any download: colours, shapes, number, sizes and places can be asked for, and a tenth of the
(shape, colour) pairs is held out, so that what is said of them was not learnt by heart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Probability, Seed, component
from lmops_jax.data.synthetic_pictures import pictographs
from lmops_jax.data.synthetic_pictures.backgrounds import background
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES

_TRIES = 40  # places for given sizes, before other sizes are drawn
_GAP = 1  # pixel between two pictographs

Box = tuple[float, float, float, float]
Pair = tuple[str, str]


class Pictograph(NamedTuple):
  """A shape in a colour, and its place in the picture.

  Attributes:
    shape, color: of `SHAPES` and `COLORS`.
    box: left, top, right, bottom as fractions of the picture, 0 is its upper left.
  """

  shape: str
  color: str
  box: Box

  @property
  def pair(self) -> Pair:
    return self.shape, self.color

  @property
  def side(self) -> float:
    """The larger of width and height, as a fraction of the picture."""
    left, top, right, bottom = self.box
    return max(right - left, bottom - top)

  @property
  def center(self) -> tuple[float, float]:
    """Fractions from the left and from the top."""
    left, top, right, bottom = self.box
    return (left + right) / 2, (top + bottom) / 2


class Scene(NamedTuple):
  """A picture and what it shows.

  Attributes:
    picture: `[side,side,3] uint8`, red, green, blue.
    pictographs: one or two, of different shapes and different colours.
  """

  picture: np.ndarray
  pictographs: tuple[Pictograph, ...]


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Scenes:
  """A world of scenes.

  Attributes:
    side: of a picture, pixels.
    least_side, largest_side: of a pictograph, pixels; the larger of its width and height.
    two_share: of scenes with two pictographs.
    held_out_share: of the 64 pairs of shape and colour, kept from the scenes to train on; at most
      one of a shape and of a colour, so no more than an eighth.
    typical_share: of pictographs in the colour and size that are typical of their shape; the others
      take any. Above 0, colours and sizes can be guessed without a picture.
    pairs_seed: which pairs are held out, and what is typical: the same for all seeds of a study.

  Raises:
    ValueError: sizes of which two do not fit beside each other, or too large a held-out share.
  """

  side: PositiveInt = 48
  least_side: PositiveInt = 14
  largest_side: PositiveInt = 26
  two_share: Probability = 0.5
  held_out_share: Probability = 0.1
  typical_share: Probability = 0.0
  pairs_seed: Seed = 0

  def __post_init__(self):
    if not self.least_side <= self.largest_side <= self.side:
      raise ValueError(
        f"data.Scenes has least_side={self.least_side}, largest_side={self.largest_side} and side="
        f"{self.side}; they must not decrease in this order."
      )
    if self.least_side < 8 or 2 * self.least_side + _GAP > self.side:
      raise ValueError(
        f"data.Scenes.least_side={self.least_side} must be at least 8, to be recognised, and at "
        f"most {(self.side - _GAP) // 2}, so that two fit into side={self.side}."
      )
    typical = (self.least_side + self.largest_side) // 2 + 1  # the least of a large shape
    if self.typical_share and 2 * typical + _GAP > self.side:
      raise ValueError(
        f"data.Scenes.largest_side={self.largest_side} makes shapes that are typically large "
        f"{typical} pixels or more, of which two do not fit into side={self.side}; lower it, or "
        "set typical_share to 0."
      )
    if self.held_out_share > 1 / len(COLORS):
      raise ValueError(
        f"data.Scenes.held_out_share={self.held_out_share} must be at most {1 / len(COLORS)}: one "
        "pair of each shape and of each colour is held out at most."
      )

  @functools.cached_property
  def held_out_pairs(self) -> tuple[Pair, ...]:
    """(shape, colour) that no scene to train on shows, each shape and each colour once at most."""
    shapes, colors = self._orders
    num = round(self.held_out_share * len(SHAPES) * len(COLORS))
    return tuple(zip(shapes[:num], colors[:num]))

  @functools.cached_property
  def seen_pairs(self) -> tuple[Pair, ...]:
    """All others."""
    pairs = ((shape, color) for shape in SHAPES for color in COLORS)
    return tuple(pair for pair in pairs if pair not in self.held_out_pairs)

  @functools.cached_property
  def typical_colors(self) -> dict[str, str]:
    """Of each shape; never a held-out pair."""
    shapes, colors = self._orders
    return dict(zip(shapes, colors[1:] + colors[:1]))

  @functools.cached_property
  def typically_large(self) -> frozenset[str]:
    """Shapes that are typically larger than all others: half of them."""
    draws = np.random.default_rng((self.pairs_seed, 1))
    return frozenset(_shuffled(draws, SHAPES)[: len(SHAPES) // 2])

  @functools.cached_property
  def _orders(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
    draws = np.random.default_rng((self.pairs_seed, 0))
    return _shuffled(draws, SHAPES), _shuffled(draws, COLORS)

  def scene(self, seed: int, index: int, held_out: bool = False) -> Scene:
    """The scene of a seed and an index.

    Args:
      seed, index: not negative; they alone decide, together with the settings.
      held_out: whether each pictograph is a held-out pair; else none is.

    Raises:
      ValueError: held-out pairs are asked for and there are fewer than two.
    """
    if held_out and len(self.held_out_pairs) < 2:
      raise ValueError(
        f"data.Scenes.held_out_share={self.held_out_share} holds out {len(self.held_out_pairs)} "
        "pairs; a scene of held-out pairs needs two, so raise it to 0.04 or more."
      )
    draws = np.random.default_rng((seed, index, held_out))
    num = 1 + int(draws.random() < self.two_share)
    return self.compose(draws, self._pairs(draws, num, held_out))

  def compose(self, draws: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """A scene of one or two given (shape, colour) pairs, its background and places drawn."""
    picture = background(draws, self.side).copy()
    found: list[Pictograph] = []
    for (shape, color), (top, left, side) in zip(pairs, self._places(draws, pairs)):
      pictographs.paste(picture, shape, color, top, left, side)
      height, width = pictographs.mask(shape, side).shape
      corners = (left, top, left + width, top + height)
      found.append(Pictograph(shape, color, tuple(corner / self.side for corner in corners)))
    picture.setflags(write=False)
    return Scene(picture, tuple(found))

  def _pairs(self, draws: np.random.Generator, num: int, held_out: bool) -> list[Pair]:
    """Pairs that share neither shape nor colour."""
    pairs = []
    while len(pairs) < num:
      shape, color = self._pair(draws, held_out)
      if all(shape != s and color != c for s, c in pairs):
        pairs.append((shape, color))
    return pairs

  def _pair(self, draws: np.random.Generator, held_out: bool) -> Pair:
    pairs = self.held_out_pairs if held_out else self.seen_pairs
    shape, color = pairs[draws.integers(len(pairs))]
    if not held_out and draws.random() < self.typical_share:
      color = self.typical_colors[shape]
    return shape, color

  def _places(self, draws: np.random.Generator, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    """Top, left and side of each, none over another."""
    while True:
      sides = [self._side(draws, shape) for shape, _ in pairs]
      shapes = [pictographs.mask(shape, side).shape for (shape, _), side in zip(pairs, sides)]
      for _ in range(_TRIES):
        corners = [
          (int(draws.integers(self.side - height + 1)), int(draws.integers(self.side - width + 1)))
          for height, width in shapes
        ]
        if len(pairs) == 1 or _are_apart(*zip(corners, shapes)):
          return [(top, left, side) for (top, left), side in zip(corners, sides)]

  def _side(self, draws: np.random.Generator, shape: str) -> int:
    low, high = self.least_side, self.largest_side
    if draws.random() < self.typical_share:
      middle = (low + high) // 2
      low, high = (middle + 1, high) if shape in self.typically_large else (low, middle)
    return int(draws.integers(min(low, high), high + 1))


def _shuffled(draws: np.random.Generator, words: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(words[i] for i in draws.permutation(len(words)))


def _are_apart(one, other) -> bool:
  """Whether two boxes, each ((top, left), (height, width)), leave a gap between them."""
  return any(
    start + length + _GAP <= other_start or other_start + other_length + _GAP <= start
    for start, length, other_start, other_length in zip(*one, *other)
  )
