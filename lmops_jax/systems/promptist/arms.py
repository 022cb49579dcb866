"""Stages `fixed` and `evaluate/seed<k>`: what prompts of users, people and policies score.

All arms are asked the same held-out prompts, and the pictures of all rewrites of a prompt start
from the same noise as those of the prompt itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.prompt_parts import parts_of
from lmops_jax.data.synthetic_pictures.styled_pictures import SEEN_CONTENTS, modified
from lmops_jax.data.synthetic_pictures.styles import MODIFIERS
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.host.whole_files import write_json
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist import world
from lmops_jax.systems.promptist.image_reward import ImageScorer
from lmops_jax.systems.promptist.judging import Judge, Judging
from lmops_jax.systems.promptist.policy import Policy
from lmops_jax.systems.promptist.rewriting import rewrite
from lmops_jax.systems.promptist.world import IN_DOMAIN, OUT_OF_DOMAIN, Prepared, World

FIXED, EVALUATE = "fixed", "evaluate"
RAW, HUMAN, SUFFIX, SFT, RL = "raw", "human", "suffix", "sft", "rl"
ARMS = (RAW, HUMAN, SUFFIX, SFT, RL)
DOMAINS = (IN_DOMAIN, OUT_OF_DOMAIN)
_FILE = "rows.json"
_ROWS_AT_ONCE = 256


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is asked.

  Attributes:
    judging: of held-out prompts.
    options: how a policy writes; of several answers all are scored.
    num_prompts: of each domain, at most.
    suffix_words: words of the fixed suffix, the best ones alone.
    suffix_prompts: prompts of seen contents by which these are chosen.
  """

  judging: Judging
  options: GenerationOptions
  num_prompts: PositiveInt = 36
  suffix_words: PositiveInt = 4
  suffix_prompts: PositiveInt = 12


def asked_prompts(config: Evaluation, of_world: World) -> list[tuple[str, world.TestPrompt]]:
  """All prompts with their domains."""
  return [(domain, prompt) for domain in DOMAINS
          for prompt in world.test_prompts(of_world, domain)[: config.num_prompts]]


def run_fixed(
  context: pipeline.StageContext, config: Evaluation, of_world: World, judge: Judge
) -> None:
  """Stage `fixed`: the arms that no policy writes, after choosing the suffix."""
  words, gains = best_words(config, judge.scorer)
  prompts = asked_prompts(config, of_world)
  rewrites = {
    RAW: [prompt.text for _, prompt in prompts],
    HUMAN: [prompt.human for _, prompt in prompts],
    SUFFIX: [modified(prompt.text, words) for _, prompt in prompts]}
  rows = {arm: scored(judge.scorer, prompts, [[text] for text in texts])
          for arm, texts in rewrites.items()}
  context.extra |= {"suffix": words, "gains": gains}
  _write(context, rows)


def best_words(config: Evaluation, scorer: ImageScorer) -> tuple[list[str], dict[str, float]]:
  """The words that alone raise the score of prompts most, and what each raises it by."""
  chosen = np.linspace(0, len(SEEN_CONTENTS) - 1, config.suffix_prompts).round().astype(int)
  prompts = [SEEN_CONTENTS[i].said() for i in chosen]
  before = scorer(prompts, prompts).mean()
  gains = {}
  for word in MODIFIERS:
    gains[word] = float(
      scorer(prompts, [modified(text, [word]) for text in prompts]).mean() - before)
  return sorted(gains, key=gains.get, reverse=True)[: config.suffix_words], gains


def run_policies(
  context: pipeline.StageContext, config: Evaluation, of_world: World, policy: Policy,
  judge: Judge, folders: dict[str, Path], partitioner,
) -> None:
  """Stage `evaluate/seed<k>`: the arms that a policy writes.

  Args:
    folders: of the finished stages of `SFT` and `RL`.
  """
  prepared = Prepared(context.input(world.STAGE))
  prompts = asked_prompts(config, of_world)
  load = {SFT: policy.load_sft, RL: policy.load_rl}
  rows = {}
  for arm, folder in folders.items():
    answers = written(
      config.options, policy.built(prepared), load[arm](folder, prepared, partitioner),
      prepared.tokenizer, [prompt.text for _, prompt in prompts], partitioner)
    rows[arm] = scored(judge.scorer, prompts, answers)
  _write(context, rows)


def written(
  options: GenerationOptions, model, params, tokenizer, prompts: Sequence[str], partitioner
) -> list[list[str]]:
  """What a policy makes of each prompt; one that it answers with nothing stays as it is."""
  generator = Generator(model, params, tokenizer, partitioner, batch_size=_ROWS_AT_ONCE)
  return [[one.text for one in answers] for answers in rewrite(generator, prompts, options)]


def scored(
  scorer: ImageScorer, prompts: Sequence[tuple[str, world.TestPrompt]],
  rewrites: Sequence[Sequence[str]],
) -> list[dict[str, Any]]:
  """A row for each rewrite: texts, domain, the terms of its score, and its modifiers."""
  flat = [(domain, prompt, text)
          for (domain, prompt), texts in zip(prompts, rewrites, strict=True) for text in texts]
  found = scorer.measure([prompt.text for _, prompt, _ in flat], [text for _, _, text in flat])
  return [
    {"domain": domain, "prompt": prompt.text, "content": prompt.content.said(), "rewrite": text,
     "score": float(found.score[i]),
     "relevance": float(found.rewritten.relevance[i]),
     "aesthetic": float(found.rewritten.aesthetic[i]),
     "gain": float(found.rewritten.aesthetic[i] - found.raw.aesthetic[i]),
     "modifiers": list(parts_of(text, MODIFIERS).modifiers)}
    for i, (domain, prompt, text) in enumerate(flat)]


def _write(context: pipeline.StageContext, rows: dict[str, list[dict[str, Any]]]) -> None:
  if context.writes:
    write_json(context.directory / _FILE, rows)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
  """The rows of a finished stage, by arm."""
  return json.loads((folder / _FILE).read_text())
