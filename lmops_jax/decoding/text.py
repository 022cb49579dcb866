"""Text around generation: generated ids to text while they arrive, and stop strings.

A tokenizer, here and for `Generator`, is anything with `encode(text, add_special=True)`,
`decode(ids, skip_special=True)`, `bos_id` and `stop_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_INCOMPLETE = "\ufffd"  # how decoders show the first bytes of a character
_CONTEXT = 8  # tokens of the prompt that generated ones are decoded with


class Generation(NamedTuple):
  """One generated text.

  Attributes:
    text: without the prompt, cut before a stop string.
    ids: its tokens, with the end token, or those of the stop string, if one ended it.
    logprobs: log-probabilities of the ids, see `Generated`.
    finish_reason: "eos", "stop" or "length".
    score: see `Generated`.
  """

  text: str
  ids: list[int]
  logprobs: list[float]
  finish_reason: str
  score: float | None = None


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
  """The stop strings as a tuple.

  Raises:
    ValueError: for one that is empty.
  """
  stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
  for text in stop:
    if not isinstance(text, str) or not text:
      raise ValueError(f"the stop string {text!r} must be a text of at least one character.")
  return stop


def find_stop(text: str, stop: Sequence[str]) -> int | None:
  """Where the first stop string begins, or None."""
  found = [text.find(s) for s in stop if s in text]
  return min(found) if found else None


class TextStream:
  """Turns the ids of one row into text that never has to be taken back.

  What may still change is held until more is known: bytes of an unfinished character, and an end
  that could be the beginning of a stop string.
  """

  def __init__(self, tokenizer, stop: tuple[str, ...] = (), prompt: Sequence[int] = ()):
    """
    Args:
      tokenizer: see the module.
      stop: strings to stop at.
      prompt: ids in front. Some tokenizers drop a space in front of the first token, so the text
        is decoded behind the end of the prompt.
    """
    self._tokenizer = tokenizer
    self._stop = stop
    self._context = list(prompt[-_CONTEXT:])
    self._context_text = tokenizer.decode(self._context)
    self.ids: list[int] = []
    self.text = ""  # handed out so far
    self.stopped = False

  def add(self, ids: Sequence[int]) -> str:
    """Takes more ids; returns the text that is certain now.

    After a stop string `stopped` is True and `ids` ends with the token that completed it.
    """
    if self.stopped:
      return ""
    before = len(self.ids)
    self.ids.extend(ids)
    whole = self._decode(self.ids)
    if find_stop(whole, self._stop) is not None:
      self._cut(before)
      return self._hand_out(self._final())
    certain = whole.rstrip(_INCOMPLETE)
    held = max((_overlap(certain, s) for s in self._stop), default=0)
    return self._hand_out(certain[: len(certain) - held])

  def finish(self) -> str:
    """The rest of the text, when no more ids will come."""
    return self._hand_out(self._final())

  def _decode(self, ids):
    whole = self._tokenizer.decode([*self._context, *ids])
    if whole.startswith(self._context_text):
      return whole[len(self._context_text) :]
    return self._tokenizer.decode(ids)

  def _final(self):
    whole = self._decode(self.ids)
    cut = find_stop(whole, self._stop)
    return whole if cut is None else whole[:cut]

  def _cut(self, before):
    """Drops the ids after the one that completed a stop string."""
    self.stopped = True
    for length in range(before + 1, len(self.ids)):
      if find_stop(self._decode(self.ids[:length]), self._stop) is not None:
        del self.ids[length:]
        return

  def _hand_out(self, text):
    # A decoder that rewrites earlier text (few do) must not make the pieces overlap.
    new = text[len(self.text) :] if text.startswith(self.text) else ""
    self.text += new
    return new


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
  for length in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:length]):
      return length
  return 0
