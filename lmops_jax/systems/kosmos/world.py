"""What the model reads: records to train on and to validate.

All of them are functions of (seed, index). The sources stand for those of the paper: texts for its
corpora, captions for LAION and COYO, documents for Common Crawl's interleaved pages. Questions
about pictures and episodes with invented names stand for what such pages hold of them by chance; so
that answering and few-shot learning are taught here, which the paper's model picks up by itself.

What no text tells, because the evaluation asks for it (`items`): what is typical of a shape, which
only the pictures of the source "typical" show; the sentiment of half of the words in texts, and of
the other half about pictures; the answers to matrices, unless `num_matrices` asks for some.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Le

from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  NonEmpty,
  PositiveInt,
  Seed,
  Share,
  component,
)
from lmops_jax.data.multimodal import Record, drawn, parts_of
from lmops_jax.data.synthetic_pictures import (
  Matrices,
  RenderedTexts,
  Scene,
  Scenes,
  captions,
  description,
  episode,
  interleaved,
  question_of_text,
  questions,
)
from lmops_jax.data.synthetic_pictures.rendered_text import SENTIMENTS
from lmops_jax.data.synthetic_pictures.scene_texts import caption
from lmops_jax.data.tasks.picture_prompts import CAPTION, INTRODUCE, QUESTION, SENTIMENT
from lmops_jax.data.tasks.task import IMAGE

TEXT, PAIRS, INTERLEAVED = "text", "pairs", "interleaved"
PARTS = (TEXT, PAIRS, INTERLEAVED)
CORRECT = ("No", "Yes")  # whether a candidate of a matrix is right


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class World:
  """Pictures and texts made on the spot.

  Attributes:
    scenes: of which captions, questions and documents tell.
    rendered: words with a sentiment.
    matrices: Raven's.
    typical_share: share of shapes in their typical colour and size in the pictures of the source
      "typical", whose captions name neither.
    num_train: records of each source of texts and of pairs to train on.
    num_interleaved: the same of interleaved documents.
    num_matrices: matrices of seen rules to train on, each with one candidate and whether it is
      right; 0 leaves the model without any, as the paper's.
    num_validation: records of each source whose loss is followed.
    num_items: scenes to evaluate on, of seen pairs and as many of held-out pairs; episodes of each
      number of shots; and words of each half.
    num_matrix_items: matrices to evaluate on, of seen rules and as many with a held-out rule.
    shots: pictures of each name in an episode.
    seed: of all of it. Records to train on, to validate and to evaluate have different seeds.

  Raises:
    ValueError: scenes with typical colours, which would let their questions be guessed.
  """

  scenes: Scenes
  rendered: RenderedTexts
  matrices: Matrices
  typical_share: Share = 0.9
  num_train: PositiveInt = 8_000
  num_interleaved: PositiveInt = 2_000
  num_matrices: Count = 0
  num_validation: PositiveInt = 64
  num_items: PositiveInt = 256
  num_matrix_items: PositiveInt = 300
  shots: Annotated[Sequence[PositiveInt], NonEmpty, Distinct] = (1, 2, 4)
  seed: Annotated[Seed, Le(2**30)] = 0

  def __post_init__(self):
    if self.scenes.typical_share:
      raise ValueError(
        f"data.Scenes.typical_share={self.scenes.typical_share} would let colours be guessed from "
        "shapes in all questions; leave it at 0 and set kosmos.World.typical_share."
      )
    _ = self.typical_scenes  # checks them

  @functools.cached_property
  def typical_scenes(self) -> Scenes:
    """Those that show what is typical of a shape."""
    return dataclasses.replace(self.scenes, typical_share=self.typical_share)

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


def plain_captions(scene: Scene) -> tuple[str, ...]:
  """Those that follow "An image of": the noun phrases, in each order."""
  return tuple(found.text for found in captions(scene)[: len(scene.pictographs)])


def without_picture(prompt: str) -> str:
  """A prompt that starts with a picture, as it is asked in text alone."""
  return prompt.removeprefix(IMAGE).strip()


def attribute_of(index: int) -> str:
  """What the names of an episode stand for."""
  return ("shape", "color")[index % 2]


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


def _typical(world: World, seed: int, index: int) -> Record:
  """A picture of what is typical, with a caption that names shapes alone."""
  draws, scene = np.random.default_rng((seed, index, 25)), world.typical_scenes.scene(seed, index)
  return _record(index, f"{IMAGE}{caption(draws, scene, name_colors=False).text}", [scene.picture])


def _reading(world: World, seed: int, index: int) -> Record:
  """A picture of a word, of either half, and the word."""
  found = world.rendered.item(seed, index, told_of_pictures=bool(index % 2))
  return _record(index, INTRODUCE, [found.picture], completion=f" {found.text}")


def _opinion(world: World, seed: int, index: int) -> Record:
  """A picture of a word of the one half, and its sentiment."""
  found = world.rendered.item(seed, index)
  return _record(index, SENTIMENT, [found.picture], completion=f" {SENTIMENTS[found.label]}")


def _document(world: World, seed: int, index: int) -> Record:
  found = interleaved(world.scenes, seed, index)
  return _record(index, found.text, found.pictures)


def _episode(world: World, seed: int, index: int) -> Record:
  """All of its text is learned: that of a document, in which names come again."""
  draws = np.random.default_rng((seed, index, 22))
  shots = world.shots[draws.integers(len(world.shots))]
  found = episode(world.scenes, seed, index, int(shots), attribute=attribute_of(index))
  return _record(index, f"{found.prompt}{found.options[found.label]}", found.pictures)


def _matrix(world: World, seed: int, index: int) -> Record:
  """A matrix with one candidate, in half of the cases the right one."""
  draws, found = np.random.default_rng((seed, index, 26)), world.matrices.matrix(seed, index)
  wrong = [i for i in range(len(found.candidates)) if i != found.label]
  right = bool(draws.integers(2))
  shown = found.label if right else wrong[draws.integers(len(wrong))]
  pictures = world.matrices.pictures((*found.context, found.candidates[shown]))
  return _record(index, found.prompt, pictures, completion=f" {CORRECT[right]}")


def _description(world: World, seed: int, index: int) -> Record:
  """A scene in words, then a question about it."""
  draws, scene = np.random.default_rng((seed, index, 23)), world.scenes.scene(seed, index)
  asked = questions(draws, scene)
  one = asked[draws.integers(len(asked))]
  told = description(scene)
  return _record(index, f"{told} {without_picture(QUESTION.format(question=one.text))} "
                 f"{one.answer}", [])


def _comparison(world: World, seed: int, index: int) -> Record:
  """A scene in words, then a question in the words of those about what is typical.

  Colours and sizes are independent of shapes here: the wording is learned, not what is typical.
  """
  draws, scene = np.random.default_rng((seed, index, 27)), world.scenes.scene(seed, index)
  one = question_of_text(draws, scene)
  return _record(index, f"{description(scene)} {one.text} {one.answer}", [])


def _sentiment(world: World, seed: int, index: int) -> Record:
  text, label = world.rendered.labelled_text(seed, index)
  return _record(index, f"{text} {without_picture(SENTIMENT)} {SENTIMENTS[label]}", [])


def _record(index, text, pictures, completion=None) -> Record:
  where = f"example {index}"
  parts, num_given = parts_of(
    text, [drawn(pixels, where) for pixels in pictures], where, completion)
  return Record(index, parts, num_given, where)


class Source(NamedTuple):
  """Records of one kind.

  Attributes:
    make: `(world, seed, index) -> record`.
    weight: share of its part's rows, beside the weights of the others.
  """

  make: Callable[[World, int, int], Record]
  weight: float = 1.0


_MATRICES = "matrices"
SOURCES: Mapping[str, Mapping[str, Source]] = {
  TEXT: {
    "descriptions": Source(_description), "comparisons": Source(_comparison),
    "sentiments": Source(_sentiment)},
  PAIRS: {
    "captions": Source(_caption, 3), "questions": Source(_question, 3),
    "typical": Source(_typical), "readings": Source(_reading), "opinions": Source(_opinion)},
  INTERLEAVED: {
    "documents": Source(_document), "episodes": Source(_episode), _MATRICES: Source(_matrix)},
}


def sources(world: World) -> Iterator[tuple[str, str]]:
  """The (part, source) that a world has."""
  for part in PARTS:
    for source in SOURCES[part]:
      if source != _MATRICES or world.num_matrices:
        yield part, source


def records(
  world: World, part: str, source: str, validation: bool = False
) -> Iterator[Record]:
  """The records of a source, to train on or to validate."""
  if validation:
    num = world.num_validation
  elif source == _MATRICES:
    num = world.num_matrices
  else:
    num = world.num_interleaved if part == INTERLEAVED else world.num_train
  make = SOURCES[part][source].make
  seed = world.validation_seed if validation else world.train_seed
  return (make(world, seed, index) for index in range(num))
