"""What the grounded model reads and is asked: captions with boxes, their plain twins, and items.

All of them are functions of (seed, index). Three kinds of rows have boxes: captions, whose noun
phrases have theirs, as GrIT's; expressions that fit one pictograph, with its box; and the words for
a given box. Each has a twin: the same picture and the same text without boxes, so that an arm
without boxes reads as much.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lmops_jax.data.boxes import Box
from lmops_jax.data.grounded_text import GroundedText, Located
from lmops_jax.data.multimodal import Record, drawn
from lmops_jax.data.synthetic_pictures.scene_texts import (
  Caption,
  caption,
  captions,
  noun_phrase,
  referring_expressions,
)
from lmops_jax.data.synthetic_pictures.scenes import Scene
from lmops_jax.systems.kosmos.items import HELD_OUT, SEEN
from lmops_jax.systems.kosmos.prepare import Sources
from lmops_jax.systems.kosmos.world import INTERLEAVED, PAIRS, TEXT, Weights, World, records

LOCATED, TOLD = "located", "told"  # with boxes, and without
KINDS = ("captions", "expressions", "answers")
EXPRESSION, PHRASE, ANSWER, CAPTION_KIND = "expression", "phrase", "answer", "caption"
_INTRODUCTION = "An image of "
_IT = "It"


class Item(NamedTuple):
  """Something to evaluate on.

  Attributes:
    kind: `EXPRESSION`, a phrase of which the box is asked; `PHRASE`, the last one of a caption;
      `ANSWER`, a box of which the words are asked; `CAPTION_KIND`, a caption with boxes.
    group: of seen or held-out pairs.
    scene: what is shown.
    prompt: what stands behind the picture.
    box: the true box; none of a caption.
    words: the right words for a box; "" of others.
  """

  kind: str
  group: str
  scene: Scene
  prompt: GroundedText
  box: Box | None = None
  words: str = ""


def weights(located: bool) -> Weights:
  """Of the sources of an arm: half of the pairs are plain captions, the rest by kind.

  Args:
    located: whether the rest has its boxes.
  """
  of_kind = LOCATED if located else TOLD
  return {
    TEXT: {"descriptions": 1.0},
    PAIRS: {"captions": float(len(KINDS)), **{f"{of_kind}_{kind}": 1.0 for kind in KINDS}},
    INTERLEAVED: {"documents": 1.0},
  }


def sources(world: World) -> Sources:
  """The records of all arms."""
  def numbered(make):
    def found(validation: bool) -> Iterator[Record]:
      num = world.num_validation if validation else world.num_train
      seed = world.validation_seed if validation else world.train_seed
      return (make(world, seed, index) for index in range(num))
    return found

  def known(part, source):
    return functools.partial(records, world, part, source)

  return {
    TEXT: {"descriptions": known(TEXT, "descriptions")},
    PAIRS: {
      "captions": known(PAIRS, "captions"),
      **{f"{of_kind}_{kind}": numbered(functools.partial(_MAKERS[kind], located=of_kind == LOCATED))
         for of_kind in (LOCATED, TOLD) for kind in KINDS}},
    INTERLEAVED: {"documents": known(INTERLEAVED, "documents")},
  }


def _caption(world: World, seed: int, index: int, located: bool) -> Record:
  draws, scene = np.random.default_rng((seed, index, 30)), world.scenes.scene(seed, index)
  if draws.integers(2):
    found = captions(scene)[: len(scene.pictographs)]  # the noun phrases, in each order
    text = _located(found[draws.integers(len(found))], _INTRODUCTION)
  else:
    text = _located(caption(draws, scene))
  return _record(index, scene, located, text)


def _located(found: Caption, front: str = "") -> GroundedText:
  """A caption with its boxes behind a few words."""
  spans = [Located(p.start + len(front), p.end + len(front), (p.box,)) for p in found.phrases]
  return GroundedText(front + found.text, spans)


def _expression(world: World, seed: int, index: int, located: bool) -> Record:
  draws, scene = np.random.default_rng((seed, index, 31)), world.scenes.scene(seed, index)
  found = referring_expressions(scene)
  text, box = found[draws.integers(len(found))]
  return _record(index, scene, located, GroundedText(text, [Located(0, len(text), (box,))]))


def _answer(world: World, seed: int, index: int, located: bool) -> Record:
  draws, scene = np.random.default_rng((seed, index, 32)), world.scenes.scene(seed, index)
  one = scene.pictographs[draws.integers(len(scene.pictographs))]
  return _record(index, scene, located, it_is(one.box), f" {noun_phrase(one)}")


def it_is(box: Box) -> GroundedText:
  """The front of a sentence about a place, as in Kosmos-2's grounded instructions."""
  return GroundedText(f"{_IT} is", [Located(0, len(_IT), (box,))])


def _record(index, scene, located, text: GroundedText, completion: str | None = None) -> Record:
  where = f"example {index}"
  parts = drawn(scene.picture, where), text if located else str(text)
  if completion is None:
    return Record(index, parts, 0, where)
  return Record(index, (*parts, completion), 2, where)


_MAKERS: Mapping = {"captions": _caption, "expressions": _expression, "answers": _answer}


def items(world: World) -> Iterator[Item]:
  """What all arms are evaluated on."""
  seed = world.test_seed
  for group in (SEEN, HELD_OUT):
    for index in range(world.num_items):
      scene = world.scenes.scene(seed, index, held_out=group == HELD_OUT)
      draws = np.random.default_rng((seed, index, group == HELD_OUT, 33))
      one = scene.pictographs[draws.integers(len(scene.pictographs))]
      text = f"the {one.color} {one.shape}"
      yield Item(
        EXPRESSION, group, scene, GroundedText(text, [Located(0, len(text), ())]), one.box)
      said = caption(draws, scene)
      asked = said.phrases[-1]
      yield Item(
        PHRASE, group, scene,
        GroundedText(said.text[: asked.end], [Located(asked.start, asked.end, ())]), asked.box)
      yield Item(ANSWER, group, scene, it_is(one.box), one.box, noun_phrase(one))
      yield Item(CAPTION_KIND, group, scene, GroundedText(_INTRODUCTION.strip()))
