"""Texts with pictures in them: interleaved documents, and episodes that bind invented names.

A text holds `<image>` where each of its pictures stands, in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmops_jax.data.synthetic_pictures.scene_texts import caption, description, with_article
from lmops_jax.data.synthetic_pictures.scenes import Scene, Scenes
from lmops_jax.data.tasks.picture_prompts import INTRODUCE, described_prompt
from lmops_jax.data.tasks.task import IMAGE

_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", "bdfgklmnprsvxz"
_ABOUT = (("The first picture shows {0}.", "The second one shows {1}."),
          ("Here is {0}.", "And here is {1}."),
          ("Look at {0}.", "Then look at {1}."))
ATTRIBUTES = ("shape", "color")


class PicturedText(NamedTuple):
  """A text with `<image>` in it for each of `pictures`, `[side,side,3] uint8`."""

  text: str
  pictures: tuple[np.ndarray, ...]


class Episode(NamedTuple):
  """A question in context.

  Attributes:
    prompt: with `<image>` for each of `pictures`, the one that is asked about last.
    pictures: each `[side,side,3] uint8`.
    options: invented names, each with a blank in front.
    label: of the right one.
  """

  prompt: str
  pictures: tuple[np.ndarray, ...]
  options: tuple[str, ...]
  label: int


def interleaved(scenes: Scenes, seed: int, index: int) -> PicturedText:
  """A document of two pictures, each followed by a sentence about it, then one about both."""
  draws = np.random.default_rng((seed, index, 2))
  both = [scenes.scene(seed, 2 * index + i) for i in range(2)]
  said = [caption(draws, scene).text for scene in both]
  sentences = _ABOUT[draws.integers(len(_ABOUT))]
  parts = [f"{IMAGE} {sentence.format(*said)}" for sentence in sentences]
  nums = [len(scene.pictographs) for scene in both]
  if nums[0] == nums[1]:
    parts.append("Both pictures have as many shapes.")
  else:
    parts.append(f"The {'first' if nums[0] > nums[1] else 'second'} picture has more shapes.")
  return PicturedText(" ".join(parts), tuple(scene.picture for scene in both))


def introduction(scene: Scene) -> PicturedText:
  """The first stage of a chain of thought with its answer: a picture in full sentences."""
  return PicturedText(f"{INTRODUCE} {description(scene)}", (scene.picture,))


def invented_names(draws: np.random.Generator, count: int) -> tuple[str, ...]:
  """Different words of two syllables, such as "bafon"."""
  names: dict[str, None] = {}
  while len(names) < count:
    letters = (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)
    names["".join(of[draws.integers(len(of))] for of in letters)] = None
  return tuple(names)


def episode(
  scenes: Scenes, seed: int, index: int, shots: int, num_names: int = 2, attribute: str = "shape",
  held_out: bool = False,
) -> Episode:
  """Pictures of things with invented names, then one whose name is asked for.

  The names are drawn anew in each episode, so that only the context tells them. Each picture shows
  one thing; things of one name share the attribute.

  Args:
    shots: pictures of each name before the question, in a drawn order; 0 leaves only guessing.
    num_names: how many different names.
    attribute: what a name stands for, "shape" or "color".
    held_out: whether all pictures show held-out pairs; each shape and colour has one such pair.

  Raises:
    ValueError: negative shots, an unknown attribute, or more names than values of the attribute.
  """
  _check_attribute(attribute)
  if shots < 0:
    raise ValueError(f"shots={shots} must be 0 or more pictures of each name.")
  draws = np.random.default_rng((seed, index, 3))
  place = ATTRIBUTES.index(attribute)
  values = _values(scenes, draws, num_names, place, held_out)
  names, label = invented_names(draws, num_names), int(draws.integers(num_names))
  order = draws.permutation(np.repeat(np.arange(num_names), shots))
  parts = [f"{IMAGE} This is a {names[i]}." for i in order]
  shown = [values[i] for i in (*order, label)]
  pictures = tuple(_showing(scenes, draws, value, place, held_out).picture for value in shown)
  prompt = " ".join([*parts, f"{IMAGE} This is a"])
  return Episode(prompt, pictures, tuple(f" {name}" for name in names), label)


def described(
  scenes: Scenes, seed: int, index: int, attribute: str = "shape", told: bool = True
) -> Episode:
  """A picture of one of two things whose invented names a text explains (Kosmos-1).

  Args:
    attribute: what a name stands for, "shape" or "color".
    told: False leaves the descriptions out and names the options instead, so that only a guess
      is left.
  """
  _check_attribute(attribute)
  draws = np.random.default_rng((seed, index, 4))
  place = ATTRIBUTES.index(attribute)
  values = _values(scenes, draws, 2, place, False)
  names, label = invented_names(draws, 2), int(draws.integers(2))
  said = [with_article(value) if attribute == "shape" else value for value in values]
  told_of = [f"It is {words}." for words in said] if told else None
  picture = _showing(scenes, draws, values[label], place, False).picture
  return Episode(
    described_prompt("thing", names, told_of), (picture,), tuple(f" {name}" for name in names),
    label,
  )


def _check_attribute(attribute: str) -> None:
  if attribute not in ATTRIBUTES:
    raise ValueError(
      f"attribute={attribute!r} is not what a name can stand for; give one of "
      f"{', '.join(ATTRIBUTES)}."
    )


def _values(scenes: Scenes, draws, num: int, place: int, held_out: bool) -> list[str]:
  """Different values of an attribute, of which there are (held-out) pairs."""
  pairs = scenes.held_out_pairs if held_out else scenes.seen_pairs
  there = list(dict.fromkeys(pair[place] for pair in pairs))
  if not 2 <= num <= len(there):
    raise ValueError(
      f"num_names={num} is not between 2 and {len(there)}, the number of "
      f"{'held-out ' if held_out else ''}{ATTRIBUTES[place]}s."
    )
  return [there[i] for i in draws.permutation(len(there))[:num]]


def _showing(scenes: Scenes, draws, value: str, place: int, held_out: bool) -> Scene:
  """One thing with a value of an attribute, the other attribute drawn."""
  pairs = scenes.held_out_pairs if held_out else scenes.seen_pairs
  fitting = [pair for pair in pairs if pair[place] == value]
  return scenes.compose(draws, [fitting[draws.integers(len(fitting))]])
