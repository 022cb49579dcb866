"""How a policy writes what it learns from: `training.reinforce.rollouts.Respond` by generation."""

from __future__ import annotations

import dataclasses

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.host.hashing import order_key
from lmops_jax.training.reinforce.rollouts import Answer


@component(module="decoding")
@dataclasses.dataclass(frozen=True)
class Exploration:
  """Sampling or (diverse) beam search of answers, as long as a draw allows.

  Promptist (arXiv:2212.09611) takes one of 8 answers of diverse beam search at random, with at most
  15 to 75 tokens, so that it does not explore long answers alone. Sampling at temperature 1
  without filters gives answers of the policy itself, as the theory of PPO has it.

  Attributes:
    options: how tokens are chosen; the seed is that of the step. With several answers to a prompt
      (`num_return_sequences`) as many as are wanted are taken at random.
    shortest: the most new tokens of a step are drawn from here to `options.max_new_tokens`; None
      is always the latter.
    batch_size: most rows at a time, beams and answers included.

  Raises:
    ValueError: for a `shortest` that the options do not allow, or for greedy search.
  """

  options: GenerationOptions
  shortest: PositiveInt | None = None
  batch_size: PositiveInt = 256

  def __post_init__(self):
    options, shortest = self.options, self.shortest
    if shortest and not max(1, options.min_new_tokens) <= shortest <= options.max_new_tokens:
      raise ValueError(
        f"decoding.Exploration.shortest={shortest} is outside of min_new_tokens="
        f"{options.min_new_tokens} to max_new_tokens={options.max_new_tokens} of its options."
      )
    if not options.temperature and options.num_beams == 1:
      raise ValueError(
        "decoding.Exploration.options has temperature=0.0 and num_beams=1, which always gives the "
        "same answer, so that nothing is explored; set a temperature, or search with beams."
      )

  def limit(self, seed: int) -> int:
    """The most new tokens of a step."""
    longest = self.options.max_new_tokens
    shortest = self.shortest or longest
    # Numbers from 0 on are rows, whose answers are chosen by the same seed.
    return shortest + order_key(-1, seed) % (longest - shortest + 1)


class Responder:
  """Answers of a policy; its programs are compiled when first needed and serve all steps.

  Args:
    exploration: how tokens are chosen.
    model: the policy.
    tokenizer: see `decoding.text`.
    partitioner: the partitioner of the run; None is the default device.
  """

  def __init__(self, exploration: Exploration, model, tokenizer, partitioner=None):
    self._exploration, self._model, self._tokenizer = exploration, model, tokenizer
    self._partitioner, self._generator = partitioner, None

  @property
  def num_programs(self) -> int:
    """Programs compiled so far."""
    return 0 if self._generator is None else self._generator.num_programs

  def __call__(self, params, prompts, seed: int) -> list[list[Answer]]:
    """Answers to prompts of ids.

    Args:
      params: the policy's.
      prompts: token ids.
      seed: of all that is drawn.

    Returns:
      For each prompt its `num_return_sequences` answers.

    Raises:
      ValueError: as `Generator.generate`.
    """
    exploration = self._exploration
    if self._generator is None:
      self._generator = Generator(
        self._model, params, self._tokenizer, self._partitioner,
        batch_size=exploration.batch_size)
    else:
      self._generator = self._generator.with_params(params)
    options = dataclasses.replace(
      exploration.options, max_new_tokens=exploration.limit(seed), seed=seed % 2**32)
    found = self._generator.generate(
      [Prompt(ids) for ids in prompts], options, capacity=exploration.options.max_new_tokens)
    answers = [Answer(one.text, one.ids, one.finish_reason == "length") for one in found]
    count = options.num_return_sequences
    return [answers[i : i + count] for i in range(0, len(answers), count)]
