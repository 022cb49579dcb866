"""What all arms are evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lmops_jax.data.synthetic_pictures import episode, questions, questions_in_text
from lmops_jax.data.synthetic_pictures.rendered_text import SENTIMENTS
from lmops_jax.data.tasks.picture_prompts import CAPTION, INTRODUCE, QUESTION, SENTIMENT
from lmops_jax.systems.kosmos.world import (
  World,
  attribute_of,
  plain_captions,
  without_picture,
)

SEEN, HELD_OUT = "seen", "held_out"  # pairs of shape and colour, or rules of matrices
TYPICAL = "typical"
OF_PICTURES, OF_TEXTS = "of_pictures", "of_texts"  # where a word's sentiment was told
CAPTION_KIND, SHOTS_KIND, MATRIX_KIND = "caption", "shots ", "matrix "
PLAIN_KIND, THOUGHT_KIND, TEXT_KIND = "sentiment", "sentiment, thought", "sentiment, text"
_ASKED = ("color", "shape", "count")  # what every scene can be asked


class Item(NamedTuple):
  """Something to evaluate on.

  Attributes:
    kind: "caption", a kind of question, "shots" with their number, or "matrix" with the number of
      its pictures of context.
    group: what its figures are told apart by, within its kind.
    prompt: with `<image>` for each picture.
    pictures: each `[side,side,3] uint8`.
    options: to choose from by likelihood; none of a caption.
    label: of the right option; -1 of a caption.
    references: right captions, or the right rationale.
    candidates: of a matrix, one picture for each option, which stands for the last `<image>`.
    thought: the prompt of a first stage, whose answer is put in front of the question; "" for none.
    rules: those of a matrix, as "attribute:rule".
  """

  kind: str
  group: str
  prompt: str
  pictures: tuple[np.ndarray, ...]
  options: tuple[str, ...] = ()
  label: int = -1
  references: tuple[str, ...] = ()
  candidates: tuple[np.ndarray, ...] = ()
  thought: str = ""
  rules: tuple[str, ...] = ()


def items(world: World) -> Iterator[Item]:
  """Captions and questions, episodes, what is typical, words, matrices."""
  for group in (SEEN, HELD_OUT):
    yield from _of_scenes(world, group)
  for shots in (0, *world.shots):
    for index in range(world.num_items):
      found = episode(
        world.scenes, world.test_seed, index, shots, attribute=attribute_of(index))
      yield Item(
        f"{SHOTS_KIND}{shots}", SEEN, found.prompt, found.pictures, found.options, found.label)
  for one in questions_in_text(world.typical_scenes):
    yield Item(one.kind, TYPICAL, one.text, (), *_options(one))
  for group in (OF_PICTURES, OF_TEXTS):
    yield from _of_words(world, group)
  for group in (SEEN, HELD_OUT):
    yield from _matrices(world, group)


def _of_scenes(world: World, group: str) -> Iterator[Item]:
  seed = world.test_seed
  for index in range(world.num_items):
    scene = world.scenes.scene(seed, index, held_out=group == HELD_OUT)
    shown = (scene.picture,)
    yield Item(CAPTION_KIND, group, CAPTION, shown, references=plain_captions(scene))
    for one in questions(np.random.default_rng((seed, index, 24)), scene):
      if one.kind in _ASKED:
        yield Item(one.kind, group, QUESTION.format(question=one.text), shown, *_options(one))


def _options(question) -> tuple[tuple[str, ...], int]:
  """Its options as they follow a prompt, and the number of the right one."""
  return tuple(f" {option}" for option in question.options), question.options.index(question.answer)


def _of_words(world: World, group: str) -> Iterator[Item]:
  """Each word's sentiment, asked of its picture at once and after it was read, and of its text.

  The latter tells apart what is not known from what a picture in front keeps from being used.
  """
  options = tuple(f" {name}" for name in SENTIMENTS)
  for index in range(world.num_items):
    found = world.rendered.item(world.test_seed, index, told_of_pictures=group == OF_PICTURES)
    shown = (found.picture,)
    yield Item(PLAIN_KIND, group, SENTIMENT, shown, options, found.label)
    yield Item(THOUGHT_KIND, group, SENTIMENT, shown, options, found.label, (found.text,),
               thought=INTRODUCE)
    yield Item(TEXT_KIND, group, f"{found.text} {without_picture(SENTIMENT)}", (), options,
               found.label)


def _matrices(world: World, group: str) -> Iterator[Item]:
  for index in range(world.num_matrix_items):
    found = world.matrices.matrix(world.test_seed, index, held_out=group == HELD_OUT)
    context, candidates = (
      world.matrices.pictures(of) for of in (found.context, found.candidates))
    rules = tuple(f"{name}:{rule}" for name, rule in found.rules.items() if rule != "constant")
    yield Item(
      f"{MATRIX_KIND}{len(context)}", group, found.prompt, context, label=found.label,
      candidates=candidates, rules=rules)
