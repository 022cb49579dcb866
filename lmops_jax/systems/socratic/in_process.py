"""A published model in this process, as `lmops generate` runs it: folder or GGUF file.

Its weights are read when the first reply is asked for, so a run that is answered from its log loads
none. Random numbers derive from the run's seed and the call, so sampling repeats exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lmops_jax.systems.socratic.backends import Reply, Sampling, Usage, WindowExceeded
from lmops_jax.systems.socratic.context import Messages


class InProcess:
  """A model of ours."""

  can_score = True

  def __init__(self, path: str, *, dtype: str = "float32", attention: str = "xla",
               window: int | None = None, partitioner=None):
    """
    Args:
      path: folder with config.json, weights and tokenizer, or a .gguf file.
      window: tokens of prompt and reply together; None is all that the model has.

    Raises:
      ValueError: for a model that cannot be used, or that has no chat template.
    """
    from lmops_jax.pretrained import model as model_lib

    self.model = str(path)
    self._source = model_lib.load(path, dtype=dtype, param_dtype=dtype, attention=attention)
    if self._source.decoder is None:
      raise ValueError(f"{path} is a model of the family {self._source.family} that does not "
                       "continue a text; give a decoder.")
    self._tokenizer = self._source.tokenizer()
    self._partitioner = partitioner
    self._tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
    longest = self._source.decoder.config.max_length
    self.window = min(window or longest, longest)

  @functools.cached_property
  def _params(self):
    return self._source.of_decoder(self._source.params(self._partitioner))

  @functools.cached_property
  def _generator(self):
    from lmops_jax.decoding import Generator

    return Generator(self._source.decoder, self._params, self._tokenizer, self._partitioner)

  @functools.cached_property
  def _scorer(self):
    from lmops_jax.decoding.scoring import OptionScorer

    return OptionScorer(self._source.decoder, self._params, self._partitioner)

  def _text(self, messages: Messages) -> str:
    return self._tokenizer.apply_chat_template(
      [{"role": role, "content": content} for role, content in messages])

  def _ids(self, messages: Messages) -> list[int]:
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
    from lmops_jax.decoding import GenerationOptions

    num_prompt = self.count_tokens(messages)
    if num_prompt + sampling.max_new_tokens > self.window:
      raise WindowExceeded(f"{self.model} has a window of {self.window} tokens, and the prompt has "
                           f"{num_prompt} with {sampling.max_new_tokens} more to come.")
    filters = {"top_p": sampling.top_p} if sampling.temperature else {}
    options = GenerationOptions(
      max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
      seed=sampling.seed, **filters)
    callback = None if stream is None else lambda _, piece: stream(piece)
    made, = self._generator.generate(
      [self._text(messages)], options, callback=callback, add_special=False)
    usage = Usage(num_prompt, len(made.ids))
    return Reply(made.text, "length" if made.finish_reason == "length" else "stop", usage,
                 self.model)

  def score(self, messages: Messages, choices: Sequence[str]) -> list[float]:
    """Log-likelihood of each choice as the beginning of the reply, nats."""
    from lmops_jax.decoding.scoring import Request

    request = Request(self._ids(messages), [
      self._tokenizer.encode(choice, add_special=False) for choice in choices])
    return [float(scores.sum()) for scores in self._scorer.score([request])[0]]
