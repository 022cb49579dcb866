"""The size of a vocabulary, before any text is read."""

from __future__ import annotations

from typing import Any

from lmops_jax.config.refusals import ConfigError


def vocabulary_size(given: int | None, vocabulary: Any, example: str, more: int = 0) -> int:
  """V of a model.

  Args:
    given: the model's own size; None takes the vocabulary's.
    vocabulary: a source of one, which may know its size.
    example: the binding that the error gives.
    more: words behind those of the vocabulary.

  Raises:
    ConfigError: when it is not known yet.
  """
  if given is not None:
    return given
  own = getattr(vocabulary, "vocab_size", None)
  if own is None:
    raise ConfigError(
      "the vocabulary's size is not known before its file is read; set it, for example with "
      f"--gin.{example}."
    )
  return own + more
