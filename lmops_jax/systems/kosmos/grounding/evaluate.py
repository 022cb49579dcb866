"""Stage `evaluate`: where a model says that things are, with and without the grammar of boxes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data import boxes
from lmops_jax.data.box_overlap import iou
from lmops_jax.data.boxes import Box, Grounded
from lmops_jax.data.grounded_text import appended_box_words, with_boxes
from lmops_jax.data.image_tokens import encode_texts, lay_out, special_words
from lmops_jax.data.multimodal import Picture
from lmops_jax.data.synthetic_pictures.scene_texts import captions, noun_phrase
from lmops_jax.decoding.boxes import Place, box_grammar
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.evaluation.grounding import THRESHOLD
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.docked import DockedLM
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained.trained_vocabulary import tokenizer_of
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos.evaluate import RESULTS_FILE, Evaluate, image_vectors
from lmops_jax.systems.kosmos.grounding.world import (
  ANSWER,
  CAPTION_KIND,
  EXPRESSION,
  PHRASE,
  Item,
  items,
)
from lmops_jax.systems.kosmos.prepare import Prepared, batched
from lmops_jax.systems.kosmos.training import Arm
from lmops_jax.systems.kosmos.world import World

FREE, BOUND = "free", "grammar"
_NUM_SEEN = 1_000  # training scenes whose boxes the best constant box is chosen from


class Words(NamedTuple):
  """What turns items to ids and ids to texts.

  Attributes:
    prepared: has the vocabulary.
    grid: cells in a row of it.
  """

  prepared: Prepared
  grid: int

  @property
  def special(self) -> tuple[str, ...]:
    """The special tokens, which follow those of the vocabulary."""
    return special_words(self.grid)

  def prompts(self, asked: Sequence[Item], vectors: np.ndarray) -> list[Prompt]:
    """The items as prompts, each behind a picture's vectors `[N,M,W]`."""
    vocabulary = self.prepared.vocabulary
    rows = [(Picture(""), item.prompt) for item in asked]
    texts = with_boxes(
      rows, encode_texts(rows, vocabulary), vocabulary,
      appended_box_words(vocabulary, self.special))
    found = []
    for parts, of_row, shown in zip(rows, texts, vectors, strict=True):
      row = lay_out(0, parts, of_row, 0, self.prepared.ids, end=False)
      found.append(Prompt(row.tokens, shown, row.vectors))
    return found


