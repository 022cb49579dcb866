"""A published model in this process, as `lmops generate` runs it: folder or GGUF file.

Its weights are read when the first reply is asked for, so a run that is answered from its log loads
none. Random numbers derive from the run's seed and the call, so sampling repeats exactly. Requests
of several runs can be answered as one batch (`together`); there too a reply's random numbers depend
on its own call alone, but they are others than without a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from lmops_jax.systems.socratic.backends import Reply, Sampling, Usage, WindowExceeded
from lmops_jax.systems.socratic.context import Messages

_FEW, _ROWS = 8, 64  # rows of a batch: two sizes, so that few programs are compiled
_SEEDS = 2**31  # row numbers of a generator
_REMEMBERED = 512  # tokens of requests: the engine counts them before it sends them


class InProcess:
  """A model of ours."""

  can_score = True

  def __init__(self, path: str, *, dtype: str = "float32", attention: str = "xla",
               window: int | None = None, partitioner=None, name: str | None = None,
               programs_of: InProcess | None = None):
    """
    Args:
      path: folder with config.json, weights and tokenizer, or a .gguf file.
      window: tokens of prompt and reply together; None is all that the model has.
      name: of the model in the keys of calls, from which random numbers derive; None is the path.
      programs_of: a model of the same sizes and tokenizer, whose compiled programs serve this one.

    Raises:
      ValueError: for a model that cannot be used, or that has no chat template.
    """
    from lmops_jax.pretrained import model as model_lib

    self.model = name or str(path)
    self._source = model_lib.load(path, dtype=dtype, param_dtype=dtype, attention=attention)
    if self._source.decoder is None:
      raise ValueError(f"{path} is a model of the family {self._source.family} that does not "
                       "continue a text; give a decoder.")
    self._tokenizer = self._source.tokenizer()
    self._partitioner, self._programs_of = partitioner, programs_of
    self._tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
    longest = self._source.decoder.config.max_length
    self.window = min(window or longest, longest)
    self._ids = functools.lru_cache(_REMEMBERED)(self._encoded)

  @functools.cached_property
  def _params(self):
    return self._source.of_decoder(self._source.params(self._partitioner))

  @functools.cached_property
  def _generator(self):
    from lmops_jax.decoding import Generator

    if self._programs_of is not None:
      return self._programs_of._generator.with_params(self._params)
    return Generator(self._source.decoder, self._params, self._tokenizer, self._partitioner,
                     batch_size=_ROWS)

  @functools.cached_property
  def _scorer(self):
    from lmops_jax.decoding.scoring import OptionScorer

    return OptionScorer(self._source.decoder, self._params, self._partitioner)

  def _text(self, messages: Messages) -> str:
    return self._tokenizer.apply_chat_template(
      [{"role": role, "content": content} for role, content in messages])

  def _encoded(self, messages: Messages) -> list[int]:
    return self._tokenizer.encode(self._text(messages), add_special=False)

  def count_tokens(self, messages: Messages) -> int:
    """Tokens of the chat as the model reads it."""
    return len(self._ids(messages))

  def complete(self, messages: Messages, sampling: Sampling, place,
               stream: Callable[[str], None] | None = None) -> Reply:
    """A reply.

    Raises:
      WindowExceeded: if it does not fit with the prompt.
    """
    self._check_window(messages, sampling)
    callback = None if stream is None else lambda _, piece: stream(piece)
    made, = self._generator.generate(
      [self._text(messages)], _options(sampling), callback=callback, add_special=False)
    return self._reply(messages, made)

  def complete_many(self, asked: Sequence[tuple[Messages, Sampling]]
                    ) -> list[Reply | WindowExceeded]:
    """Replies to several requests in few batches; an error in place of one that does not fit."""
    found: list[Reply | WindowExceeded | None] = [None] * len(asked)
    groups: dict[Sampling, list[int]] = {}
    for i, (messages, sampling) in enumerate(asked):
      try:
        self._check_window(messages, sampling)
      except WindowExceeded as error:
        found[i] = error
        continue
      groups.setdefault(dataclasses.replace(sampling, seed=0), []).append(i)
    for sampling, members in groups.items():
      size = _FEW if len(members) <= _FEW else -(-len(members) // _ROWS) * _ROWS
      rows = members + [members[0]] * (size - len(members))
      made = self._generator.generate(
        [self._text(asked[i][0]) for i in rows], _options(sampling), add_special=False,
        row_ids=[asked[i][1].seed % _SEEDS for i in rows])
      for i, one in zip(members, made):
        found[i] = self._reply(asked[i][0], one)
    return found

  def _check_window(self, messages: Messages, sampling: Sampling) -> None:
    num_prompt = self.count_tokens(messages)
    if num_prompt + sampling.max_new_tokens > self.window:
      raise WindowExceeded(f"{self.model} has a window of {self.window} tokens, and the prompt has "
                           f"{num_prompt} with {sampling.max_new_tokens} more to come.")

  def _reply(self, messages: Messages, made) -> Reply:
    usage = Usage(self.count_tokens(messages), len(made.ids))
    return Reply(made.text, "length" if made.finish_reason == "length" else "stop", usage,
                 self.model)

  def score(self, messages: Messages, choices: Sequence[str]) -> list[float]:
    """Log-likelihood of each choice as the beginning of the reply, nats."""
    return self.score_many([(messages, choices)])[0]

  def score_many(self, asked: Sequence[tuple[Messages, Sequence[str]]]) -> list[list[float]]:
    """The same of several requests."""
    from lmops_jax.decoding.scoring import Request

    requests = [Request(self._ids(messages), [
      self._tokenizer.encode(choice, add_special=False) for choice in choices])
      for messages, choices in asked]
    return [[float(scores.sum()) for scores in found] for found in self._scorer.score(requests)]


def _options(sampling: Sampling):
  from lmops_jax.decoding import GenerationOptions

  filters = {"top_p": sampling.top_p} if sampling.temperature else {}
  return GenerationOptions(
    max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=sampling.seed,
    **filters)
