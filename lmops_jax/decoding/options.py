"""What a user chooses about generation: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from lmops_jax.config.setting_types import (
  Count,
  NonNegative,
  Positive,
  PositiveInt,
  Probability,
  Seed,
  Share,
  component,
)
from lmops_jax.decoding.beam import GENERATED, LENGTH_BASES

_NAME = "decoding.GenerationOptions"
_Few = Annotated[int, Ge(1), Le(2**20)]  # beams and answers: far more than memory or use
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@component(module="decoding")
@dataclasses.dataclass(frozen=True)
class GenerationOptions:
  """How tokens are chosen. The defaults are greedy.

  Filters act on the logits in the order in which they stand here, as in transformers' `generate`.
  Beam search takes the first three, on log-probabilities, without renormalising.

  Attributes:
    max_new_tokens: most tokens after the prompt, the end token included.
    repetition_penalty: divides positive scores and multiplies negative ones of tokens that stand in
      the prompt or were generated (Keskar et al. 2019, arXiv:1909.05858); 1 is off.
    no_repeat_ngram: no n-gram of this size occurs twice in prompt and generated tokens; 0 is off.
    min_new_tokens: no end token before this many tokens.
    temperature: divides the logits; 0 takes the most probable token (greedy).
    top_k: only the k best tokens, and those level with the last of them; 0 is off.
    top_p: the smallest set of best tokens that holds this probability (Holtzman et al. 2020,
      arXiv:1904.09751); 1 is off.
    min_p: only tokens with this fraction of the best token's probability (arXiv:2407.01082); 0 is
      off.
    seed: the seed of all random choices, 0 .. 2**32 - 1.
    num_return_sequences: answers for each prompt, with sampling or beam search.
    num_beams: hypotheses kept for each prompt; 1 is no beam search. More need temperature 0.
    num_beam_groups: diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424): beams in
      groups that avoid the tokens of earlier groups; 1 is off.
    diversity_penalty: subtracted from a token's score for each beam of an earlier group that chose
      it at the same step.
    length_penalty: a finished hypothesis scores sum of log-probabilities / length**length_penalty,
      its length in generated tokens with the end token. Above 0 favours longer ones.
    length_basis: what counts as length: "generated", the tokens behind the prompt with the end
      token, as transformers 5 does; or "total_unpadded", the prompt and what was generated without
      the end token, as transformers 4.23 does for a prompt without padding. A prefix counts in
      neither. With a length penalty below 0 they can choose different answers.
    early_stopping: True ends a search when `num_beams` hypotheses are finished; False when the best
      running one, scored at its present length, cannot beat the worst finished one; "never" when it
      could not at any length up to `max_new_tokens`.
    eos_ids: tokens that end a text; None takes the tokenizer's.

  Raises:
    ValueError: naming the field.
  """

  max_new_tokens: PositiveInt = 64
  repetition_penalty: Positive = 1.0
  no_repeat_ngram: Annotated[int, Ge(0), Le(2**20)] = 0
  min_new_tokens: Count = 0
  temperature: NonNegative = 0.0
  top_k: Count = 0
  top_p: Share = 1.0
  min_p: Probability = 0.0
  seed: Seed = 0
  num_return_sequences: _Few = 1
  num_beams: _Few = 1
  num_beam_groups: PositiveInt = 1
  diversity_penalty: NonNegative = 0.0
  length_penalty: float = 1.0
  length_basis: Literal[LENGTH_BASES] = GENERATED
  early_stopping: bool | Literal["never"] = False
  eos_ids: Sequence[Count] | None = None

  def __post_init__(self):
    for field in ("repetition_penalty", "temperature", "top_p", "min_p", "diversity_penalty",
                  "length_penalty"):
      value = getattr(self, field)
      if value and not _SMALLEST <= abs(value) <= _LARGEST:
        raise ValueError(
          f"{_NAME}.{field}={value!r} is no number in float32; take one from {_SMALLEST:.1g} to "
          f"{_LARGEST:.1g}, or 0."
        )
    if self.min_new_tokens > self.max_new_tokens:
      raise ValueError(
        f"{_NAME}.min_new_tokens={self.min_new_tokens} is more than max_new_tokens="
        f"{self.max_new_tokens}."
      )
    if self.eos_ids is not None:
      object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
    self._check_search()

  def _check_search(self):
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    useless = [name for name, off in filters.items() if getattr(self, name) != off]
    if self.temperature == 0 and useless:
      raise ValueError(
        f"{_NAME}.{useless[0]}={getattr(self, useless[0])} filters what is sampled from, and "
        "temperature=0 samples nothing; set a temperature above 0."
      )
    if self.num_beams > 1 and self.temperature:
      raise ValueError(
        f"{_NAME} has num_beams={self.num_beams} and temperature={self.temperature}; beam search "
        "takes the most probable, so set temperature to 0 or num_beams to 1."
      )
    if self.num_beams % self.num_beam_groups:
      raise ValueError(
        f"{_NAME}.num_beams={self.num_beams} is not a multiple of num_beam_groups="
        f"{self.num_beam_groups}."
      )
    if self.diversity_penalty and self.num_beam_groups == 1:
      raise ValueError(
        f"{_NAME}.diversity_penalty={self.diversity_penalty} works between groups of beams; set "
        "num_beam_groups to 2 or more."
      )
    if self.num_return_sequences > 1 and not self.temperature:
      if self.num_beams == 1:
        raise ValueError(
          f"{_NAME}.num_return_sequences={self.num_return_sequences} and greedy search has one "
          "answer; set a temperature or num_beams."
        )
      if self.num_return_sequences > self.num_beams:
        raise ValueError(
          f"{_NAME}.num_return_sequences={self.num_return_sequences} is more than num_beams="
          f"{self.num_beams}."
        )
