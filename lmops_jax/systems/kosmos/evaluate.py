"""Stage `evaluate`: what a trained model says of the items, by its own decoder alone.

Options are ranked by the sum of their tokens' log-probabilities, captions and rationales are
greedy. Each picture goes through tower and connector once, however many prompts show it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.image_tokens import encode_texts, lay_out
from lmops_jax.data.multimodal import IMAGE, Picture, parts_of
from lmops_jax.data.tasks.picture_prompts import YES, after_rationale
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import OptionScorer, Request, total
from lmops_jax.evaluation import captions as caption_metrics
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.docked import DockedLM
from lmops_jax.models.transformer import Transformer
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos.items import Item
from lmops_jax.systems.kosmos.prepare import Prepared, batched
from lmops_jax.systems.kosmos.training import Arm
from lmops_jax.text.vocabularies import Vocabulary

RESULTS_FILE = "results.json"
_AT_ONCE = 64  # pictures that go through the tower together


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Evaluate:
  """How a trained model is asked.

  Attributes:
    max_new_tokens: of a caption or a rationale.
    batch_size: texts that are generated at a time.
  """

  max_new_tokens: PositiveInt = 24
  batch_size: PositiveInt = 64


def run(
  context: pipeline.StageContext, *, config: Evaluate, model: DockedLM, params: Any,
  prepared: Prepared, arm: Arm, partitioner,
) -> None:
  """Writes `results.json`: of each item what was said or chosen, and the figures of each kind.

  `said` has the text of a caption, the number of a chosen option, the probabilities of "Yes" for
  the candidates of a matrix, and None of a matrix for an arm that sees no pictures; `rationales`
  the texts of first stages by the number of their item.
  """
  items, pictures = prepared.items()
  with partitioner.activate():
    vectors = None if arm.shown is None else image_vectors(
      model, params, arm.shown(pictures, np.ones(len(pictures), bool)))
  text, of_text = Transformer(model.config.text), params["text"]
  asking = Asking(
    Generator(text, of_text, partitioner=partitioner, batch_size=config.batch_size),
    OptionScorer(text, of_text, partitioner), prepared, vectors,
    GenerationOptions(
      max_new_tokens=config.max_new_tokens, eos_ids=(prepared.ids.eos_id,)), config.batch_size)
  said: list[Any] = [None] * len(items)
  with context.progress(len(items), "items") as bar:
    captions = [i for i, item in enumerate(items) if not item.options and not item.candidates]
    thoughtful = [i for i, item in enumerate(items) if item.thought]
    for i, told in zip(captions, asking.told([items[i] for i in captions], bar.update)):
      said[i] = told
    rationales = dict(zip(thoughtful, asking.told(
      [items[i]._replace(prompt=items[i].thought) for i in thoughtful])))
    optional = [i for i, item in enumerate(items) if item.options]
    questions = [behind(items[i], rationales.get(i, "")) for i in optional]
    for i, chosen in zip(optional, asking.chosen(questions, bar.update)):
      said[i] = chosen
    for i, item in enumerate(items):
      if item.candidates:
        said[i] = asking.fits(item) if arm.sees else None
        bar.update(1)
  write_json(context.directory / RESULTS_FILE, {
    "said": said, "rationales": rationales, "figures": figures(items, said, rationales)})


@dataclasses.dataclass(frozen=True)
class Asking:
  """A trained model that answers items.

  Attributes:
    generator, scorer: of its decoder.
    prepared: vocabulary and ids.
    vectors: of all pictures, by their numbers; None for an arm that is shown none.
    options: of captions and rationales.
    batch_size: of these, how many are generated at a time.
  """

  generator: Generator
  scorer: OptionScorer
  prepared: Prepared
  vectors: np.ndarray | None
  options: GenerationOptions
  batch_size: int

  def told(
    self, items: Sequence[Item], progress: Callable[[int], None] = lambda num: None
  ) -> list[str]:
    """The text that follows each prompt."""
    found: list[str] = []
    for some in batched(self.prompts(items), self.batch_size):
      for one in self.generator.generate_ids(some, self.options):
        words = text_of(one.ids, self.prepared.vocabulary)
        found.append(" ".join(words.replace(IMAGE, " ").split()))  # it may spell out the mark
      progress(len(some))
    return found

  def chosen(
    self, items: Sequence[Item], progress: Callable[[int], None] | None = None
  ) -> list[int]:
    """The most likely option of each."""
    encode = self.prepared.vocabulary.encode_batch
    scores = self.scorer.score(
      [Request(prompt, encode(item.options)) for prompt, item in zip(self.prompts(items), items)],
      progress)
    return [int(np.argmax(total(of_options))) for of_options in scores]

  def fits(self, matrix: Item) -> list[float]:
    """The probability of "Yes" for each candidate; their context is read once."""
    yes = self.prepared.vocabulary.encode_batch([YES])
    asked = [
      matrix._replace(pictures=(*matrix.pictures, candidate)) for candidate in matrix.candidates]
    scores = self.scorer.score([Request(prompt, yes) for prompt in self.prompts(asked)])
    return [float(np.exp(total(of_yes)[0])) for of_yes in scores]

  def prompts(self, items: Sequence[Item]) -> list[Prompt]:
    """See `prompts_of`."""
    return prompts_of(items, self.vectors, self.prepared)


def image_vectors(model: DockedLM, params, pictures: np.ndarray) -> np.ndarray:
  """The vectors of each picture, `[N,M,W]`."""
  found = []
  for start in range(0, len(pictures), _AT_ONCE):
    some = pictures[start : start + _AT_ONCE]
    missing = _AT_ONCE - len(some)  # one shape, compiled once
    filled = np.pad(some, ((0, missing),) + ((0, 0),) * 3)
    found.append(np.asarray(_encode(model, params, filled))[: len(some)])
  return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, images):
  return model.apply({"params": params}, images, method="image_vectors")


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
    if vectors is None or not item.pictures:
      prompts.append(Prompt(row.tokens))
    else:
      shown = vectors[np.asarray(item.pictures)]
      prompts.append(Prompt(row.tokens, shown.reshape(-1, shown.shape[-1]), row.vectors))
  return prompts


def behind(item: Item, rationale: str) -> Item:
  """The item as it is asked behind a rationale; an empty one changes nothing."""
  return item._replace(prompt=after_rationale(rationale, item.prompt))


def text_of(ids: Sequence[int], vocabulary: Vocabulary) -> str:
  """What was generated, without special tokens."""
  return vocabulary.decode([i for i in ids if i < vocabulary.vocab_size]).strip()


def figures(
  items: Sequence[Item], said: Sequence[Any], rationales: Mapping[int, str]
) -> dict[str, dict[str, Any]]:
  """By "kind/group": how many are right of how many.

  A caption is right if it is one of the references, word for word; of captions there are also CIDEr
  and BLEU-4. Of items with a first stage there is also how many rationales were `read` right. Of
  matrices there are also the right ones and all `by_rule`. Kinds that the arm was not asked are
  left out.
  """
  found: dict[str, dict[str, Any]] = {}
  for name in dict.fromkeys(f"{item.kind}/{item.group}" for item in items):
    rows = [i for i, item in enumerate(items)
            if f"{item.kind}/{item.group}" == name and said[i] is not None]
    if rows:
      found[name] = _figures_of(items, rows, said, rationales)
  return found


def _figures_of(items, rows: Sequence[int], said, rationales) -> dict[str, Any]:
  first = items[rows[0]]
  if not first.options and not first.candidates:
    references = [items[i].references for i in rows]
    words = [said[i] for i in rows]
    right = [text in of for text, of in zip(words, references)]
    scores = caption_metrics.caption_scores(words, references)
    return {
      "right": sum(right), "num": len(rows), "CIDEr": scores["CIDEr"].corpus,
      "BLEU-4": scores["BLEU-4"].corpus,
    }
  right = [bool(np.argmax(said[i]) == items[i].label) if first.candidates
           else said[i] == items[i].label for i in rows]
  counts: dict[str, Any] = {"right": sum(right), "num": len(rows)}
  if first.thought:
    counts["read"] = sum(rationales[i] in items[i].references for i in rows)
  if first.candidates:
    rules = sorted({rule for i in rows for rule in items[i].rules})
    of_rules = {rule: [ok for i, ok in zip(rows, right) if rule in items[i].rules]
                for rule in rules}
    counts["by_rule"] = {rule: [sum(of), len(of)] for rule, of in of_rules.items()}
  return counts
