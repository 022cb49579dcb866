"""Stage `world`: styled pictures with captions, the texts of prompts, and a tokenizer of all words.

It stands for what the paper takes from others: a text-to-image model's training data, the ratings
behind the aesthetic predictor, prompts of users, and prompts of experienced people.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Le

from lmops_jax.config.setting_types import PositiveInt, Seed, component
from lmops_jax.data.prompt_pairs import Pair, as_row
from lmops_jax.data.prompt_parts import Parts, parts_of, some_modifiers
from lmops_jax.data.synthetic_pictures import styled_pictures as styled
from lmops_jax.data.synthetic_pictures.styles import MODIFIERS
from lmops_jax.host.whole_files import write_json
from lmops_jax.stages import pipeline
from lmops_jax.text.tokenizer import Tokenizer, load_tokenizer

STAGE = "world"
IN_DOMAIN, OUT_OF_DOMAIN = "in domain", "out of domain"
_TOKENIZER, _PICTURES, _FACTS = "tokenizer", "pictures.npy", "facts.json"
_END = "<|endoftext|>"
MOST_IDS = 768  # 256 bytes, an end, and merges until every word is one token


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class World:
  """Pictures and texts made on the spot.

  Attributes:
    pictures: of which kind they are.
    num_pictures: to train on.
    num_tested: others, to test each part on.
    num_pairs: pairs of a user's prompt and an experienced person's.
    seed: of all of it; pictures to train on and to test have different seeds.
  """

  pictures: styled.StyledPictures
  num_pictures: PositiveInt = 6_000
  num_tested: PositiveInt = 512
  num_pairs: PositiveInt = 4_000
  seed: Annotated[Seed, Le(2**30)] = 0


class TestPrompt(NamedTuple):
  """A user's prompt.

  Attributes:
    text: what the user wrote.
    content: what it asks for.
    human: what an experienced person writes for it.
  """

  text: str
  content: styled.Content
  human: str


def pairs(world: World) -> Iterator[Pair]:
  """Pairs to learn from, of seen contents in the wordings of the domain.

  A source is the content alone, or in every third pair the target with some of its modifiers.
  """
  for index in range(world.num_pairs):
    draws = np.random.default_rng((world.seed, index, 42))
    content, target = styled.human_prompt(world.seed, index)
    source, kind = Parts(content.said(styled.WORDINGS[draws.integers(len(styled.WORDINGS))]), ()), (
      "MC")
    if index % 3 == 2:
      some = some_modifiers(parts_of(target, MODIFIERS), index, world.seed)
      source, kind = source._replace(modifiers=some.modifiers), "MCM"
    if source.joined() != target:
      yield Pair(index, source.joined(), target, kind, f"pair {index}")


def train_prompts() -> list[str]:
  """Users' prompts to explore with: seen contents in the wordings of the domain."""
  return [content.said(wording) for content in styled.SEEN_CONTENTS for wording in styled.WORDINGS]


def test_prompts(world: World, domain: str) -> list[TestPrompt]:
  """Prompts for held-out contents, in wordings of the domain or in others."""
  wordings = {IN_DOMAIN: styled.WORDINGS, OUT_OF_DOMAIN: styled.OTHER_WORDINGS}[domain]
  found = []
  for wording in wordings:
    for content in styled.HELD_OUT_CONTENTS:
      draws = np.random.default_rng((world.seed, len(found), 43))
      found.append(TestPrompt(content.said(wording), content, styled.modified(
        content.said(), styled.popular_modifiers(draws))))
  return found


class Prepared:
  """What the stage left.

  Attributes:
    pictures: `[N,side,side,3] uint8`, those to train on and behind them those to test.
    captions, ratings: of each of them.
    num_tested: the pictures at the end that nothing is trained on.
    tokenizer: puts an end token behind a text.

  Args:
    folder: the stage's.
  """

  def __init__(self, folder: Path):
    facts = json.loads((folder / _FACTS).read_text())
    self.pictures = np.load(folder / _PICTURES, mmap_mode="r")
    self.captions: list[str] = facts["captions"]
    self.ratings = np.array(facts["ratings"])
    self.contents = [styled.Content(*content) for content in facts["contents"]]
    self.num_tested: int = facts["num_tested"]
    self.tokenizer = load_tokenizer(folder / _TOKENIZER)

  @property
  def num_train(self) -> int:
    """Pictures to train on, the first ones."""
    return len(self.captions) - self.num_tested


def run(context: pipeline.StageContext, world: World) -> None:
  """Makes everything."""
  numbers = [(2 * world.seed, i) for i in range(world.num_pictures)]
  numbers += [(2 * world.seed + 1, i) for i in range(world.num_tested)]
  with context.progress(len(numbers), "pictures") as bar:
    found = []
    for seed, index in numbers:
      found.append(world.pictures.picture(seed, index))
      bar.update()
  np.save(context.directory / _PICTURES, np.stack([one.picture for one in found]))
  write_json(context.directory / _FACTS, {
    "captions": [one.caption for one in found], "ratings": [one.rating for one in found],
    "contents": [list(one.content) for one in found], "num_tested": world.num_tested})
  made = list(pairs(world))
  tokenizer = write_tokenizer(
    context.directory / _TOKENIZER,
    [text for pair in made for text in as_row(pair).values()]
    + [one.caption for one in found])
  context.extra.update(
    pictures=len(found), pairs=len(made), train_prompts=len(train_prompts()),
    tokens=tokenizer.vocab_size, modifiers=len(MODIFIERS),
    captions_shown=[one.caption for one in found[:4]],
    pairs_shown=["".join(as_row(pair).values()) for pair in made[:4]])


def write_tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
  """Byte-level BPE as GPT-2's, trained on texts; it puts an end token behind a text."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(sorted(texts), trainers.BpeTrainer(
    vocab_size=MOST_IDS, special_tokens=[_END], show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
  made.post_processor = processors.TemplateProcessing(
    single=f"$A {_END}", special_tokens=[(_END, made.token_to_id(_END))])
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  write_json(folder / "tokenizer_config.json", {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "bos_token": _END,
    "pad_token": _END})
  return load_tokenizer(folder)
