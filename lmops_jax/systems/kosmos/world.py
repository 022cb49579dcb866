"""What the model reads and is asked: records to train on and items to evaluate on.

All of them are functions of (seed, index). The sources stand for those of the paper: texts for its
corpora, captions for LAION and COYO, documents for Common Crawl's interleaved pages. Questions
about pictures and episodes with invented names stand for what such pages hold of them by chance; so
that answering and few-shot learning are taught here, which the paper's model picks up by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Le

from lmops_jax.config.setting_types import Distinct, NonEmpty, PositiveInt, Seed, component
from lmops_jax.data.multimodal import Record, drawn, parts_of
from lmops_jax.data.synthetic_pictures import (
  RenderedTexts,
  Scene,
  Scenes,
  captions,
  description,
  episode,
  interleaved,
  questions,
)
from lmops_jax.data.synthetic_pictures.rendered_text import SENTIMENTS
from lmops_jax.data.synthetic_pictures.scene_texts import caption
from lmops_jax.data.tasks.picture_prompts import CAPTION, QUESTION, SENTIMENT
from lmops_jax.data.tasks.task import IMAGE

TEXT, PAIRS, INTERLEAVED = "text", "pairs", "interleaved"
PARTS = (TEXT, PAIRS, INTERLEAVED)
SEEN, HELD_OUT = "seen", "held_out"
CAPTION_KIND, SHOTS_KIND = "caption", "shots "
_ASKED = ("color", "shape", "count")  # what every scene can be asked


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class World:
  """Pictures and texts made on the spot.

  Attributes:
    scenes: of which captions, questions and documents tell.
    rendered: texts with a sentiment.
    num_train: records of each source of texts and of pairs to train on.
    num_interleaved: the same of interleaved documents.
    num_validation: records of each source whose loss is followed.
    num_items: scenes to evaluate on, of seen pairs and as many of held-out pairs; and episodes of
      each number of shots.
    shots: pictures of each name in an episode.
    seed: of all of it. Records to train on, to validate and to evaluate have different seeds.
  """

  scenes: Scenes
  rendered: RenderedTexts
  num_train: PositiveInt = 8_000
  num_interleaved: PositiveInt = 2_000
  num_validation: PositiveInt = 64
  num_items: PositiveInt = 256
  shots: Annotated[Sequence[PositiveInt], NonEmpty, Distinct] = (1, 2, 4)
  seed: Annotated[Seed, Le(2**30)] = 0

  @property
  def train_seed(self) -> int:
    """Of records to train on."""
    return 3 * self.seed

  @property
  def validation_seed(self) -> int:
    """Of records to validate."""
    return 3 * self.seed + 1

  @property
  def test_seed(self) -> int:
    """Of items to evaluate on."""
    return 3 * self.seed + 2


class Item(NamedTuple):
  """Something to evaluate on.

  Attributes:
    kind: "caption", a kind of question, or "shots" with their number.
    group: "seen" or "held_out" pairs.
    prompt: with `<image>` for each picture.
    pictures: each `[side,side,3] uint8`.
    options: to choose from by likelihood; none of a caption.
    label: of the right option; -1 of a caption.
    references: right captions.
  """

  kind: str
  group: str
  prompt: str
  pictures: tuple[np.ndarray, ...]
  options: tuple[str, ...] = ()
  label: int = -1
  references: tuple[str, ...] = ()


def plain_captions(scene: Scene) -> tuple[str, ...]:
  """Those that follow "An image of": the noun phrases, in each order."""
  return tuple(found.text for found in captions(scene)[: len(scene.pictographs)])


def _caption(world: World, seed: int, index: int) -> Record:
  draws, scene = np.random.default_rng((seed, index, 20)), world.scenes.scene(seed, index)
  if draws.integers(2):
    plain = plain_captions(scene)
    text = f"{CAPTION} {plain[draws.integers(len(plain))]}"
  else:
    text = f"{IMAGE}{caption(draws, scene).text}"
  return _record(index, text, [scene.picture])


def _question(world: World, seed: int, index: int) -> Record:
  draws, scene = np.random.default_rng((seed, index, 21)), world.scenes.scene(seed, index)
  asked = questions(draws, scene)
  one = asked[draws.integers(len(asked))]
  return _record(
    index, QUESTION.format(question=one.text), [scene.picture], completion=f" {one.answer}")


def _document(world: World, seed: int, index: int) -> Record:
  found = interleaved(world.scenes, seed, index)
  return _record(index, found.text, found.pictures)


def _episode(world: World, seed: int, index: int) -> Record:
  draws = np.random.default_rng((seed, index, 22))
  shots = world.shots[draws.integers(len(world.shots))]
  found = episode(world.scenes, seed, index, int(shots), attribute=_attribute(index))
  return _record(index, found.prompt, found.pictures, completion=found.options[found.label])


def _attribute(index: int) -> str:
  """What an episode's names stand for."""
  return ("shape", "color")[index % 2]


def _description(world: World, seed: int, index: int) -> Record:
  """A scene in words, then a question about it."""
  draws, scene = np.random.default_rng((seed, index, 23)), world.scenes.scene(seed, index)
  asked = questions(draws, scene)
  one = asked[draws.integers(len(asked))]
  told = description(scene)
  return _record(index, f"{told} {_without_picture(QUESTION.format(question=one.text))} "
                 f"{one.answer}", [])


def _sentiment(world: World, seed: int, index: int) -> Record:
  text, label = world.rendered.labelled_text(seed, index)
  return _record(index, f"{text} {_without_picture(SENTIMENT)} {SENTIMENTS[label]}", [])


def _without_picture(prompt: str) -> str:
  return prompt.removeprefix(IMAGE).strip()


def _record(index, text, pictures, completion=None) -> Record:
  where = f"example {index}"
  parts, num_given = parts_of(
    text, [drawn(pixels, where) for pixels in pictures], where, completion)
  return Record(index, parts, num_given, where)


SOURCES: Mapping[str, Mapping[str, Callable[[World, int, int], Record]]] = {
  TEXT: {"descriptions": _description, "sentiments": _sentiment},
  PAIRS: {"captions": _caption, "questions": _question},
  INTERLEAVED: {"documents": _document, "episodes": _episode},
}


def records(
  world: World, part: str, source: str, validation: bool = False
) -> Iterator[Record]:
  """The records of a source, to train on or to validate."""
  if validation:
    num = world.num_validation
  else:
    num = world.num_interleaved if part == INTERLEAVED else world.num_train
  make = SOURCES[part][source]
  seed = world.validation_seed if validation else world.train_seed
  return (make(world, seed, index) for index in range(num))


def items(world: World) -> Iterator[Item]:
  """What all arms are evaluated on: captions and questions, then episodes."""
  seed = world.test_seed
  for group in (SEEN, HELD_OUT):
    for index in range(world.num_items):
      scene = world.scenes.scene(seed, index, held_out=group == HELD_OUT)
      shown = (scene.picture,)
      yield Item(CAPTION_KIND, group, CAPTION, shown, references=plain_captions(scene))
      for one in questions(np.random.default_rng((seed, index, 24)), scene):
        if one.kind in _ASKED:
          yield Item(
            one.kind, group, QUESTION.format(question=one.text), shown,
            tuple(f" {option}" for option in one.options), one.options.index(one.answer))
  for shots in (0, *world.shots):
    for index in range(world.num_items):
      found = episode(world.scenes, seed, index, shots, attribute=_attribute(index))
      yield Item(
        f"{SHOTS_KIND}{shots}", SEEN, found.prompt, found.pictures, found.options, found.label)