def run(
  context: pipeline.StageContext, *, config: Evaluate, model: DockedLM, params: Any,
  prepared: Prepared, world: World, grid: int, arm: Arm, partitioner,
) -> None:
  """Writes `results.json`: the text behind each item's picture, and the figures of each kind."""
  asked = list(items(world))
  pictures = np.stack([item.scene.picture for item in asked if item.kind == CAPTION_KIND])
  with partitioner.activate():
    vectors = image_vectors(model, params, arm.shown(pictures, np.ones(len(pictures), bool)))
  words = Words(prepared, grid)
  prompts = words.prompts(asked, np.repeat(vectors, len(asked) // len(pictures), axis=0))
  generator = Generator(
    Transformer(model.config.text), params["text"], partitioner=partitioner,
    batch_size=config.batch_size)
  vocabulary = prepared.vocabulary
  text_of, start = tokenizer_of(vocabulary, words.special), model.config.vectors_per_image + 3
  tags, end_id = appended_box_words(vocabulary, words.special).tags, prepared.ids.eos_id
  never = [prepared.ids.pad_id, prepared.ids.bos_id, prepared.ids.image_id]
  options = GenerationOptions(max_new_tokens=config.max_new_tokens, eos_ids=(end_id,))

  def grammar(kind):
    if kind == ANSWER:
      return None
    begins = Place.TEXT if kind == CAPTION_KIND else Place.NAMED
    return box_grammar(tags, grid, prepared.ids.vocab_size, [end_id], never, begins)

  said: dict[str, list[str]] = {how: [""] * len(asked) for how in (FREE, BOUND)}
  kinds = [EXPRESSION, PHRASE, ANSWER, CAPTION_KIND]
  with context.progress(len(asked) * len(said), "answers") as bar:
    for how, kind in itertools.product(said, kinds):
      constraint = grammar(kind) if how == BOUND else None
      for some in batched((i for i, item in enumerate(asked) if item.kind == kind),
                          config.batch_size):
        given = [prompts[i] for i in some]
        for i, found in zip(some, generator.generate_ids(given, options, constraint=constraint)):
          said[how][i] = text_of.decode([*prompts[i].ids[start:], *found.ids])
        bar.update(len(some))
  write_json(context.directory / RESULTS_FILE, {
    "said": said, "figures": {how: figures(asked, said[how], grid) for how in said}})


def found_box(item: Item, said: Grounded) -> Box | None:
  """The first box of the phrase that was asked for."""
  asked = item.prompt.spans[-1]
  name = item.prompt[asked.start : asked.end]
  return next((entity.boxes[0] for entity in said.entities if entity.name == name), None)


def figures(
  asked: Sequence[Item], said: Sequence[str], grid: int
) -> dict[str, dict[str, float]]:
  """By "kind/group": how many are right of how many.

  A box is right if it overlaps the true one by half of their union, words are if they are the right
  ones, and a caption if it is one of the scene's. Captions also count the scene's pictographs that
  they name and place right ("located" of "shapes"), and the groups of boxes that are malformed of
  all ("malformed" of "groups").
  """
  found: dict[str, dict[str, float]] = {}
  for item, text in zip(asked, said, strict=True):
    of = found.setdefault(f"{item.kind}/{item.group}", {"right": 0, "num": 0})
    of["num"] += 1
    grounded = boxes.extract(text, grid)
    if item.kind in (EXPRESSION, PHRASE):
      box = found_box(item, grounded)
      of["right"] += box is not None and float(iou(box, item.box)) >= THRESHOLD
      of["overlap"] = of.get("overlap", 0.0) + (0.0 if box is None else float(iou(box, item.box)))
    elif item.kind == ANSWER:
      of["right"] += grounded.text == f"{item.prompt} {item.words}"
    else:
      whole = grounded.text.removeprefix(item.prompt).strip()
      of["right"] += any(whole == one.text for one in captions(item.scene))
      located = sum(
        any(entity.name == noun_phrase(one) and iou(entity.boxes[0], one.box) >= THRESHOLD
            for entity in grounded.entities)
        for one in item.scene.pictographs)
      num_groups = text.count("<object>")
      for name, num in (("located", located), ("shapes", len(item.scene.pictographs)),
                        ("malformed", grounded.num_malformed), ("groups", num_groups)):
        of[name] = of.get(name, 0) + num
  return found


def baselines(world: World, grid: int) -> dict[str, dict[str, float]]:
  """What is right without looking, and what the grid allows: shares by baseline and group.

  "constant" is the one box that is right most often in training scenes, "centre" the middle half of
  the picture, "ceiling" the true box by its cells.
  """
  seen = np.array([
    world.scenes.scene(world.train_seed, index).pictographs[0].box for index in range(_NUM_SEEN)])
  best = seen[(iou(seen[:, None], seen) >= THRESHOLD).sum(axis=1).argmax()]
  found: dict[str, dict[str, float]] = {"constant": {}, "centre": {}, "ceiling": {}}
  asked = [item for item in items(world) if item.kind == EXPRESSION]
  for group in dict.fromkeys(item.group for item in asked):
    truth = np.array([item.box for item in asked if item.group == group])
    by_cells = boxes.decode(boxes.encode(truth, grid), grid)
    for name, guess in (("constant", best), ("centre", (0.25, 0.25, 0.75, 0.75)),
                        ("ceiling", by_cells)):
      found[name][group] = float((iou(guess, truth) >= THRESHOLD).mean())
  return found
