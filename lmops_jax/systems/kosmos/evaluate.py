"""Stage `evaluate`: what a trained model says of the items, by its own decoder alone.

Options are ranked by the sum of their tokens' log-probabilities, captions are greedy. Each picture
goes through tower and connector once, however many prompts show it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.image_tokens import encode_texts, lay_out
from lmops_jax.data.multimodal import IMAGE, Picture, parts_of
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import OptionScorer, Request, total
from lmops_jax.evaluation import captions as caption_metrics
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.docked import DockedLM
from lmops_jax.models.transformer import Transformer
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos.prepare import Prepared, batched
from lmops_jax.systems.kosmos.training import Arm
from lmops_jax.systems.kosmos.world import Item
from lmops_jax.text.vocabularies import Vocabulary

RESULTS_FILE = "results.json"
_AT_ONCE = 64  # pictures that go through the tower together


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Evaluate:
  """How a trained model is asked.

  Attributes:
    max_new_tokens: of a caption.
    batch_size: captions that are generated at a time.
  """

  max_new_tokens: PositiveInt = 24
  batch_size: PositiveInt = 64


def run(
  context: pipeline.StageContext, *, config: Evaluate, model: DockedLM, params: Any,
  prepared: Prepared, arm: Arm, partitioner,
) -> None:
  """Writes `results.json`: of each item what was said or chosen, and the figures of each kind."""
  items, pictures = prepared.items()
  with partitioner.activate():
    vectors = None if arm.shown is None else image_vectors(
      model, params, arm.shown(pictures, np.ones(len(pictures), bool)))
  prompts = prompts_of(items, vectors, prepared)
  text, of_text = Transformer(model.config.text), params["text"]
  asked = [i for i, item in enumerate(items) if item.options]
  scorer = OptionScorer(text, of_text, partitioner)
  with context.progress(len(items), "items") as bar:
    scores = scorer.score(
      [Request(prompts[i], prepared.vocabulary.encode_batch(items[i].options)) for i in asked],
      bar.update)
    said: list[Any] = [None] * len(items)
    for i, of_options in zip(asked, scores, strict=True):
      said[i] = int(np.argmax(total(of_options)))
    told = [i for i, item in enumerate(items) if not item.options]
    generator = Generator(text, of_text, partitioner=partitioner, batch_size=config.batch_size)
    options = GenerationOptions(
      max_new_tokens=config.max_new_tokens, eos_ids=(prepared.ids.eos_id,))
    for some in batched(told, config.batch_size):
      for i, found in zip(some, generator.generate_ids([prompts[i] for i in some], options)):
        said[i] = text_of(found.ids, prepared.vocabulary)
      bar.update(len(some))
  write_json(context.directory / RESULTS_FILE, {"said": said, "figures": figures(items, said)})


def image_vectors(model: DockedLM, params, pictures: np.ndarray) -> np.ndarray:
  """The vectors of each picture, `[N,M,W]`."""
  encode = jax.jit(lambda params, images: model.apply(
    {"params": params}, images, method="image_vectors"))
  found = []
  for start in range(0, len(pictures), _AT_ONCE):
    some = pictures[start : start + _AT_ONCE]
    missing = _AT_ONCE - len(some)  # one shape, compiled once
    filled = np.pad(some, ((0, missing),) + ((0, 0),) * 3)
    found.append(np.asarray(encode(params, filled))[: len(some)])
  return np.concatenate(found)


def prompts_of(
  items: Sequence[Item], vectors: np.ndarray | None, prepared: Prepared
) -> list[Prompt]:
  """The items' prompts, with vectors where pictures stand; without any if there are none."""
  rows = []
  for number, item in enumerate(items):
    if vectors is None:
      rows.append((" ".join(item.prompt.replace(IMAGE, " ").split()),))
    else:
      pictures = [Picture("")] * len(item.pictures)
      rows.append(parts_of(item.prompt, pictures, f"item {number}")[0])
  prompts = []
  for item, parts, texts in zip(items, rows, encode_texts(rows, prepared.vocabulary)):
    row = lay_out(0, parts, texts, 0, prepared.ids, end=False)
    if vectors is None:
      prompts.append(Prompt(row.tokens))
    else:
      shown = vectors[np.asarray(item.pictures)]
      prompts.append(Prompt(row.tokens, shown.reshape(-1, shown.shape[-1]), row.vectors))
  return prompts


def text_of(ids: Sequence[int], vocabulary: Vocabulary) -> str:
  """What was generated, without special tokens."""
  return vocabulary.decode([i for i in ids if i < vocabulary.vocab_size]).strip()


def figures(items: Sequence[Item], said: Sequence[Any]) -> dict[str, dict[str, float]]:
  """By "kind/group": of questions how many are right of how many; of captions also CIDEr.

  A caption is right if it is one of the references, word for word.
  """
  found: dict[str, dict[str, float]] = {}
  for name in dict.fromkeys(f"{item.kind}/{item.group}" for item in items):
    rows = [i for i, item in enumerate(items) if f"{item.kind}/{item.group}" == name]
    if items[rows[0]].options:
      right = [said[i] == items[i].label for i in rows]
      found[name] = {"right": sum(right), "num": len(rows)}
    else:
      references = [items[i].references for i in rows]
      words = [said[i] for i in rows]
      right = [text in of for text, of in zip(words, references)]
      scores = caption_metrics.caption_scores(words, references)
      found[name] = {
        "right": sum(right), "num": len(rows), "CIDEr": scores["CIDEr"].corpus,
        "BLEU-4": scores["BLEU-4"].corpus,
      }
  return found
