"""Rewriting prompts with a policy: the published recipe of decoding, and what becomes of its texts.

The released model is decoded with 8 beams, at most 75 new tokens and length penalty -1, the best
beam taken. Only new tokens become text, without any clean-up of blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmops_jax.data.prompt_pairs import ANCHOR, asked, checked_prompt
from lmops_jax.decoding import GenerationOptions, Generator

RECIPE = GenerationOptions(max_new_tokens=75, num_beams=8, length_penalty=-1.0)


class Rewrite(NamedTuple):
  """A prompt as the policy rewrote it.

  Attributes:
    text: stripped; the user's prompt if the policy wrote nothing.
    is_unchanged: whether it wrote nothing.
    score: of beam search, what answers are ranked by; else None.
    finish_reason: "eos" or "length".
    num_tokens: of the answer, the end token included.
  """

  text: str
  is_unchanged: bool
  score: float | None
  finish_reason: str
  num_tokens: int


def beam_options(
  num_beams: int = 8, num_groups: int = 1, num_return: int = 1, *, diversity: float = 1.0,
  length_penalty: float = -1.0, length_basis: str = "generated", max_new_tokens: int = 75,
) -> GenerationOptions:
  """The published recipe with other numbers.

  Args:
    num_beams: of all groups together.
    num_groups: of diverse beam search; 1 is plain beam search.
    num_return: answers of a prompt, at most `num_beams`.
    diversity: penalty between groups, above 0; only read if there are several groups.
    length_penalty, length_basis, max_new_tokens: see `GenerationOptions`; "total_unpadded" is the
      basis of the library that the released model was published with.

  Raises:
    ValueError: for numbers that do not go together.
  """
  if num_groups > 1 and not diversity > 0:
    raise ValueError(
      f"num_groups={num_groups} with diversity={diversity} would search the same answers in each "
      "group; set diversity above 0, or num_groups to 1."
    )
  return GenerationOptions(
    max_new_tokens=max_new_tokens, num_beams=num_beams, num_beam_groups=num_groups,
    diversity_penalty=diversity if num_groups > 1 else 0.0, num_return_sequences=num_return,
    length_penalty=length_penalty, length_basis=length_basis)


def rewrite(
  generator: Generator, prompts: Sequence[str], options: GenerationOptions = RECIPE,
) -> list[list[Rewrite]]:
  """Rewrites prompts.

  Args:
    generator: of a policy that was tuned on pairs with the anchor, with its tokenizer.
    prompts: what users wrote, without the anchor.
    options: how tokens are chosen.

  Returns:
    For each prompt its `num_return_sequences` answers, best first.

  Raises:
    ValueError: a prompt that is empty, no text, holds the anchor, or is too long for the model's
      context; by its number, before the model runs.
  """
  texts = [checked_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
  found = generator.generate([asked(text) for text in texts], options)
  per_prompt = options.num_return_sequences
  return [
    [_read(text, answer) for answer in found[i * per_prompt : (i + 1) * per_prompt]]
    for i, text in enumerate(texts)]


def completion_text(text: str) -> str:
  """What a policy wrote, cut before an anchor of its own and stripped."""
  return text.split(ANCHOR)[0].strip()


def _read(prompt: str, answer) -> Rewrite:
  text = completion_text(answer.text)
  return Rewrite(
    text or prompt, not text, answer.score, answer.finish_reason, len(answer.ids))
